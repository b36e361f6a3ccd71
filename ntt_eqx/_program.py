"""A function of one sample as a flat list of primitive steps, and how to run them.

A traced jaxpr is unfolded: calls such as `jit` are opened, every value gets a slot, and the body of
a `scan` becomes a program of its own. The kernel's engine and the scores that
count paths read these steps instead of a jaxpr.

A **site** names a step wherever it stands: its index, and for a step of a loop's body the index of
the loop before it.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.extend.core as jex_core
import jax.numpy as jnp
from jaxtyping import Array

Site: TypeAlias = tuple[int, ...]
Evaluate: TypeAlias = Callable[[Any, Sequence[Any]], list[Any]]

# Calls whose derivative is that of what they call. A function with a derivative of its own
# (`custom_jvp_call`) is not among them.
_CALLS = ("jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint")
_BODIES = ("jaxpr", "call_jaxpr", "fun_jaxpr")


@dataclasses.dataclass(frozen=True)
class Const:
    """An operand known at trace time (a literal, or an array that the function closes over)."""

    value: Any


@dataclasses.dataclass(frozen=True)
class Loop:
    """The body of a `scan` and its lengths.

    Attributes:
        body: one iteration, `(consts, carry, xs) -> (carry, ys)`.
        consts: number of inputs that are the same in every iteration.
        carry: number of inputs that an iteration passes to the next.
        length: iterations.
    """

    body: "Program"
    consts: int
    carry: int
    length: int


@dataclasses.dataclass(frozen=True)
class Step:
    """One primitive: reads slots or constants, writes slots."""

    eqn: Any
    inputs: tuple[Any, ...]
    outputs: tuple[int, ...]
    loop: Loop | None = None

    @property
    def name(self) -> str:
        """The primitive's name."""
        return self.eqn.primitive.name

    @property
    def avals(self) -> tuple[Any, ...]:
        """Shapes and dtypes of the outputs."""
        return tuple(v.aval for v in self.eqn.outvars)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the first output."""
        return self.eqn.outvars[0].aval.shape

    @property
    def reads(self) -> list[int]:
        """The slots it reads."""
        return slots_of(self.inputs)


@dataclasses.dataclass(frozen=True)
class Program:
    """Steps in order; the inputs are slots 0 .. num_inputs - 1."""

    steps: tuple[Step, ...]
    num_inputs: int
    outputs: tuple[Any, ...]

    def step_at(self, site: Site) -> Step:
        """The step at a site."""
        step = self.steps[site[0]]
        if len(site) == 1:
            return step
        assert step.loop is not None
        return step.loop.body.step_at(site[1:])


def slots_of(operands: Iterable[Any]) -> list[int]:
    """The slots among operands, in their order."""
    return [slot for slot in operands if not isinstance(slot, Const)]


def unfold(
    closed: Any, opens: Callable[[Any], bool] | None = None, known: Sequence[Any] = ()
) -> Program:
    """The program of a closed jaxpr.

    **Arguments:**

    - `opens`: which call equations to inline; by default those without a derivative rule of their
      own.
    - `known`: the values of its last inputs, which become constants.
    """
    steps: list[Step] = []
    slots = _Slots()
    inputs: list[Any] = [slots.new() for _ in closed.jaxpr.invars[len(known) :]]
    given = inputs + [Const(value) for value in known]
    outputs = _unfold(closed.jaxpr, closed.consts, given, steps, slots, opens or is_call)
    return Program(tuple(steps), len(inputs), tuple(outputs))


def is_call(eqn: Any) -> bool:
    """Whether an equation calls a function and does nothing else."""
    return eqn.primitive.name in _CALLS


def called_jaxpr(eqn: Any) -> Any:
    """The jaxpr that an equation calls."""
    return next(eqn.params[name] for name in _BODIES if name in eqn.params)


def equations(jaxpr: Any) -> Iterator[Any]:
    """The equations of a jaxpr and of those inside it."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in jax.tree.leaves(list(eqn.params.values())):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def dependent_operands(program: Program, inputs: Iterable[int]) -> set[tuple[Site, int]]:
    """All operands, of steps in loops too, whose value depends on these inputs: site and number."""
    return _dependent(program, set(inputs))[0]


def _dependent(program: Program, slots: set[int]) -> tuple[set[tuple[Site, int]], list[bool]]:
    """The operands that depend on these slots, and whether each output does."""
    slots, found = set(slots), set()
    for index, step in enumerate(program.steps):
        reads = [not isinstance(slot, Const) and slot in slots for slot in step.inputs]
        found |= {((index,), n) for n, does in enumerate(reads) if does}
        writes = [any(reads)] * len(step.outputs)
        if step.loop is not None:
            inside, writes = _dependent_in(step.loop, reads)
            found |= {((index, *site), n) for site, n in inside}
        slots |= {slot for slot, does in zip(step.outputs, writes, strict=True) if does}
    return found, [not isinstance(slot, Const) and slot in slots for slot in program.outputs]


