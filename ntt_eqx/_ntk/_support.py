"""Where a mask's kept weights are: found once a mask, used by every kernel under it."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from .._masks._collapse import is_traced
from .._sparse import SparseModel
from ._costs import costs


def support_of(model: PyTree, kernel: str) -> PyTree | None:
    """The support that `ntk` uses: that of a concrete mask, for the active kernel."""
    if not isinstance(model, SparseModel) or kernel != "active" or is_traced(model.mask):
        return None
    return mask_support(model.mask, bucketed=True)


def mask_support(mask: PyTree, *, bucketed: bool = False) -> PyTree:
    """The flat indices of each concrete mask's `True` entries, ascending; `None` if they are many.

    **Arguments:**

    - `bucketed`: fill up to one of few lengths (by an index one past the end), so that masks with
      about as many entries compile only once.
    """

    def indices(m):
        found = np.flatnonzero(np.asarray(m)).astype(np.int32)
        if len(found) > costs().gathered_density * m.size:
            return None
        length = len(found)
        if bucketed:
            length = int(1.25 ** math.ceil(math.log(max(length, 16), 1.25))) + 1
        return jnp.asarray(np.pad(found, (0, length - len(found)), constant_values=m.size))

    return jax.tree.map(indices, mask)


def refresh_support(mask: PyTree, support: PyTree) -> PyTree:
    """The support of a new mask with as many `True` entries as the old one; works under `jit`."""

    def indices(m, old):
        if old is None:
            return None
        return jnp.nonzero(m.reshape(-1), size=len(old), fill_value=m.size)[0].astype(old.dtype)

    return jax.tree.map(indices, mask, support, is_leaf=lambda leaf: leaf is None)
