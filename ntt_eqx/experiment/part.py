"""Training on the channels between which a mask lies, at the cost of these alone."""

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
from .._types import MaskTree
from ..data import Dataset
from .cells import Cell
from .images import StandardisedSplit
from .own import draws_in_training, find_method
from .pruning import sparsity_of

_LEAST_STEPS = 1000  # fewer take less time than to find the part


def inside(dynamic: DynamicSparsity, whole: MaskTree) -> DynamicSparsity:
    """The same changes of a mask, where the network is the part of its pattern alone."""
    sparsity = dynamic.sparsity
    assert isinstance(sparsity.pattern, FewChannels)
    pattern = sparsity.pattern.inside(whole)
    sparsity = Sparsity(sparsity.density, sparsity.scope, sparsity.allocation, pattern)
    return DynamicSparsity(sparsity, dynamic.refresh, dynamic.rewind)


def part_of(cell: Cell, start: SparseModel, images: Dataset, steps: int) -> Compacted | None:
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
    try:
        found = compact(widest, StandardisedSplit(images, images.train).first(1).x)
        small = found.take(start)
    except ValueError:  # a model that is another function once it is smaller
        return None
    kept = [sum(int(m.sum()) for m in each.masks if m is not None) for each in (start, small)]
    return found if kept[0] == kept[1] else None  # a mask from a file may lie elsewhere
