"""The indices of a mask's kept weights, which make the kernel of a sparse model cheap.

Shapes are static, so a program that is compiled for masks that change stores these indices in
arrays of fixed length. They are a cache: `index_masks` compares them with the current masks and
rebuilds them where they differ.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from .._sparse import count_kept
from .._types import PyTree
from ..kernels import GatheredRows, MaskBits, current_each, gather_rows
from ._costs import Costs


class MaskIndex(eqx.Module):
    """Where a mask keeps weights.

    An index answers for one array, its `mask`. A stored one has none, and answers for no mask
    before `index_masks` has compared it with one.

    Attributes:
        places: the kept weights; `None` if the mask keeps every weight.
        mask: the mask.
        fits: whether all kept weights could be stored; `None` if they were stored on the host,
            which always fits.
    """

    places: GatheredRows | None
    mask: Bool[Array, "..."] | None = None
    fits: Bool[Array, ""] | None = None


def index_concrete(
    mask: PyTree,
    costs: Costs,
    *,
    bucketed: bool = False,
    row_blocks: Callable[[Any], int] = lambda m: 1,
) -> PyTree:
    """The `MaskIndex` of each concrete mask; `None` where gathering could not be faster.

    The rows of a mask run over its first axis, with all others flattened.

    **Arguments:**

    - `costs`: of the device, for the density up to which gathering may be faster.
    - `bucketed`: round the capacity up to one of few values, so that masks with similar counts
      share one compiled program.
    - `row_blocks`: how many rows after one another a mask repeats, of which one is stored; used
      for dense layers, whose `u` depends on the mask's row alone.
    """

    def index(m):
        values = np.asarray(m)
        capacity = int(np.count_nonzero(values))
        if capacity == values.size:  # one without entries, too
            return MaskIndex(None, m)
        if capacity > costs.gathered_density * values.size:
            return None
        row_block = row_blocks(m) if m.ndim == 2 else 1
        if row_block > 1:
            capacity = int(np.count_nonzero(values[::row_block]))
        if bucketed:
            capacity = int(1.25 ** math.ceil(math.log(max(capacity, 16), 1.25))) + 1
        return MaskIndex(gather_rows(_matrix(values), capacity, row_block=row_block), m)

    return jax.tree.map(index, mask)


def index_masks(mask: PyTree, known: PyTree) -> PyTree:
    """The `MaskIndex` of each mask, from an earlier index of whatever mask; works under `jit`.

    An index of this very array is returned as it is. All others are compared with their masks, and
    all of these rebuilt if one differs. If a mask has more entries than the capacity, or rows that
    differ where its pattern says that they are equal, it does not fit.

    **Arguments:**

    - `known`: a tree of `MaskIndex` and `None`; `None` gives `None`.
    """
    leaves, treedef = jax.tree.flatten(known, is_leaf=is_index)
    masks = treedef.flatten_up_to(mask)
    found: list[Any] = list(leaves)
    stale = [
        n
        for n, (index, m) in enumerate(zip(leaves, masks, strict=True))
        if index is not None and index.mask is not m
    ]
    for n in stale:
        if leaves[n].places is None:
            found[n] = MaskIndex(None, masks[n], jnp.all(masks[n]))
    gathered = [n for n in stale if leaves[n].places is not None]
    places = _places_of([masks[n] for n in gathered], [leaves[n].places for n in gathered])
    for n, (of_mask, fits) in zip(gathered, places, strict=True):
        found[n] = MaskIndex(of_mask, masks[n], fits)
    return treedef.unflatten(found)


def _places_of(
    masks: Sequence[Array], known: Sequence[GatheredRows]
) -> list[tuple[GatheredRows, Bool[Array, ""]]]:
    """The entries of masks in arrays of known shapes, and whether they fit there."""
    if not masks:
        return []
    matrices = [_matrix(mask) for mask in masks]
    of_stored = [places.of_stored(m) for places, m in zip(known, matrices, strict=True)]
    found, room = current_each(known, MaskBits.of(of_stored))
    fits = [places.repeats_rows(m) for places, m in zip(found, matrices, strict=True)]
    return [(places, fits[n] & room[n]) for n, places in enumerate(found)]


def has_room(mask: Any, index: MaskIndex | None) -> bool:
    """Whether a concrete mask can be stored in the shapes of this index."""
    if index is None:
        return True
    if index.places is None:
        return bool(jnp.all(mask))
    matrix = _matrix(mask)
    return bool(index.places.fits(matrix, count_kept(index.places.of_stored(matrix))))


def stored(index: PyTree) -> PyTree:
    """The index without its masks, to be stored beside masks that change."""
    one = lambda index: None if index is None else MaskIndex(index.places)
    return jax.tree.map(one, index, is_leaf=is_index)


def is_index(leaf: Any) -> bool:
    """Whether `leaf` is the index of one mask (or `None`); for `is_leaf`."""
    return isinstance(leaf, MaskIndex | None)


def keeps_all(index: MaskIndex | None) -> bool:
    """Whether this is the index of a mask that keeps every weight."""
    return index is not None and index.places is None


def nan_unless_fit(index: Sequence[MaskIndex | None]) -> Array | None:
    """A factor for results that rely on these indices: 1 if all masks fit, else NaN.

    `None` where nothing can fail.
    """
    # NaN instead of an exception: `eqx.error_if` needs a callback, which costs every step a fifth
    # of its time on a CPU and makes an accelerator wait for the host.
    fits = [one.fits for one in index if one is not None and one.fits is not None]
    return jnp.where(jnp.all(jnp.stack(fits)), 1.0, jnp.nan) if fits else None


def _matrix(mask: Any) -> Any:
    rows = mask.shape[0] if mask.ndim > 1 else 1
    return mask.reshape(rows, mask.size // max(rows, 1))
