"""Rescaled weights: the variance of a dense network for a sparse one."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .._sparse import SparseModel, map_masked


def rescale_by_density(sparse: SparseModel) -> SparseModel:
    """Divide the prunable weights of every layer by the square root of that layer's density.

    Keeps the variance of the pre-activations at what it was before random pruning. A layer with
    no weight left stays as it is.

    **Arguments:**

    - `sparse`: the initial sparse model.

    **Returns:**

    The same mask over rescaled weights.
    """

    def rescale(w: Float[Array, "*s"], m: Bool[Array, "*s"]) -> Float[Array, "*s"]:
        density = jnp.mean(m, dtype=jnp.float32)
        return w * jax.lax.rsqrt(jnp.where(density > 0, density, 1.0)).astype(w.dtype)

    return SparseModel(map_masked(rescale, sparse.model, sparse.mask), sparse.mask)
