"""Products with the entries of a `SortedIndex`; see `_products`."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from ..kernels import at
from ..kernels.manual_axes import like_varying
from ._sorted_index import BLOCK_ROWS, SortedIndex, SortedSide


def sorted_product(values: Array, x: Array, side: SortedSide) -> Array:
    """The product by one side, pass by pass: as many as the mask has, not as there is room for."""
    slots = values.at[side.entries].get(mode="fill", fill_value=0, wrap_negative_indices=False)
    blocks = -(-side.place.size // BLOCK_ROWS)

    def step(n: Array, y: Array) -> Array:
        block = at(side.blocks, n)
        total = lax.dynamic_index_in_dim(y, block, keepdims=False)
        for v, other in zip(_of(slots, n), _of(side.others, n), strict=True):
            total = total + v[:, None] * at(x, other)
        return lax.dynamic_update_index_in_dim(y, total, block, 0)

    y = like_varying(jnp.zeros((blocks, BLOCK_ROWS, x.shape[1]), x.dtype), [values, x, slots])
    y = lax.fori_loop(0, side.passes, step, y)
    return at(y.reshape(blocks * BLOCK_ROWS, x.shape[1]), side.place)


def sorted_sampled(y: Array, x: Array, index: SortedIndex) -> Array:
    """The sampled product, in the order of the slots of the rows."""
    side = index.rows
    blocks = -(-side.place.size // BLOCK_ROWS)
    rows = jnp.zeros((blocks * BLOCK_ROWS, y.shape[1]), y.dtype)
    rows = rows.at[side.place].set(y, mode="promise_in_bounds", unique_indices=True)
    rows = rows.reshape(blocks, BLOCK_ROWS, y.shape[1])
    # The sum over samples is a product with ones, as in `_sums_of_many`.
    ones = jnp.ones(x.shape[1], x.dtype)

    def step(n: Array, found: Array) -> Array:
        row = lax.dynamic_index_in_dim(rows, at(side.blocks, n), keepdims=False)
        products = row[None] * at(x, lax.dynamic_index_in_dim(side.others, n, keepdims=False))
        sums = jnp.dot(products, ones, precision=lax.Precision.HIGHEST)
        return lax.dynamic_update_index_in_dim(found, sums, n, 0)

    found = like_varying(jnp.zeros(side.others.shape, x.dtype), [y, x, side.others])
    return lax.fori_loop(0, side.passes, step, found).reshape(-1)


def _of(array: Array, n: Array) -> Array:
    return lax.dynamic_index_in_dim(array, n, keepdims=False)
