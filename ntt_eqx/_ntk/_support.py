"""The indices of a mask's kept weights, which make the kernel of a sparse model cheap.

Shapes are static, so a program that is compiled for masks that change stores these indices in
arrays of fixed length. The indices (the "support") are a cache: every use compares them with the
current mask and rebuilds them where they differ (`checked_support`).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, PyTree

from .._sparse import count_kept
from ..kernels import (
    GatheredRows,
    MaskBits,
    gather_each,
    gather_rows,
    hold_each,
    target_device,
)
from ._costs import costs_on


class Whole(eqx.Module):
    """The support of a mask that keeps every weight. The kernel then ignores the mask."""


def mask_support(
    mask: PyTree, *, bucketed: bool = False, heights: Callable[[Any], int] = lambda m: 1
) -> PyTree:
    """Index the `True` entries of each concrete mask, as `GatheredRows`.

    A mask that keeps everything gives `Whole`; one that keeps too many weights for gathering to be
    faster gives `None`. The rows of a mask run over its first axis, with all others flattened.

    **Arguments:**

    - `bucketed`: round the capacity up to one of few values, so that masks with similar counts
      share one compiled program.
    - `heights`: number of consecutive rows of a mask that are equal, of which one is stored. Used
      for dense layers, whose `u` depends on the mask's row alone.
    """
    few = costs_on(target_device()).gathered_density

    def places(m):
        values = np.asarray(m)
        room = int(np.count_nonzero(values))
        if room == values.size:  # one without entries, too
            return Whole()
        if room > few * values.size:
            return None
        height = heights(m) if m.ndim == 2 else 1
        if height > 1:
            room = int(np.count_nonzero(values[::height]))
        if bucketed:
            room = int(1.25 ** math.ceil(math.log(max(room, 16), 1.25))) + 1
        return gather_rows(_matrix(values), room, height=height)

    return jax.tree.map(places, mask)


def refresh_support(mask: PyTree, support: PyTree) -> PyTree:
    """The support of a new mask, in arrays of the old support's shapes; works under `jit`."""
    leaves, treedef = jax.tree.flatten(support, is_leaf=is_support)
    masks = treedef.flatten_up_to(mask)
    pairs = [
        (s, _matrix(m)) for s, m in zip(leaves, masks, strict=True) if isinstance(s, GatheredRows)
    ]
    if not pairs:
        return support
    found = iter(gather_each([rows for rows, _ in pairs], _stored_bits(pairs))[0])
    new = [next(found) if isinstance(s, GatheredRows) else s for s in leaves]
    return treedef.unflatten(new)


def fits_support(mask: Any, support: GatheredRows | Whole | None) -> bool:
    """Whether a concrete mask can be stored in the shapes of this support."""
    if support is None:
        return True
    if isinstance(support, Whole):
        return bool(jnp.all(mask))
    rows, matrix = support, _matrix(mask)
    return bool(rows.fits(matrix, count_kept(rows.of_stored(matrix))))


def is_support(leaf: Any) -> bool:
    """Whether `leaf` is the support of one mask (or `None`); for `is_leaf`."""
    return isinstance(leaf, GatheredRows | Whole | Checked | None)


class Unchecked(eqx.Module):
    """A support that may be stale, with the current mask.

    Attributes:
        rows: indices of this mask or of an earlier one.
        mask: the current mask.
    """

    rows: GatheredRows
    mask: Bool[Array, "..."]


class UncheckedWhole(eqx.Module):
    """The claim that a mask keeps every weight, which may be stale.

    Attributes:
        mask: the current mask.
    """

    mask: Bool[Array, "..."]


class Checked(eqx.Module):
    """A support that matches the current mask.

    Attributes:
        rows: indices of the mask's entries.
        fits: whether they could be stored; if not, the kernel is NaN.
        mask: the mask.
    """

    rows: GatheredRows
    fits: Bool[Array, ""]
    mask: Bool[Array, "..."]


def unchecked(
    support: Any, mask: Bool[Array, "..."] | None
) -> Checked | Unchecked | UncheckedWhole | None:
    """Pair a support that may be stale with the current mask.

    A support that was checked against this very array needs no second check. For any other array,
    whatever its values, it may be stale.
    """
    if mask is None:
        return None
    if isinstance(support, Checked):
        return support if support.mask is mask else Unchecked(support.rows, mask)
    if isinstance(support, GatheredRows):
        return Unchecked(support, mask)
    return UncheckedWhole(mask) if isinstance(support, Whole) else None


def keeps_all(known: Any) -> bool:
    """Whether this support claims that its mask keeps every weight."""
    return isinstance(known, Whole | UncheckedWhole)


def lost_unless_whole(weight: Array, known: Any) -> Array:
    """The weight; NaN if its support claims that the mask keeps everything and it does not."""
    if not isinstance(known, UncheckedWhole):
        return weight
    return jnp.where(jnp.all(known.mask), weight, jnp.full_like(weight, jnp.nan))


def checked_support(support: Sequence[Any]) -> list[Any]:
    """Compare supports with the current masks, and rebuild all of them if one is stale.

    **Arguments:**

    - `support`: `Unchecked` entries are checked; all others are returned as they are.

    **Returns:**

    A `Checked` for each `Unchecked`. If a mask has more entries than the capacity, or rows that
    differ where the pattern says that they are equal, `fits` is false and the kernel becomes NaN.
    """
    # NaN instead of an exception: `eqx.error_if` needs a callback, which costs every step a fifth
    # of its time on a CPU and makes an accelerator wait for the host.
    pairs = [(s.rows, _matrix(s.mask)) for s in support if isinstance(s, Unchecked)]
    if not pairs:
        return list(support)
    supports, bits = [rows for rows, _ in pairs], _stored_bits(pairs)
    found, room = jax.lax.cond(
        hold_each(supports, bits),
        lambda: (supports, jnp.ones(len(pairs), bool)),
        lambda: gather_each(supports, bits),
    )
    fits = [rows.alike(mask) & room[n] for n, (rows, mask) in enumerate(pairs)]
    found, fits = iter(found), iter(fits)
    one = lambda s: Checked(next(found), next(fits), s.mask)
    return [one(s) if isinstance(s, Unchecked) else s for s in support]


def check_support(mask: PyTree, support: PyTree) -> PyTree:
    """The support of one tree of masks, checked against another: `checked_support` of trees."""
    leaves, treedef = jax.tree.flatten(support, is_leaf=is_support)
    masks = treedef.flatten_up_to(mask)
    pairs = zip(leaves, masks, strict=True)
    known = [Unchecked(s, m) if isinstance(s, GatheredRows) else s for s, m in pairs]
    return treedef.unflatten(checked_support(known))


def found_support(support: PyTree) -> PyTree:
    """A support without what its check says, to be kept for another mask."""
    rows = lambda s: s.rows if isinstance(s, Checked) else s
    return jax.tree.map(rows, support, is_leaf=is_support)


def _stored_bits(pairs: Sequence[tuple[GatheredRows, Array]]) -> MaskBits:
    return MaskBits.of([rows.of_stored(mask) for rows, mask in pairs])


def _matrix(mask: Any) -> Any:
    rows = mask.shape[0] if mask.ndim > 1 else 1
    return mask.reshape(rows, mask.size // max(rows, 1))
