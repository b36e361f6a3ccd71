"""Count launches, reads, writes and products of a compiled program, from XLA's text of it.

The text is scheduled and fused: every instruction of the entry computation that is not mere
book-keeping is one launch on a GPU, and one operation on a TPU. A loop launches its body as many
times as it turns, and itself; of a condition, one branch counts.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from . import Chip

# Instructions that only name or arrange what is there already.
FREE = {
    "after-all",
    "add-dependency",
    "bitcast",
    "constant",
    "domain",
    "get-tuple-element",
    "opt-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
}
COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "reduce-scatter",
)
_ITEM_BITS = {"pred": 8, "s4": 4, "u4": 4, "s2": 2, "u2": 2, "token": 0, "opaque": 0}

_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation: `name = type opcode(operands), attributes`."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    root: bool
    literal: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of its first array."""
        found = _ARRAY.search(self.type)
        return _shape(found[2]) if found else ()

    @property
    def bytes(self) -> int:
        """Of all its arrays."""
        return sum(math.prod(_shape(d)) * _bits(t) for t, d in _ARRAY.findall(self.type)) // 8


@dataclasses.dataclass
class Counts:
    """Sums over the launches of one run of a program.

    Attributes:
        launches: how many.
        flops: multiplications and additions of its products (matrix products, convolutions).
        bytes: what its launches read and write; what stays on chip between two is counted twice.
        seconds: sum over launches of what takes longest: launch, products or traffic.
    """

    launches: int = 0
    flops: float = 0.0
    bytes: float = 0.0
    seconds: float = 0.0

    def add(self, other: "Counts", times: int = 1) -> None:
        """Add `other`, done some times."""
        for field in dataclasses.fields(self):
            sum_ = getattr(self, field.name) + times * getattr(other, field.name)
            setattr(self, field.name, sum_)


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop of the program: turns, launches a turn, and where it comes from."""

    trips: int
    launches: int
    source: str


class Program:
    """The computations of a compiled program by name."""

    def __init__(self, text: str, chip: Chip):
        """Read `compiled.as_text()`."""
        self.chip = chip
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            header = _HEADER.match(line)
            if header:
                current = self.computations.setdefault(header[1], {})
                self.entry = header[1] if line.startswith("ENTRY") else self.entry
            elif _INSTRUCTION.match(line):
                instruction = _parse(line)
                current[instruction.name] = instruction

    def counts(self, branch: Callable[..., Any] = min) -> Counts:
        """Of one run; `branch` takes the cheapest (`min`) or dearest (`max`) of a condition's."""
        return self._of_computation(self.entry, branch)

    def loops(self) -> list[Loop]:
        """The loops of the entry computation, those that launch most first."""
        found = []
        for x in self.computations[self.entry].values():
            if x.opcode == "while":
                body = self._of_computation(_called(x, "body"), min)
                source = re.search(r'op_name="([^"]*)"', x.attributes)
                found.append(Loop(self._trips(x), body.launches, source[1] if source else ""))
        return sorted(found, key=lambda loop: -loop.trips * loop.launches)

    def sent(self) -> dict[str, tuple[int, int]]:
        """What devices exchange: kind of collective -> how many, and bytes that they give back."""
        found: dict[str, tuple[int, int]] = {}
        for computation in self.computations.values():
            for x in computation.values():
                name = x.opcode.removesuffix("-start")
                if name in COLLECTIVES:
                    count, size = found.get(name, (0, 0))
                    found[name] = count + 1, size + x.bytes
        return found

    def custom_calls(self) -> list[str]:
        """The targets of all custom calls."""
        targets = []
        for computation in self.computations.values():
            for x in computation.values():
                target = re.search(r'custom_call_target="([^"]*)"', x.attributes)
                if x.opcode == "custom-call" and target:
                    targets.append(target[1])
        return targets

    def _of_computation(self, name: str, branch: Callable[..., Any]) -> Counts:
        total = Counts()
        for x in self.computations[name].values():
            if x.opcode == "while":
                total.add(Counts(launches=1, seconds=self.chip.launch_us * 1e-6))
                total.add(self._of_computation(_called(x, "body"), branch), self._trips(x))
            elif x.opcode == "conditional":
                branches = [self._of_computation(b, branch) for b in _branches(x)]
                total.add(Counts(launches=1, seconds=self.chip.launch_us * 1e-6))
                total.add(branch(branches, key=lambda counts: counts.launches))
            elif x.opcode == "call":
                total.add(self._of_computation(_called(x, "to_apply"), branch))
            elif x.opcode not in FREE and not x.opcode.endswith(("-done", "-update")):
                total.add(self._of_launch(name, x))
        return total

    def _trips(self, x: Instruction) -> int:
        """How often a loop turns; 1 where nothing in the text says so: its counts are too low."""
        found = re.search(r'"known_trip_count":\{"n":"(\d+)"', x.attributes)
        if found:
            return int(found[1])
        condition = self.computations[_called(x, "condition")].values()
        bounds = [c.literal for c in condition if c.opcode == "constant" and c.type[0] in "su"]
        compares = [c for c in condition if "direction=LT" in c.attributes]
        return int(bounds[0]) if len(bounds) == 1 and len(compares) == 1 else 1

    def _of_launch(self, computation: str, x: Instruction) -> Counts:
        inside = [(self.computations[computation], x)]
        called = re.search(r"(?:calls|called_computations=\{)=?%?([\w.\-]+)", x.attributes)
        if called and called[1] in self.computations:
            fused = self.computations[called[1]]
            inside += [(fused, y) for y in fused.values()]
            for y in list(fused.values()):  # a TPU fuses fusions
                nested = re.search(r"calls=%?([\w.\-]+)", y.attributes)
                if nested and nested[1] in self.computations:
                    deeper = self.computations[nested[1]]
                    inside += [(deeper, z) for z in deeper.values()]
        flops, busy = 0.0, 0.0
        for scope, y in inside:
            count = _product_flops(scope, y)
            flops += count
            busy += count / (1e12 * self.rate(scope, y)) if count else 0.0
        moved = self._traffic(computation, x)
        seconds = max(self.chip.launch_us * 1e-6, busy, moved / (self.chip.gbytes * 1e9))
        return Counts(1, flops, moved, seconds)

    def rate(self, scope: dict[str, Instruction], x: Instruction) -> float:
        """TFLOP/s of a product, by the dtype of its operands and the precision asked for."""
        types = [scope[name].type for name in x.operands[:2] if name in scope]
        exact = "highest" in x.attributes
        if any(t.startswith("f32") for t in types):
            if self.chip.platform == "cuda":
                return self.chip.vector_tflops if exact else self.chip.tflops / 2  # TF32
            return self.chip.tflops / 6 if exact else self.chip.tflops
        return (
            self.chip.vector_tflops / 2
            if any(t.startswith("f64") for t in types)
            else (self.chip.tflops)
        )

    def _traffic(self, computation: str, x: Instruction) -> float:
        """Bytes that a launch reads and writes: of what it slices, the slices alone."""
        scope = self.computations[computation]
        called = re.search(r"calls=%?([\w.\-]+)", x.attributes)
        fused = self.computations.get(called[1]) if called else None
        sizes = [scope[name].bytes for name in x.operands if name in scope]
        if fused is None:
            if x.opcode in ("dynamic-slice", "gather", "slice"):
                return 2 * x.bytes
            if x.opcode == "dynamic-update-slice":
                return 2 * scope[x.operands[1]].bytes
            return sum(sizes) + x.bytes
        users: dict[str, list[Instruction]] = {}
        for y in fused.values():
            for operand in y.operands:
                users.setdefault(operand, []).append(y)
        total = 0.0
        parameters = [y for y in fused.values() if y.opcode == "parameter"]
        updated = set()
        for y in fused.values():
            if y.opcode == "dynamic-update-slice":
                updated.add(_behind(fused, y.operands[0]))
                total += fused[y.operands[1]].bytes
        for y in parameters:
            uses = _uses(users, y.name)
            if y.name in updated:
                continue
            if uses and all(u.opcode in ("dynamic-slice", "gather", "slice") for u in uses):
                total += min(y.bytes, sum(u.bytes for u in uses))
            else:
                total += y.bytes
        roots = [y for y in fused.values() if y.root]
        written = sum(r.bytes for r in roots)
        if updated:
            written -= min(written, sum(fused[name].bytes for name in updated if name in fused))
        return total + written


