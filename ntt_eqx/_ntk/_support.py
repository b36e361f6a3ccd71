"""Where a mask's kept weights are: what makes the kernel of a sparse model cheap.

Shapes must be static, so that a program which is compiled for masks that change holds the indices
of their entries in arrays of a fixed length. Such a support is only ever a cache: whoever uses it
checks it against the mask in use (`checked_support`), and no kernel is of another mask.
"""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, PyTree

from ..kernels import target_device
from ._costs import costs_on


def mask_support(mask: PyTree, *, bucketed: bool = False) -> PyTree:
    """The flat indices of each concrete mask's `True` entries, ascending; `None` if they are many.

    **Arguments:**

    - `bucketed`: fill up to one of few lengths (by an index one past the end), so that masks with
      about as many entries compile only once.
    """
    few = costs_on(target_device()).gathered_density

    def indices(m):
        found = np.flatnonzero(np.asarray(m)).astype(np.int32)
        if len(found) > few * m.size:
            return None
        length = len(found)
        if bucketed:
            length = int(1.25 ** math.ceil(math.log(max(length, 16), 1.25))) + 1
        return jnp.asarray(np.pad(found, (0, length - len(found)), constant_values=m.size))

    return jax.tree.map(indices, mask)


def refresh_support(mask: PyTree, support: PyTree) -> PyTree:
    """The support of a new mask with as many `True` entries as the old one; works under `jit`."""
    refreshed = lambda m, old: None if old is None else _found(m, old)
    return jax.tree.map(refreshed, mask, support, is_leaf=lambda leaf: leaf is None)


class Checked(eqx.Module):
    """A support that was compared with the mask in use.

    Attributes:
        indices: flat indices of the mask's entries, ascending, filled up with one past the end.
        fits: whether there is room for all of them.
    """

    indices: Int[Array, " nonzeros"]
    fits: Bool[Array, ""]

    def __len__(self) -> int:
        return len(self.indices)


def checked_support(masks: list[Any], support: list[Any]) -> list[Any]:
    """A support of exactly the masks in use, from one that may be out of date.

    **Arguments:**

    - `masks`: boolean arrays, or `None`.
    - `support`: for each of them its `mask_support` or that of another mask, or `None`.

    **Returns:**

    A `Checked` for each: what was given where it is right, and otherwise the indices found anew.
    Where a mask has more entries than there is room for, `fits` is false, and whoever uses it makes
    the kernel NaN: an exception would need a callback, which costs every step a fifth of its time
    on a CPU, and makes an accelerator wait for the host.
    """
    pairs = zip(masks, support, strict=True)
    return [None if m is None or s is None else _checked(m, s) for m, s in pairs]


def _checked(mask: Bool[Array, "..."], indices: Int[Array, " nonzeros"]) -> Checked:
    flat, size = mask.reshape(-1), mask.size
    inside = indices < size
    held = flat.at[jnp.minimum(indices, size - 1)].get(mode="promise_in_bounds")
    ascends = jnp.all(indices[1:] > indices[:-1], where=inside[1:])
    count = _count(mask)
    right = jnp.all(held | ~inside) & ascends & (count == jnp.sum(inside, dtype=jnp.int32))
    found = jax.lax.cond(right, lambda: indices, lambda: _found(mask, indices))
    return Checked(found, count <= len(indices))


def _count(mask: Bool[Array, "..."]) -> Int[Array, ""]:
    """How many entries are `True`: first in bytes, 255 rows at a time, which a CPU adds up fast."""
    flat = mask.reshape(-1)
    even = flat.size - flat.size % 255
    bytes_ = jnp.sum(flat[:even].reshape(255, -1), axis=0, dtype=jnp.uint8)
    return jnp.sum(bytes_, dtype=jnp.int32) + jnp.sum(flat[even:], dtype=jnp.int32)


def _found(mask: Bool[Array, "..."], like: Int[Array, " nonzeros"]) -> Array:
    (places,) = jnp.nonzero(mask.reshape(-1), size=len(like), fill_value=mask.size)
    return places.astype(like.dtype)
