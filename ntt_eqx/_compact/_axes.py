"""Which indices of which axes go together: the units of a network, found on its program.

Every index of every axis of every value belongs to one unit. A step that treats the axes of its
operands alike makes one unit of theirs; one that does something with an axis that depends on its
length, or that is not known here, pins the units of that axis: they stay.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from .._program import Const, Step
from ._flow import ELEMENTWISE, REDUCTIONS, touched_axes
from ._traced import TracedModel

Labels = list[np.ndarray]


@dataclasses.dataclass(frozen=True)
class Meeting:
    """An axis over which a product sums: the one place where a unit can be left out.

    Attributes:
        step: index of the step.
        axes: the axis in either operand.
        units: the units along it, before unions.
    """

    step: int
    axes: tuple[int, int]
    units: np.ndarray


class Units:
    """The units of a program.

    Attributes:
        labels: slot -> the units along each of its axes, before unions; `root` resolves them.
        meetings: where sums over them are taken.
    """

    def __init__(self, traced: TracedModel, fragile: bool):
        """Find them; `fragile` pins what depends on lengths that a model may hold itself."""
        self.parent = np.zeros(0, np.int64)
        self.reasons: dict[int, str] = {}
        self.labels: dict[int, Labels] = {}
        self.meetings: list[Meeting] = []
        self._fragile = fragile
        program = traced.program
        read = {slot for step in program.steps for slot in step.reads}
        for slot in range(program.num_inputs):
            shape = () if (value := traced.values.get(slot)) is None else value.shape
            reason = None
            if slot == traced.sample:
                reason = "they are the model's input"
            elif slot not in read:
                reason = "the model does not read them"
            self.labels[slot] = [self.new(size, reason) for size in shape]
        for index, step in enumerate(program.steps):
            operands = [self._of(slot) for slot in step.inputs]
            outputs = self._follow(index, step, operands)
            self.labels.update(zip(step.outputs, outputs, strict=True))
        for slot in program.outputs:
            for labels in self._of(slot):
                self.pin(labels, "they are the model's outputs")

    def new(self, size: int, reason: str | None = None) -> np.ndarray:
        """`size` units; pinned where there is a reason or only one."""
        start = len(self.parent)
        labels = np.arange(start, start + size)
        self.parent = np.concatenate([self.parent, labels])
        if reason is None and size == 1:
            reason = "there is one alone"
        if reason is not None:
            self.pin(labels, reason)
        return labels

    def root(self, labels: np.ndarray) -> np.ndarray:
        """The one number of each unit."""
        found = self.parent[labels]
        while not np.array_equal(found, higher := self.parent[found]):
            found = higher
        return found

    def pin(self, labels: np.ndarray, reason: str) -> None:
        """Keep these units."""
        for root in self.root(labels).tolist():
            self.reasons.setdefault(root, reason)

    def pinned(self, labels: np.ndarray) -> np.ndarray:
        """Which of these units are kept."""
        return np.array([root in self.reasons for root in self.root(labels).tolist()], bool)

    def unite(self, one: np.ndarray, two: np.ndarray) -> None:
        """Make one unit of each pair."""
        one, two = self.root(one), self.root(two)
        if np.array_equal(one, two):
            return
        for a, b in zip(one.tolist(), two.tolist(), strict=True):
            a, b = self._find(a), self._find(b)
            if a != b:
                low, high = min(a, b), max(a, b)
                self.parent[high] = low
                if high in self.reasons:
                    self.reasons.setdefault(low, self.reasons[high])

    def _find(self, label: int) -> int:
        while (higher := int(self.parent[label])) != label:
            label = higher
        return label

    def _of(self, slot: Any) -> Labels:
        if isinstance(slot, Const):
            return [self.new(n, "a constant array has them") for n in np.shape(slot.value)]
        return self.labels[slot]

    def _free(self, size: int) -> np.ndarray:
        return self.new(size, "the model may fix their number" if self._fragile else None)

    def _follow(self, index: int, step: Step, operands: list[Labels]) -> list[Labels]:
        params, name = step.eqn.params, step.name
        first = operands[0] if operands else []
        if (name in ELEMENTWISE or name == "copy") and len(step.outputs) == 1:
            return [self._alike(operands)]
        if name == "transpose":
            return [[first[axis] for axis in params["permutation"]]]
        if name in ("reshape", "squeeze", "expand_dims") and len(operands) == 1:
            if name != "reshape" or params.get("dimensions") is None:
                return [self._reshaped(first, step.shape)]
        if name == "broadcast_in_dim" and len(operands) == 1:
            mapped = dict(zip(params["broadcast_dimensions"], first, strict=True))
            return [[
                mapped[axis] if axis in mapped and len(mapped[axis]) == size else self._free(size)
                for axis, size in enumerate(step.shape)
            ]]  # fmt: skip
        if name == "concatenate":
            axis = params["dimension"]
            rest = [labels[:axis] + labels[axis + 1 :] for labels in operands]
            out = self._alike(rest)
            out.insert(axis, np.concatenate([labels[axis] for labels in operands]))
            return [out]
        if name == "slice":
            full = [
                (start, stop, stride) == (0, len(labels), 1)
                for start, stop, stride, labels in zip(
                    params["start_indices"],
                    params["limit_indices"],
                    params["strides"] or (1,) * len(first),
                    first,
                    strict=True,
                )
            ]
            return [self._kept(first, full, step.shape, "a slice takes a part of them")]
        if name == "pad" and min(min(pad) for pad in params["padding_config"]) >= 0:
            return [self._padded(first, params["padding_config"])]
        if name in REDUCTIONS:
            axes = params["axes"]
            for axis in axes:
                self.pin(first[axis], f"{name} runs over them")
            return [[labels for axis, labels in enumerate(first) if axis not in axes]]
        if (axes := touched_axes(step)) is not None and len(first) == len(step.shape):
            full = [axis not in axes for axis in range(len(first))]
            return [self._kept(first, full, step.shape, f"{name} runs over them")]
        if name == "rev":
            full = [axis not in params["dimensions"] for axis in range(len(first))]
            return [self._kept(first, full, step.shape, "their order is reversed")]
        if name == "dot_general":
            return [self._product(index, step, operands)]
        if name == "conv_general_dilated" and params["batch_group_count"] == 1:
            return [self._convolution(index, step, operands)]
        if name == "gather":
            return [self._looked_up(step, operands)]
        if name == "dynamic_slice":
            full = [a == b for a, b in zip(params["slice_sizes"], map(len, first), strict=True)]
            return [self._kept(first, full, step.shape, "a slice takes a part of them")]
        return self._unknown(step, operands)

    def _unknown(self, step: Step, operands: list[Labels]) -> list[Labels]:
        reason = f"{step.name} is not followed"
        for labels in operands:
            for axis in labels:
                self.pin(axis, reason)
        return [[self.new(size, reason) for size in aval.shape] for aval in step.avals]

    def _alike(self, operands: Sequence[Labels]) -> Labels:
        shaped = [labels for labels in operands if labels]
        out = list(shaped[0]) if shaped else []
        for other in shaped[1:]:
            for n, (one, two) in enumerate(zip(out, other, strict=True)):
                if len(one) == len(two):
                    self.unite(one, two)
                elif len(one) == 1:  # one that is repeated
                    out[n] = two
        return out

    def _kept(
        self, labels: Labels, full: list[bool], shape: tuple[int, ...], reason: str
    ) -> Labels:
        """Axes that go through whole; the units of the others are pinned."""
        out = []
        for axis, whole, size in zip(labels, full, shape, strict=True):
            if not whole:
                self.pin(axis, reason)
            out.append(axis if whole else self.new(size, reason))
        return out

    def _padded(self, labels: Labels, config: Any) -> Labels:
        out = []
        for axis, (low, high, inside) in zip(labels, config, strict=True):
            if inside:
                self.pin(axis, "pad puts something between them")
                size = low + high + len(axis) + inside * max(len(axis) - 1, 0)
                out.append(self.new(size, "pad puts something between them"))
                continue
            parts = [self._free(int(low)), axis, self._free(int(high))]
            out.append(np.concatenate(parts))
        return out

    def _reshaped(self, labels: Labels, shape: tuple[int, ...]) -> Labels:
        out: Labels = []
        for one, sizes in _blocks([len(axis) for axis in labels], shape):
            axes = [labels[n] for n in one]
            wide = [axis for axis in axes if len(axis) != 1]
            if len([size for size in sizes if size != 1]) <= 1 and len(wide) <= 1:
                out += [wide[0] if wide and s == len(wide[0]) else self.new(s) for s in sizes]
                continue
            if len([size for size in sizes if size != 1]) != 1:
                for axis in axes:
                    self.pin(axis, "reshape splits them")
                out += [self.new(size, "reshape splits them") for size in sizes]
                continue
            merged = self._merged(wide)
            out += [merged if size != 1 else self.new(1) for size in sizes]
        return out

    def _merged(self, axes: Labels) -> np.ndarray:
        """One axis of several: its units are those of the only one that is not pinned."""
        free = [n for n, axis in enumerate(axes) if not self.pinned(axis).all()]
        if len(free) > 1 or self._fragile:
            for axis in axes:
                self.pin(axis, "reshape merges them with others")
            free = []
        sizes = [len(axis) for axis in axes]
        if not free:
            first = int(self.root(axes[0][:1])[0]) if sizes[0] else -1
            return self.new(int(np.prod(sizes)), self.reasons.get(first, "reshape merges them"))
        inner = [1] * len(axes)
        inner[free[0]] = -1
        return np.broadcast_to(axes[free[0]].reshape(inner), sizes).reshape(-1)

    def _product(self, index: int, step: Step, operands: list[Labels]) -> Labels:
        (lc, rc), (lb, rb) = step.eqn.params["dimension_numbers"]
        one, two = operands
        for left, right in zip(lb, rb, strict=True):
            self.unite(one[left], two[right])
        for left, right in zip(lc, rc, strict=True):
            self.unite(one[left], two[right])
            self.meetings.append(Meeting(index, (left, right), one[left]))
        out = [one[axis] for axis in lb]
        out += [axis for n, axis in enumerate(one) if n not in (*lb, *lc)]
        return out + [axis for n, axis in enumerate(two) if n not in (*rb, *rc)]

    def _convolution(self, index: int, step: Step, operands: list[Labels]) -> Labels:
        params, (x, w) = step.eqn.params, operands
        spec, groups = params["dimension_numbers"], params["feature_group_count"]
        batch, features = x[spec.lhs_spec[0]], x[spec.lhs_spec[1]]
        made, taken = w[spec.rhs_spec[0]], w[spec.rhs_spec[1]]
        for axis in spec.lhs_spec[2:]:
            self.pin(x[axis], "a window runs over them")
        for axis in spec.rhs_spec[2:]:
            self.pin(w[axis], "they are those of a window")
        if groups == 1:
            self.unite(features, taken)
            self.meetings.append(Meeting(index, (spec.lhs_spec[1], spec.rhs_spec[1]), features))
        elif groups == len(features) == len(made):
            self.unite(features, made)
        else:
            for axis in (features, made, taken):
                self.pin(axis, "groups of a convolution share them")
        out = [self.new(size, "a window runs over them") for size in step.shape]
        out[spec.out_spec[0]], out[spec.out_spec[1]] = batch, made
        return out

    def _looked_up(self, step: Step, operands: list[Labels]) -> Labels:
        """Rows of a table: their entries go through, which of them there are is pinned."""
        params, table = step.eqn.params, operands[0]
        numbers = params["dimension_numbers"]
        reason = "gather takes some of them"
        gone = (*numbers.collapsed_slice_dims, *getattr(numbers, "operand_batching_dims", ()))
        out = [self.new(size, reason) for size in step.shape]
        window = [axis for axis in range(len(table)) if axis not in gone]
        for place, axis in zip(numbers.offset_dims, window, strict=True):
            if params["slice_sizes"][axis] == len(table[axis]):
                out[place] = table[axis]
            else:
                self.pin(table[axis], reason)
        for axis in gone:
            self.pin(table[axis], reason)
        for labels in operands[1:]:
            for axis in labels:
                self.pin(axis, reason)
        return out


def _blocks(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """A reshape as blocks of axes of equal sizes: (axes before, sizes after)."""
    if 0 in before:
        return [(list(range(len(before))), list(after))]
    blocks, m, n = [], 0, 0
    while m < len(before) or n < len(after):
        axes, sizes, one, two = [], [], 1, 1
        if m < len(before):
            axes, one, m = [m], before[m], m + 1
        if n < len(after):
            sizes, two, n = [after[n]], after[n], n + 1
        while one != two:
            if one < two:
                axes, one, m = [*axes, m], one * before[m], m + 1
            else:
                sizes, two, n = [*sizes, after[n]], two * after[n], n + 1
        blocks.append((axes, sizes))
    return blocks
