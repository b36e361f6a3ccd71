"""Cut a program into segments that run once a batch (`"once"`) or for each sample.

Steps of parameters alone (a reshaped weight, a layer applied to learned queries) are the same for
every sample and run once. All other steps form one segment or two. The intermediates of a
convolution for one sample fill a core's cache, so the `"head"` takes few samples at a time. A dense
layer has large weights and small activations: for one sample at a time it would read the weights
(and in a gradient, write their running sums) once a sample, so the `"tail"` of dense layers at the
end of a convolutional network takes many.

Every step belongs to one segment. The inputs and outputs of a segment are derived from its steps,
whatever their dtype, so values and cotangents cannot be dropped by accident.
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
        shared: slots that it reads and that are equal for all samples.
        carried: slots that it reads and that differ: the sample, and outputs of earlier segments.
        writes: slots that it writes and that a later segment or the output reads.
        layers: numbers of its layers.
        pulled: slots that it reads and whose cotangents earlier segments or parameters need.
        pushed: slots that it writes and whose cotangents come from later segments or the output.
        sample_bytes: bytes that its steps write for one sample, with those inside of loops.
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
    """The slots through which derivatives of the output by layers and parameters flow.

    Attributes:
        slots: slots that depend on a layer's output or on one of the parameters that are in no
            layer, and that the output depends on, differentiably both.
        layers: numbers of the layers that the output depends on.
        parameters: parameters in no layer that the output depends on.
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
    """The segments in the order in which they run: once, a head if it is faster, a tail.

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
    """The first step of the tail, the dense layers at the end; 0 if a tail is not faster."""
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
    """Bytes that a step writes."""
    written = sum(_size(aval) for aval in step.avals)
    if step.loop is None:
        return written
    return written + step.loop.length * sum(map(_bytes, step.loop.body.steps))


def _size(aval: Any) -> int:
    return math.prod(aval.shape) * getattr(aval.dtype, "itemsize", 4)
