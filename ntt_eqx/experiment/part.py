"""Transfer and training on the channels between which a mask lies, at the cost of these alone."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .. import (
    Compacted,
    CoupledChannels,
    DynamicSparsity,
    FewChannels,
    SparseModel,
    Sparsity,
    compact,
    sparsify,
)
from .._types import MaskTree, PyTree
from ..data import Dataset
from .cells import Cell
from .images import StandardisedSplit
from .own import draws_in_training, find_method
from .pruning import sparsity_of

_LEAST_STEPS = 1000  # a training of fewer takes less time than to find the part


def inside(sparsity: Sparsity, whole: MaskTree, part: Compacted) -> Sparsity:
    """The same sparsity for a network that is the part of its pattern alone."""
    assert isinstance(sparsity.pattern, FewChannels)
    pattern = sparsity.pattern.inside(whole, part.model.mask)
    return Sparsity(sparsity.density, sparsity.scope, sparsity.allocation, pattern)


def dynamic_inside(dynamic: DynamicSparsity, whole: MaskTree, part: Compacted) -> DynamicSparsity:
    """The same changes of a mask, where the network is the part of its pattern alone."""
    return DynamicSparsity(inside(dynamic.sparsity, whole, part), dynamic.refresh, dynamic.rewind)


def part_in_transfer(cell: Cell, teacher: PyTree, images: Dataset) -> Compacted | None:
    """The part of `teacher` that the student of a transfer is, `None` where it is the whole.

    To the active kernel and the outputs it makes no difference, up to rounding. The ambient kernel
    of the whole network has the masked weights from channels outside of the part, too.
    """
    sparsity = sparsity_of(cell, teacher, images.input_shape)
    if not isinstance(sparsity.pattern, FewChannels):
        return None
    dense = sparsify(teacher)
    return _found(dense.with_mask(sparsity.widest(dense.mask)), images)


def part_in_training(
    cell: Cell, start: SparseModel, images: Dataset, steps: int
) -> Compacted | None:
    """The part of the network `start` that its pattern leaves, `None` where training needs all.

    Channels outside of the part have no weights to or from them and get no gradient, so that its
    training is that of the whole network to rounding; where weights grow at random, others do.
    """
    if steps < _LEAST_STEPS or cell.mask is None or cell.mask.pattern is None:
        return None
    if draws_in_training(cell.model, start.model):  # it would draw other numbers
        return None
    sparsity = sparsity_of(cell, start.model, images.input_shape)
    if isinstance(sparsity.pattern, FewChannels):
        widest = start.with_mask(sparsity.widest(sparsify(start.model).mask))
    elif isinstance(sparsity.pattern, CoupledChannels) and find_method(cell.method).dynamic is None:
        widest = start
    else:
        return None
    found = _found(widest, images)
    if found is None:
        return None
    small = found.take(start)
    kept = [sum(int(m.sum()) for m in each.masks if m is not None) for each in (start, small)]
    return found if kept[0] == kept[1] else None  # a mask from a file may lie elsewhere


def whole_of(part: Compacted | None, small: SparseModel, start: SparseModel) -> SparseModel:
    """The whole network whose part is `small`, all else as in `start`; `small` without a part."""
    if part is None:
        return small
    empty = jax.tree.map(jnp.zeros_like, start.mask)
    return part.expand(small, start.with_mask(empty))


def densities_of_whole(
    part: SparseModel, whole: SparseModel
) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """A map of rows of metrics of the part to rows whose densities are those of the whole."""
    sizes = [sum(mask.size for mask in jax.tree.leaves(each.mask)) for each in (part, whole)]

    def of_whole(values: Any) -> Any:
        if not isinstance(values, Mapping) or "density" not in values:
            return values
        return {**values, "density": values["density"] * sizes[0] / sizes[1]}

    return lambda row: {name: of_whole(values) for name, values in row.items()}


def _found(widest: SparseModel, images: Dataset) -> Compacted | None:
    """The part, `None` where the smaller model is another function or has constants in biases."""
    try:
        found = compact(widest, StandardisedSplit(images, images.train).first(1).x)
    except ValueError:
        return None
    return None if found.folded else found