def _dependent_in(loop: Loop, reads: list[bool]) -> tuple[set[tuple[Site, int]], list[bool]]:
    """The same for a loop, whose iterations hand on what they carry."""
    carry = slice(loop.consts, loop.consts + loop.carry)
    while True:
        found, writes = _dependent(loop.body, {n for n, does in enumerate(reads) if does})
        after = [a or b for a, b in zip(reads[carry], writes[: loop.carry], strict=True)]
        if after == reads[carry]:
            return found, after + writes[loop.carry :]
        reads = [*reads[: loop.consts], *after, *reads[carry.stop :]]


def without_dead_steps(program: Program) -> Program:
    """The program without the steps that neither its outputs nor an effect depend on."""
    needed, kept = set(slots_of(program.outputs)), []
    for step in reversed(program.steps):
        if needed.intersection(step.outputs) or step.eqn.effects:
            needed.update(step.reads)
            kept.append(step)
    return dataclasses.replace(program, steps=tuple(reversed(kept)))


def constants(program: Program) -> list[Array]:
    """The constant arrays of a program, each as often as it is read."""
    found: list[Array] = []
    _map_constants(program, lambda value: found.append(value) or value)
    return found


def with_constants(program: Program, arrays: Sequence[Array]) -> Program:
    """The program with its `constants` replaced."""
    rest = iter(arrays)
    return _map_constants(program, lambda _: next(rest))


def _map_constants(program: Program, function: Callable[[Array], Any]) -> Program:
    def operand(slot: Any) -> Any:
        held = isinstance(slot, Const) and isinstance(slot.value, jax.Array)
        return Const(function(slot.value)) if held else slot

    def mapped(step: Step) -> Step:
        loop = step.loop
        if loop is not None:
            loop = dataclasses.replace(loop, body=_map_constants(loop.body, function))
        return dataclasses.replace(step, inputs=tuple(map(operand, step.inputs)), loop=loop)

    steps = tuple(map(mapped, program.steps))
    return Program(steps, program.num_inputs, tuple(map(operand, program.outputs)))


def read(values: Mapping[int, Any], slot: Any) -> Any:
    """The value of an operand."""
    return slot.value if isinstance(slot, Const) else values[slot]


def run(
    program: Program,
    values: Mapping[int, Any],
    steps: Iterable[int],
    evaluate: Evaluate,
    perturbations: Mapping[Site, Array] | None = None,
    tapped: Mapping[Site, tuple[int, ...]] | None = None,
    settle: Callable[[Array], Array] | None = None,
) -> tuple[dict[int, Any], dict[Site, tuple[Array, ...]]]:
    """Evaluate steps of the program.

    **Arguments:**

    - `values`: slot -> value, for all slots that the steps read but do not write.
    - `steps`: indices of the steps, in their order.
    - `evaluate`: `(equation, inputs) -> outputs`.
    - `perturbations`: site -> array added to that step's output; in a loop, one row an iteration.
    - `tapped`: site -> numbers of operands to hand out; in a loop, one row an iteration.
      A site in a loop that is tapped is perturbed, too.
    - `settle`: what becomes of outputs that are perturbed, and of those that are tapped later.

    **Returns:**

    The values of all slots, and the tapped operands by site.
    """
    perturbations, tapped = perturbations or {}, tapped or {}
    values, operands = dict(values), {}
    settled = set(tapped_slots(program, tapped))
    settled |= {program.steps[s[0]].outputs[0] for s in perturbations if not s[1:]}
    for index in steps:
        step, site = program.steps[index], (index,)
        inputs = [read(values, slot) for slot in step.inputs]
        inside = _inside(perturbations, index)
        if inside:
            watched = _inside(tapped, index)
            outputs, seen = _run_loop(step, inputs, evaluate, inside, watched, settle)
            operands.update({(index, *inner): value for inner, value in seen.items()})
        else:
            outputs = evaluate(step.eqn, inputs)
        if site in tapped:
            operands[site] = tuple(inputs[n] for n in tapped[site])
        if site in perturbations:
            outputs = [outputs[0] + perturbations[site].astype(outputs[0].dtype)]
        if settle is not None:
            pairs = zip(step.outputs, outputs, strict=True)
            outputs = [settle(out) if slot in settled else out for slot, out in pairs]
        values.update(zip(step.outputs, outputs, strict=True))
    return values, operands


def tapped_slots(program: Program, tapped: Mapping[Site, tuple[int, ...]]) -> list[int]:
    """The slots of the operands at these sites, loops left out."""
    return slots_of(
        program.steps[site[0]].inputs[n]
        for site, numbers in tapped.items()
        if not site[1:]
        for n in numbers
    )


