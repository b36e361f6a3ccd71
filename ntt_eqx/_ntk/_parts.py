"""Cut a program into parts: what is run once a batch, and what is run once a sample.

Steps of parameters alone (a weight that is reshaped, a layer applied to learned queries) are the
same for every sample, and are run once. The others are one part, or two: what a convolution
computes for one sample fills a core's cache, so samples are taken one after the other. A dense
layer is the opposite: its weights are large and its activations small, and for one sample at a time
the weights (and in a gradient, their running sums) are read and written once a sample. A
convolutional network with dense layers at its end is both: a head, and a tail.

Every step belongs to one part. What crosses between parts is not given but follows from what each
part reads and writes, whatever its dtype.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp

from .._program import Program, Step, slots_of
from ._costs import Costs
from ._layers import Layer
from ._trace import Traced


@dataclasses.dataclass(frozen=True)
class Part:
    """Some steps of a program.

    Attributes:
        name: `"once"`, or `"head"` and `"tail"` for what is run for each sample.
        steps: their indices, in their order.
        shared: slots that it reads and that are the same for every sample.
        carried: slots that it reads and that differ: the sample, and what a part before wrote.
        writes: slots that it writes and that a later part or the output reads.
        layers: numbers of the layers that stand in it.
        pulled: slots that it reads through which derivatives flow on to layers or parameters.
        pushed: slots that it writes through which they come in from later parts or the output.
        sample_bytes: what its steps write for one sample, intermediates of loops included.
    """

    name: Literal["once", "head", "tail"]
    steps: tuple[int, ...]
    shared: tuple[int, ...]
    carried: tuple[int, ...]
    writes: tuple[int, ...]
    layers: tuple[int, ...]
    pulled: tuple[int, ...]
    pushed: tuple[int, ...]
    sample_bytes: int


@dataclasses.dataclass(frozen=True)
class Flow:
    """Where derivatives of the output with respect to layers and parameters flow.

    Attributes:
        slots: slots that depend on a layer's output or on one of the parameters that are in no
            layer, and that the output depends on, differentiably both.
        layers: numbers of the layers that the output depends on.
        parameters: those of the parameters in no layer that it depends on.
    """

    slots: frozenset[int]
    layers: tuple[int, ...]
    parameters: tuple[int, ...]


def derivative_flow(traced: Traced, layers: Sequence[Layer], rest: Sequence[int]) -> Flow:
    """Follow derivatives forwards from layers and parameters, and backwards from the output."""
    steps = traced.program.steps
    sites = {layer.site[0] for layer in layers}
    after = set(rest)
    for index, step in enumerate(steps):
        if index in sites or after.intersection(step.reads):
            after.update(_inexact(step))
    before = set(slots_of([traced.output]))
    for step in reversed(steps):
        if before.intersection(_inexact(step)):
            before.update(step.reads)
    reached = lambda layer: bool(before.intersection(_inexact(steps[layer.site[0]])))
    return Flow(
        frozenset(after & before),
        tuple(n for n, layer in enumerate(layers) if reached(layer)),
        tuple(p for p in rest if p in before),
    )


def split(traced: Traced, layers: Sequence[Layer], flow: Flow, costs: Costs) -> tuple[Part, ...]:
    """The parts in the order in which they run: once, a head where that is worth it, a tail.

    Without a step that depends on the sample there is no tail.
    """
    program = traced.program
    varying = _varying(program, traced.sample_slot)
    cut = _cut(program, layers, varying, costs)
    place = [0 if n not in varying else 1 if n < cut else 2 for n in range(len(program.steps))]
    owner = dict.fromkeys(range(program.num_inputs), 0)
    for index, step in enumerate(program.steps):
        owner.update(dict.fromkeys(step.outputs, place[index]))
    wanted = slots_of([traced.output])
    parts = []
    for number, name in enumerate(("once", "head", "tail")):
        mine = [n for n, part in enumerate(place) if part == number]
        if not mine and name != "once":
            continue
        written = {slot for n in mine for slot in program.steps[n].outputs}
        reads = sorted({slot for n in mine for slot in program.steps[n].reads} - written)
        assert all(owner[slot] <= number for slot in reads), "a part reads what comes after it"
        later = {s for n, part in enumerate(place) if part > number for s in program.steps[n].reads}
        writes = sorted(written.intersection(later.union(wanted)))
        differ = [s for s in reads if s == traced.sample_slot or owner[s] > 0]
        parts.append(
            Part(
                name=name,
                steps=tuple(mine),
                shared=tuple(s for s in reads if s not in differ),
                carried=tuple(differ),
                writes=tuple(writes),
                layers=tuple(n for n in flow.layers if layers[n].site[0] in mine),
                pulled=tuple(s for s in reads if s in flow.slots),
                pushed=tuple(s for s in writes if s in flow.slots),
                sample_bytes=sum(_bytes(program.steps[n]) for n in mine),
            )
        )
    return tuple(parts)


def _varying(program: Program, sample: int) -> set[int]:
    """Steps that depend on the sample."""
    slots, found = {sample}, set()
    for index, step in enumerate(program.steps):
        if slots.intersection(step.reads):
            slots.update(step.outputs)
            found.add(index)
    return found


def _cut(program: Program, layers: Sequence[Layer], varying: set[int], costs: Costs) -> int:
    """The step before which to cut: the first of the last dense layers, where that is worth it."""
    seen = [layer for layer in layers if layer.site[0] in varying]
    many = [layer for layer in seen if layer.positions > 1]
    last = max((layer.site[0] for layer in many), default=-1)
    dense = [layer for layer in seen if layer.positions == 1 and layer.site[0] > last]
    flops = sum(2 * la.groups * la.features * la.inputs * la.positions for la in many)
    weights = sum(layer.features * layer.inputs for layer in dense)
    if not many or not dense or weights * costs.flops_per_weight < flops:
        return 0
    return min(layer.site[0] for layer in dense)


def _inexact(step: Step) -> list[int]:
    """The outputs through which derivatives flow: real or complex numbers."""
    return [
        slot
        for slot, aval in zip(step.outputs, step.avals, strict=True)
        if jnp.issubdtype(aval.dtype, jnp.inexact)
    ]


def _bytes(step: Step) -> int:
    """What a step writes."""
    written = sum(_size(aval) for aval in step.avals)
    if step.loop is None:
        return written
    return written + step.loop.length * sum(map(_bytes, step.loop.body.steps))


def _size(aval: Any) -> int:
    return math.prod(aval.shape) * getattr(aval.dtype, "itemsize", 4)
