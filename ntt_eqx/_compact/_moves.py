"""Steps that merely move entries, carried out on arrays of anything."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from .._program import Step

MOVES = (
    "reshape", "transpose", "squeeze", "expand_dims", "broadcast_in_dim", "slice", "concatenate",
    "pad", "rev", "split", "copy",
)  # fmt: skip


def is_move(step: Step) -> bool:
    """Whether `move` can carry out a step."""
    if step.name == "pad":
        return all(low >= 0 and high >= 0 and mid == 0 for low, high, mid in _padding(step))
    if step.name == "reshape":
        return step.eqn.params.get("dimensions") is None and len(step.inputs) == 1
    return step.name in MOVES and (step.name != "broadcast_in_dim" or len(step.inputs) == 1)


def move(step: Step, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The outputs of a step whose operands are `arrays`, of any dtype."""
    params, first = step.eqn.params, arrays[0]
    if step.name in ("reshape", "squeeze", "expand_dims"):
        return [first.reshape(step.shape)]
    if step.name == "transpose":
        return [np.transpose(first, params["permutation"])]
    if step.name == "broadcast_in_dim":
        inner = [1] * len(step.shape)
        for axis, size in zip(params["broadcast_dimensions"], first.shape, strict=True):
            inner[axis] = size
        return [np.broadcast_to(first.reshape(inner), step.shape)]
    if step.name == "slice":
        steps = params["strides"] or (1,) * first.ndim
        bounds = zip(params["start_indices"], params["limit_indices"], steps, strict=True)
        return [first[tuple(slice(*bound) for bound in bounds)]]
    if step.name == "concatenate":
        return [np.concatenate(arrays, axis=params["dimension"])]
    if step.name == "pad":
        out = np.full(step.shape, arrays[1], first.dtype)
        inside = zip(_padding(step), first.shape, strict=True)
        out[tuple(slice(low, low + size) for (low, _, _), size in inside)] = first
        return [out]
    if step.name == "rev":
        return [np.flip(first, params["dimensions"])]
    if step.name == "split":
        return np.split(first, np.cumsum(params["sizes"])[:-1], axis=params["axis"])
    return [first]


def sources(step: Step, shapes: Sequence[tuple[int, ...]]) -> list[list[np.ndarray]]:
    """For each operand, where in it each entry of each output comes from; -1 for elsewhere."""
    found = []
    for chosen in range(len(shapes)):
        indices = [np.full(shape, -1) for shape in shapes]
        indices[chosen] = np.arange(int(np.prod(shapes[chosen], dtype=int))).reshape(shapes[chosen])
        found.append(move(step, indices))
    return found


def _padding(step: Step) -> Any:
    return step.eqn.params["padding_config"]