def _parse(line: str) -> Instruction:
    head = _INSTRUCTION.match(line)
    assert head
    rest = line[head.end() :]
    end = _closing(rest) if rest.startswith("(") else rest.index(" ")
    type_, rest = rest[:end], rest[end:].lstrip()
    opcode, rest = rest.split("(", 1)
    close = _closing("(" + rest) - 1
    names = tuple(_NAME.findall(rest[:close]))
    return Instruction(
        head[2], type_, opcode, names, rest[close:], bool(head[1]), rest[: close - 1]
    )


def _closing(text: str) -> int:
    """Just behind the bracket that closes the first one."""
    depth = 0
    for place, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return place + 1
    return len(text)


@functools.cache
def _shape(dimensions: str) -> tuple[int, ...]:
    return tuple(int(d) for d in dimensions.split(",") if d)


def _bits(dtype: str) -> int:
    if dtype in _ITEM_BITS:
        return _ITEM_BITS[dtype]
    found = re.match(r"[a-z]+?(\d+)", dtype)
    return int(found[1]) if found else 8


def _called(x: Instruction, attribute: str) -> str:
    found = re.search(rf"{attribute}=%?([\w.\-]+)", x.attributes)
    if not found:
        raise ValueError(f"{x.opcode} {x.name} calls nothing by {attribute}: {x.attributes[:200]}")
    return found[1]


