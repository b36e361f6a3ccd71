"""Exact selection of the k highest scores, without a sort."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt


def keep_highest(scores: Float[Array, " size"], count: Int[Array, ""]) -> Bool[Array, " size"]:
    """Mark exactly `count` entries: the highest scores, ties to the lowest index; see `select`."""
    return select(scores, count)[0]


@functools.partial(jax.jit, static_argnames="lenient")
def select(
    scores: Float[Array, " size"], count: Int[Array, ""], *, lenient: bool = False
) -> tuple[Bool[Array, " size"], Bool[Array, ""]]:
    """Mark exactly `count` entries, the highest scores, and return whether ties decided too many.

    Bisection over the bits of the threshold: as many counting passes as the dtype has bits, where
    a sort of 235,200 floats takes 30 times as long on a CPU. Ties at the threshold, when there
    are more than fit, are settled by a second bisection, over the index; see `by_index` for how
    many may be settled so.

    **Arguments:**

    - `scores`: float scores. `-0.0` equals `0.0`, a NaN is below everything.
    - `count`: how many to keep, from 0 to `size`; may be traced.
    - `lenient`: in one of many rounds of pruning; see `by_index`.

    **Returns:**

    A boolean array with `count` entries `True`, and whether the scores cannot rank the entries.
    """
    keys = order_keys(scores)
    width = jnp.iinfo(keys.dtype).bits
    count = count.astype(jnp.int32)

    # the largest threshold t with #{keys >= t} >= count, found from its highest bit down
    def set_value_bit(i: Array, threshold: Array) -> Array:
        bit = lax.shift_left(keys.dtype.type(1), (width - 1 - i).astype(keys.dtype))
        return jnp.where(_how_many(keys >= (threshold | bit)) >= count, threshold | bit, threshold)

    threshold = lax.fori_loop(0, width, set_value_bit, keys.dtype.type(0))
    above, ties = keys > threshold, keys == threshold
    wanted = count - _how_many(above)

    # the largest bound b with #{ties at an index < b} <= wanted
    index = lax.iota(jnp.int32, keys.size)
    index_width = keys.size.bit_length()

    def set_index_bit(i: Array, bound: Array) -> Array:
        bit = lax.shift_left(jnp.int32(1), (index_width - 1 - i).astype(jnp.int32))
        fits = _how_many(ties & (index < (bound | bit))) <= wanted
        return jnp.where(fits, bound | bit, bound)

    bound = lax.cond(
        _how_many(ties) > wanted,
        lambda: lax.fori_loop(0, index_width, set_index_bit, jnp.int32(0)),
        lambda: jnp.int32(keys.size),
    )
    marks = above | (ties & (index < bound))
    tied = _how_many(ties)
    left = tied - wanted
    is_open = (wanted > 0) & (left > 0)
    decided = jnp.minimum(wanted, left) if lenient else tied
    unranked = by_index(keys, ties & is_open, jnp.where(is_open, decided, 0), scores.dtype)
    return marks, unranked


def by_index(
    keys: UInt[Array, "*shape"], ties: Bool[Array, "*shape"], decided: Int[Array, ""], dtype: Any
) -> Bool[Array, ""]:
    """Whether ties, broken by index, decide more entries than the scores separate.

    Ties are open where some of the entries equal to a threshold are kept and others dropped. A few
    are harmless: equal magnitudes in 16 bits, units that no example reaches. Scores cannot rank

    - where more entries are open ties than lie above or below the threshold (entries at `-inf`,
      which are barred, do not count), or
    - where an open tie is at infinity or NaN, which say nothing of an order.

    In one of many rounds of pruning, entries without a score go first, in whatever order. There the
    index decides as many entries as it keeps of the ties, or as it drops, whichever are fewer.

    **Arguments:**

    - `keys`: of `order_keys`.
    - `ties`: the open ties.
    - `decided`: how many entries the index decides.
    - `dtype`: of the scores.
    """
    lowest, highest = _infinities(dtype)
    separated = _how_many((keys > lowest) & ~ties)
    endless = jnp.any(ties & ((keys <= lowest) | (keys >= highest)))
    return (decided > separated) | endless


def _infinities(dtype: Any) -> tuple[Any, Any]:
    """`order_keys` of minus and plus infinity, worked out on the host."""
    width = jnp.finfo(dtype).bits
    unsigned = np.dtype(f"uint{width}").type
    infinity = np.asarray(np.inf, dtype).view(unsigned)[()] | unsigned(1 << (width - 1))
    return ~infinity, infinity


def order_keys(scores: Float[Array, "*shape"]) -> UInt[Array, "*shape"]:
    """Unsigned integers in the order of the scores: `-0.0` equal to `0.0`, NaN lowest."""
    width = jnp.finfo(scores.dtype).bits
    unsigned = jnp.dtype(f"uint{width}").type
    bits = lax.bitcast_convert_type(scores, unsigned)
    sign = unsigned(1 << (width - 1))
    infinity = lax.bitcast_convert_type(jnp.asarray(jnp.inf, scores.dtype), unsigned)
    magnitude = bits & ~sign
    negative = (bits & sign != unsigned(0)) & (magnitude != unsigned(0))
    keys = jnp.where(negative, ~bits, magnitude | sign)
    return jnp.where(magnitude > infinity, unsigned(0), keys)


def _how_many(marks: Bool[Array, "..."]) -> Int[Array, ""]:
    return jnp.sum(marks, dtype=jnp.int32)
