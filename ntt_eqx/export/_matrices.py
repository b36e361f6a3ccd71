"""Each masked weight as a sparse array of JAX or SciPy."""

from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np

from .._sparse import SparseModel
from ._arrays import named_masks

if TYPE_CHECKING:
    from jax.experimental.sparse import BCOO
    from scipy.sparse import csr_array


def to_bcoo(sparse: SparseModel) -> dict[str, "BCOO"]:
    """Every masked weight as a `jax.experimental.sparse.BCOO` of its own shape.

    **Arguments:**

    - `sparse`: a `SparseModel` whose mask is known (not inside `jit`).

    **Returns:**

    One array for each masked weight, by its name (`layers.0.weight`), with one entry for each
    kept weight, in row-major order, whatever its value.
    """
    from jax.experimental.sparse import BCOO

    arrays = {}
    for name, weight, mask in named_masks("to_bcoo", sparse):
        entries = np.argwhere(mask).astype(np.int32)
        arrays[name] = BCOO(
            (jnp.asarray(weight[mask]), jnp.asarray(entries)),
            shape=weight.shape,
            indices_sorted=True,
            unique_indices=True,
        )
    return arrays


def to_csr(sparse: SparseModel) -> dict[str, "csr_array"]:
    """Every masked weight as a `scipy.sparse.csr_array`, one row for each output feature.

    **Arguments:**

    - `sparse`: a `SparseModel` whose mask is known (not inside `jit`).

    **Returns:**

    One matrix for each masked weight, by its name (`layers.0.weight`), with one entry for each
    kept weight, whatever its value. A weight with more than two axes, such as that of a
    convolution `[O, I, H, W]`, is a matrix `[O, I H W]`; one with a single axis is one row.
    """
    from scipy.sparse import csr_array

    matrices = {}
    for name, weight, mask in named_masks("to_csr", sparse):
        rows = len(weight) if weight.ndim > 1 else 1
        flat = mask.reshape(rows, -1)
        counts = np.concatenate([[0], np.cumsum(flat.sum(axis=1))])
        columns = np.nonzero(flat)[1]
        matrices[name] = csr_array((weight[mask], columns, counts), shape=flat.shape)
    return matrices