def _branches(x: Instruction) -> list[str]:
    listed = re.search(r"branch_computations=\{([^}]*)\}", x.attributes)
    if listed:
        return _NAME.findall(listed[1])
    return [_called(x, "true_computation"), _called(x, "false_computation")]


def _behind(scope: dict[str, Instruction], name: str) -> str:
    """What a chain of bitcasts and copies begins with."""
    while scope[name].opcode in ("bitcast", "copy", "convert") and scope[name].operands:
        name = scope[name].operands[0]
    return name


def _uses(users: dict[str, list[Instruction]], name: str) -> list[Instruction]:
    """Who reads a value, behind bitcasts."""
    found = []
    for y in users.get(name, []):
        found += _uses(users, y.name) if y.opcode == "bitcast" else [y]
    return found


def _product_flops(scope: dict[str, Instruction], x: Instruction) -> float:
    """Multiplications and additions of a matrix product or a convolution, else 0."""
    if x.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", x.attributes)
        left = scope[x.operands[0]].shape
        return 2.0 * math.prod(x.shape) * math.prod(left[d] for d in _shape(contracted[1]))  # pyright: ignore
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", x.attributes)
    if labels and (x.opcode == "convolution" or "__cudnn$conv" in x.attributes):
        return _convolution_flops(scope, x, labels)
    if x.opcode == "custom-call" and "__cublas" in x.attributes:
        contracted = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', x.attributes)
        left = scope[x.operands[0]].shape
        if contracted:
            dims = [int(d) for d in re.findall(r"\d+", contracted[1])]
            return 2.0 * math.prod(x.shape) * math.prod(left[d] for d in dims)
    return 0.0


def _convolution_flops(scope, x, labels) -> float:
    """2 per entry of the output, of the window and input feature it sums over.

    A window that is as large as a dilated or padded input meets few of its entries; it is counted
    by the pairs of output and input positions that meet.
    """
    _, kernel, _ = labels.groups()
    left, right = scope[x.operands[0]].shape, scope[x.operands[1]].shape
    if "__cudnn$convBackwardFilter" in x.attributes or "__cudnn$convBackwardInput" in x.attributes:
        right = x.shape if "Filter" in x.attributes else right
    inputs = right[kernel.index("i")]
    window = math.prod(_meeting(labels, left, right, x))
    outputs = x.shape[labels[3].index("b")] * x.shape[labels[3].index("f")]
    return 2.0 * outputs * inputs * window


def _meeting(labels, left, right, x) -> list[int]:
    """For each spatial axis, the pairs of an output position and a window entry on real input."""
    attributes = re.search(r"window=\{([^}]*)\}", x.attributes)
    fields = dict(part.split("=") for part in attributes[1].split()) if attributes else {}
    axes = sorted(c for c in labels[1] if c.isdigit())
    found = []
    for place, axis in enumerate(axes):
        field = lambda name, default, place=place: (
            fields[name].split("x")[place] if name in fields else default
        )
        size = int(field("size", str(right[labels[2].index(axis)])))
        stride, dilation = int(field("stride", "1")), int(field("rhs_dilate", "1"))
        spread, before = int(field("lhs_dilate", "1")), int(field("pad", "0_0").split("_")[0])
        length, outputs = left[labels[1].index(axis)], x.shape[labels[3].index(axis)]
        found.append(_pairs(size, outputs, length, stride, dilation, spread, before))
    return found


@functools.cache
def _pairs(
    size: int, outputs: int, length: int, stride: int, dilation: int, spread: int, before: int
) -> int:
    """Pairs of a window entry w and an output position o that meet one of `length` inputs."""
    few, many = sorted(((size, dilation), (outputs, stride)))
    places = np.arange(many[0]) * many[1] - before
    count = 0
    for step in range(few[0]):
        at = places + step * few[1]
        count += int(np.sum((at % spread == 0) & (0 <= at) & (at < length * spread)))
    return count
