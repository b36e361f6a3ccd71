"""Where a mask's kept weights are: what makes the kernel of a sparse model cheap.

Shapes must be static, so that a program which is compiled for masks that change holds the places
of their entries in arrays of a fixed length. Such a support is only ever a cache: whoever uses it
checks it against the mask in use (`checked_support`), and no kernel is of another mask.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, PyTree

from .._sparse import count_kept
from ..kernels import GatheredRows, gather_rows, target_device
from ._costs import costs_on


class Whole(eqx.Module):
    """The support of a mask that keeps every weight, which is as if there were none."""


def mask_support(
    mask: PyTree, *, bucketed: bool = False, heights: Callable[[Any], int] = lambda m: 1
) -> PyTree:
    """The `GatheredRows` of each concrete mask's `True` entries; `Whole` of all, `None` of many.

    A mask of more than two axes has the rows that it has with all axes after the first as one.

    **Arguments:**

    - `bucketed`: with room for one of few numbers of entries, so that masks with about as many
      compile only once.
    - `heights`: so many outputs of a mask are alike, from the first on, and one stands for all;
      used for dense layers, whose `u` depends on the mask's row alone.
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
    """The support of a new mask that fits where the old one's is; works under `jit`."""
    refreshed = lambda m, old: old.of(_matrix(m)) if isinstance(old, GatheredRows) else old
    return jax.tree.map(refreshed, mask, support, is_leaf=is_support)


def fits_support(mask: Any, support: GatheredRows | Whole | None) -> bool:
    """Whether the support of one mask can be made that of another, which is concrete."""
    if support is None:
        return True
    if isinstance(support, Whole):
        return bool(jnp.all(mask))
    rows, matrix = support, _matrix(mask)
    return bool(rows.fits(matrix, count_kept(rows.of_stored(matrix))))


def is_support(leaf: Any) -> bool:
    """Whether a leaf of a support is one, `None` included."""
    return isinstance(leaf, GatheredRows | Whole | Checked | None)


class Unchecked(eqx.Module):
    """A support that may be out of date, and the mask in use.

    Attributes:
        rows: the entries of that mask or of another one.
        mask: the mask.
    """

    rows: GatheredRows
    mask: Bool[Array, "..."]


class UncheckedWhole(eqx.Module):
    """That the mask in use keeps every weight, which may be out of date.

    Attributes:
        mask: the mask.
    """

    mask: Bool[Array, "..."]


class Checked(eqx.Module):
    """A support that was compared with the mask in use.

    Attributes:
        rows: the mask's entries.
        fits: whether that is possible.
        mask: the mask.
    """

    rows: GatheredRows
    fits: Bool[Array, ""]
    mask: Bool[Array, "..."]


def unchecked(
    support: Any, mask: Bool[Array, "..."] | None
) -> Checked | Unchecked | UncheckedWhole | None:
    """What a support that may be out of date says of the mask in use, where there is one.

    A support that was checked against this very array needs no second check. For any other array,
    whatever its values, it may be out of date.
    """
    if mask is None:
        return None
    if isinstance(support, Checked):
        return support if support.mask is mask else Unchecked(support.rows, mask)
    if isinstance(support, GatheredRows):
        return Unchecked(support, mask)
    return UncheckedWhole(mask) if isinstance(support, Whole) else None


def keeps_all(known: Any) -> bool:
    """Whether a mask is said to keep every weight."""
    return isinstance(known, Whole | UncheckedWhole)


def lost_unless_whole(weight: Array, known: Any) -> Array:
    """A weight, NaN where its mask is said to keep all of it and does not."""
    if not isinstance(known, UncheckedWhole):
        return weight
    return jnp.where(jnp.all(known.mask), weight, jnp.full_like(weight, jnp.nan))


def checked_support(support: Sequence[Any]) -> list[Any]:
    """A support of exactly the masks in use.

    **Arguments:**

    - `support`: some `Unchecked`, among others that are left as they are.

    **Returns:**

    A `Checked` for each `Unchecked`: what was given where all of it is right, and otherwise
    everything found anew. Where a mask has more entries than there is room for, or rows that are
    not alike where they should be, `fits` is false, and whoever uses it makes the kernel NaN: an
    exception would need a callback, which costs every step a fifth of its time on a CPU, and makes
    an accelerator wait for the host.
    """
    pairs = [(s.rows, _matrix(s.mask)) for s in support if isinstance(s, Unchecked)]
    if not pairs:
        return list(support)
    counts = [count_kept(rows.of_stored(mask)) for rows, mask in pairs]
    right = [rows.holds(mask, c) for (rows, mask), c in zip(pairs, counts, strict=True)]
    fits = [rows.fits(mask, c) for (rows, mask), c in zip(pairs, counts, strict=True)]
    found = jax.lax.cond(
        functools.reduce(jnp.logical_and, right),
        lambda: [rows for rows, _ in pairs],
        lambda: [rows.of(mask) for rows, mask in pairs],
    )
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


def _matrix(mask: Any) -> Any:
    rows = mask.shape[0] if mask.ndim > 1 else 1
    return mask.reshape(rows, mask.size // max(rows, 1))
