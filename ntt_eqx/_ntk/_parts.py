"""Cut a program in two: a head that is run for few samples at a time, and a tail for all at once.

What a convolution computes for one sample fills a core's cache, so samples are taken one after the
other. A dense layer is the opposite: its weights are large and its activations small, and for one
sample at a time the weights (and in a gradient, their running sums) are read and written once a
sample. A convolutional network with dense layers at its end is both.
"""

import dataclasses

from ._costs import costs
from ._layers import Layer
from ._program import Const, Program


@dataclasses.dataclass(frozen=True)
class Parts:
    """The steps of a program in two parts.

    Attributes:
        head: steps to run first, few samples at a time; none if there is no cut.
        tail: all others. Steps that only read parameters may stand in both.
        carried: slots that the head writes and the tail (or the output) reads.
    """

    head: tuple[int, ...]
    tail: tuple[int, ...]
    carried: tuple[int, ...]


def split(program: Program, layers: list[Layer]) -> Parts:
    """Cut `program` before its last dense layers, where that is worth it."""
    everything = tuple(range(len(program.steps)))
    many = [layer for layer in layers if layer.positions > 1]
    last = max((layer.step for layer in many), default=-1)
    dense = [layer for layer in layers if layer.positions == 1 and layer.step > last]
    flops = sum(2 * la.groups * la.features * la.inputs * la.positions for la in many)
    weights = sum(layer.features * layer.inputs for layer in dense)
    if not many or weights * costs().flops_per_weight < flops:
        return Parts((), everything, ())
    cut = min(layer.step for layer in dense)
    pure = _of_parameters_alone(program)
    head = everything[:cut]
    tail = tuple(index for index in everything if index >= cut or index in pure)
    written = {slot for i in head if i not in pure for slot in program.steps[i].outputs}
    read = {slot for i in tail for slot in _slots(program.steps[i].inputs)}
    read |= set(_slots((program.output,)))
    return Parts(head, tail, tuple(sorted(written & read)))


def _of_parameters_alone(program: Program) -> set[int]:
    """Steps that do not depend on the sample: a weight that is reshaped, for example."""
    sample = len(program.params)
    varying, found = {sample}, set()
    for index, step in enumerate(program.steps):
        if any(slot in varying for slot in _slots(step.inputs)):
            varying.update(step.outputs)
        else:
            found.add(index)
    return found


def _slots(inputs: tuple[object, ...]) -> list[int]:
    return [slot for slot in inputs if not isinstance(slot, Const)]  # pyright: ignore
