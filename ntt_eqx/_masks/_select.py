"""Exact selection of the k highest scores, without a sort, in all layers at once."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt

# XLA on CPU sums over an axis of more than 32 entries in several passes, each a function of its
# own to compile.
_BLOCK = (32, 32)


def keep_highest(scores: Float[Array, " size"], count: Int[Array, ""]) -> Bool[Array, " size"]:
    """Mark exactly `count` entries: the highest scores, ties to the lowest index; see `select`."""
    return select(scores, count)[0]


def select(
    scores: Float[Array, " size"], count: Int[Array, ""], *, lenient: bool = False
) -> tuple[Bool[Array, " size"], Bool[Array, ""]]:
    """Mark exactly `count` entries, the highest scores, and return whether ties decided too many.

    `select_each` of one array.
    """
    return select_each([scores], [count], lenient=lenient)[0]


@functools.partial(jax.jit, static_argnames="lenient")
def select_each(
    scores: Sequence[Float[Array, "..."]], counts: Sequence[Any], *, lenient: bool = False
) -> list[tuple[Bool[Array, "..."], Bool[Array, ""]]]:
    """In each array mark exactly `count` entries, the highest scores; say where ties decided much.

    Bisection over the bits of the threshold: as many counting passes as the dtype has bits, where
    a sort of 235,200 floats takes 30 times as long on a CPU. Ties at the threshold, when there
    are more than fit, are settled by a second bisection, over the index; see `by_index` for how
    many may be settled so.

    One pair of loops serves all arrays, because XLA takes half a second to compile a pair: the
    arrays lie side by side in blocks, and each block has the threshold of its array.

    **Arguments:**

    - `scores`: float scores. `-0.0` equals `0.0`, a NaN is below everything.
    - `counts`: how many to keep of each, from 0 to its size; may be traced.
    - `lenient`: in one of many rounds of pruning; see `by_index`.

    **Returns:**

    For each array a boolean one with `count` entries `True`, and whether its scores cannot rank the
    entries.
    """
    found: list[Any] = [None] * len(scores)
    for dtype in dict.fromkeys(leaf.dtype for leaf in scores):
        chosen = [n for n, leaf in enumerate(scores) if leaf.dtype == dtype]
        wanted = jnp.stack([jnp.asarray(counts[n], jnp.int32) for n in chosen])
        alike = _select_alike([scores[n] for n in chosen], wanted, lenient)
        for n, marked in zip(chosen, alike, strict=True):
            found[n] = marked
    return found


def _select_alike(
    scores: list[Float[Array, "..."]], count: Int[Array, " arrays"], lenient: bool
) -> list[tuple[Bool[Array, "..."], Bool[Array, ""]]]:
    """`select_each` for arrays of one dtype."""
    sizes = [leaf.size for leaf in scores]
    blocks = [-(-size // math.prod(_BLOCK)) for size in sizes]
    keys = _in_blocks([order_keys(leaf.reshape(-1)) for leaf in scores], blocks)
    owner = np.repeat(np.arange(len(sizes), dtype=np.int32), blocks)
    owns = np.arange(len(sizes))[:, None] == owner
    # the index of each entry in its array
    first = np.concatenate([np.arange(many, dtype=np.int32) for many in blocks])
    within = lax.iota(jnp.int32, math.prod(_BLOCK)).reshape(1, *_BLOCK)
    index = (np.int32(math.prod(_BLOCK)) * first)[:, None, None] + within
    of_block = lambda values: values.at[owner].get(mode="promise_in_bounds")[:, None, None]
    how_many = lambda marks: jnp.sum(
        jnp.where(owns, jnp.sum(marks, axis=(1, 2), dtype=jnp.int32)[None], 0),
        axis=1,
        dtype=jnp.int32,
    )
    width = jnp.iinfo(keys.dtype).bits

    # the largest threshold t with #{keys >= t} >= count, found from its highest bit down; what
    # fills a block has the key 0, which is below each threshold that is tried
    def set_value_bit(i: Array, threshold: Array) -> Array:
        tried = threshold | lax.shift_left(keys.dtype.type(1), (width - 1 - i).astype(keys.dtype))
        return jnp.where(how_many(keys >= of_block(tried)) >= count, tried, threshold)

    threshold = lax.fori_loop(0, width, set_value_bit, jnp.zeros(len(sizes), keys.dtype))
    above = keys > of_block(threshold)
    ties = (keys == of_block(threshold)) & (index < of_block(jnp.asarray(sizes, jnp.int32)))
    lowest, highest = _infinities(scores[0].dtype)
    wanted, tied, finite = count - how_many(above), how_many(ties), how_many(keys > lowest)

    # the largest bound b with #{ties at an index < b} <= wanted
    index_width = max(sizes).bit_length()

    def set_index_bit(i: Array, bound: Array) -> Array:
        tried = bound | lax.shift_left(jnp.int32(1), (index_width - 1 - i).astype(jnp.int32))
        return jnp.where(how_many(ties & (index < of_block(tried))) <= wanted, tried, bound)

    bound = lax.cond(
        jnp.any(tied > wanted),
        lambda: lax.fori_loop(0, index_width, set_index_bit, jnp.zeros(len(sizes), jnp.int32)),
        lambda: jnp.asarray(sizes, jnp.int32),
    )
    marks = (above | (ties & (index < of_block(bound)))).reshape(-1)
    left = tied - wanted
    is_open = (wanted > 0) & (left > 0)
    decided = jnp.minimum(wanted, left) if lenient else tied
    # `by_index` of the counts: all ties have the key of the threshold
    separated = finite - jnp.where(threshold > lowest, tied, 0)
    endless = (threshold <= lowest) | (threshold >= highest)
    unranked = is_open & ((decided > separated) | endless)
    starts = np.cumsum([0, *blocks]) * math.prod(_BLOCK)
    return [
        (marks[start : start + leaf.size].reshape(leaf.shape), unranked[n])
        for n, (start, leaf) in enumerate(zip(starts, scores, strict=False))
    ]


def _in_blocks(arrays: list[Array], blocks: list[int]) -> Array:
    """The arrays one behind the other in a `[blocks, *_BLOCK]`, each filled up with zeros."""
    parts = []
    for array, count in zip(arrays, blocks, strict=True):
        missing = count * math.prod(_BLOCK) - array.size
        parts += [array, jnp.zeros(missing, array.dtype)] if missing else [array]
    return jnp.concatenate(parts).reshape(sum(blocks), *_BLOCK)


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