def is_branched(program: Program, sites: Iterable[Site]) -> bool:
    """Whether two paths from these steps meet again, as in residual networks and normalisation."""
    first = {site[0] for site in sites}
    reached: set[int] = set()
    for index, step in enumerate(program.steps):
        if len(reached.intersection(step.reads)) > 1:
            return True
        if index in first or reached.intersection(step.reads):
            reached.update(step.outputs)
    return any(
        is_branched(step.loop.body, [site[1:] for site in sites if site[0] == n and site[1:]])
        for n, step in enumerate(program.steps)
        if step.loop is not None and n in first
    )


def bind(eqn: Any, inputs: Sequence[Any]) -> list[Any]:
    """The outputs of an equation, by the primitive itself."""
    out = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(eqn.params))
    return list(out) if eqn.primitive.multiple_results else [out]


def _inside(sites: Mapping[Site, Any], index: int) -> dict[Site, Any]:
    return {s[1:]: value for s, value in sites.items() if s[0] == index and len(s) > 1}


def _run_loop(
    step: Step,
    inputs: Sequence[Any],
    evaluate: Evaluate,
    perturbations: Mapping[Site, Array],
    tapped: Mapping[Site, tuple[int, ...]],
    settle: Callable[[Array], Array] | None,
) -> tuple[list[Any], dict[Site, tuple[Array, ...]]]:
    """A scan with perturbations as further inputs, and tapped operands as further outputs."""
    loop = step.loop
    assert loop is not None
    first, last = loop.consts, loop.consts + loop.carry

    def iteration(carry, rows):
        xs, added = rows
        given = dict(enumerate([*inputs[:first], *carry, *xs]))
        steps = range(len(loop.body.steps))
        found, seen = run(loop.body, given, steps, evaluate, added, tapped, settle)
        outputs = [read(found, slot) for slot in loop.body.outputs]
        return outputs[: loop.carry], (outputs[loop.carry :], seen)

    params = step.eqn.params
    carry, (ys, seen) = jax.lax.scan(
        iteration,
        list(inputs[first:last]),
        (list(inputs[last:]), dict(perturbations)),
        length=loop.length,
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*carry, *ys], seen


class _Slots:
    def __init__(self) -> None:
        self.count = 0

    def new(self) -> int:
        self.count += 1
        return self.count - 1


def _unfold(
    jaxpr: Any,
    consts: Sequence[Any],
    inputs: Sequence[Any],
    steps: list[Step],
    slots: _Slots,
    opens: Callable[[Any], bool],
) -> list[Any]:
    """Append the steps of `jaxpr` to `steps`, calls unfolded; return its output slots."""
    env: dict[Any, Any] = dict(zip(jaxpr.invars, inputs, strict=True))
    env.update(zip(jaxpr.constvars, map(Const, consts), strict=True))
    look = lambda v: Const(v.val) if isinstance(v, jex_core.Literal) else env[v]
    for eqn in jaxpr.eqns:
        operands = [look(v) for v in eqn.invars]
        if _repeats_nothing(eqn):
            outputs = _of_no_iterations(eqn, operands)
        elif opens(eqn):
            inner = called_jaxpr(eqn)
            nested, closed = getattr(inner, "jaxpr", inner), getattr(inner, "consts", ())
            outputs = _unfold(nested, closed, operands, steps, slots, opens)
        else:
            outputs = [slots.new() for _ in eqn.outvars]
            steps.append(Step(eqn, tuple(operands), tuple(outputs), _loop_of(eqn, opens)))
        env.update(zip(eqn.outvars, outputs, strict=True))
    return [look(v) for v in jaxpr.outvars]


def _repeats_nothing(eqn: Any) -> bool:
    """Whether an equation is a `scan` of no iterations, whose body never runs."""
    return (
        eqn.primitive.name == "scan"
        and eqn.params["length"] == 0
        and not eqn.effects
        and _scan_counts(eqn.params) is not None
    )


def _of_no_iterations(eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """The outputs of a `scan` without iterations: its initial carry, and rows of length 0."""
    counts = _scan_counts(eqn.params)
    assert counts is not None
    consts, carry = counts
    empty = [Const(jnp.zeros(v.aval.shape, v.aval.dtype)) for v in eqn.outvars[carry:]]
    return [*operands[consts : consts + carry], *empty]


def _loop_of(eqn: Any, opens: Callable[[Any], bool]) -> Loop | None:
    if eqn.primitive.name != "scan" or eqn.effects:
        return None
    counts = _scan_counts(eqn.params)
    if counts is None:
        return None
    return Loop(unfold(eqn.params["jaxpr"], opens), *counts, eqn.params["length"])


def _scan_counts(params: Mapping[str, Any]) -> tuple[int, int] | None:
    """How many inputs of a scan are constants and how many are carried.

    JAX 0.12 stores them as a tree of three parts. If neither form is found the loop stays opaque,
    which is slower and just as exact.
    """
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    if "ft_in" in params:
        consts, carry, _ = params["ft_in"].unpack()
        return len(consts), len(carry)
    return None
