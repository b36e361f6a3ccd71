"""Exact selection of the k highest scores, without a sort, in all layers at once."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt

from .._distribute import is_sharded

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


def select_each(
    scores: Sequence[Float[Array, "..."]], counts: Sequence[Any], *, lenient: bool = False
) -> list[tuple[Bool[Array, "..."], Bool[Array, ""]]]:
    """In each array mark exactly `count` entries, the highest scores; say where ties decided much.

    Bisection over the bits of the threshold: as many counting passes as the dtype has bits, where
    a sort of 235,200 floats takes 30 times as long on a CPU. Ties at the threshold, when there
    are more than fit, are settled by a second bisection, over the index; see `by_index` for how
    many may be settled so.

    One pair of loops serves all arrays, because XLA takes half a second to compile a pair: the
    arrays lie side by side in blocks, and each block has the threshold of its array. An array that
    is sharded stays where it is, beside the blocks.

    **Arguments:**

    - `scores`: float scores. `-0.0` equals `0.0`, a NaN is below everything.
    - `counts`: how many to keep of each, from 0 to its size; may be traced.
    - `lenient`: in one of many rounds of pruning; see `by_index`.

    **Returns:**

    For each array a boolean one with `count` entries `True`, and whether its scores cannot rank the
    entries. A mask is sharded like its scores.
    """
    sharded = tuple(is_sharded(leaf) for leaf in scores)
    return _select_each(list(scores), list(counts), lenient, sharded)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _select_each(
    scores: list[Float[Array, "..."]], counts: list[Any], lenient: bool, sharded: tuple[bool, ...]
) -> list[tuple[Bool[Array, "..."], Bool[Array, ""]]]:
    found: list[Any] = [None] * len(scores)
    for dtype in dict.fromkeys(leaf.dtype for leaf in scores):
        chosen = [n for n, leaf in enumerate(scores) if leaf.dtype == dtype]
        wanted = jnp.stack([jnp.asarray(counts[n], jnp.int32) for n in chosen])
        alike = [scores[n] for n in chosen]
        marked = _select_alike(alike, wanted, lenient, [sharded[n] for n in chosen])
        for n, one in zip(chosen, marked, strict=True):
            found[n] = one
    return found


class _Entries(NamedTuple):
    """Entries of one or several arrays, and whose they are.

    Attributes:
        keys: the order of their scores: an array as it is, or blocks of several arrays. What fills
            a block has the key 0, which is below each threshold that is tried.
        index: the index of each in its array.
        owner: the array of each block; of an array as it is, its own number.
    """

    keys: Array
    index: Array
    owner: np.ndarray

    def of_owner(self, values: Array) -> Array:
        """To each entry the value of its array."""
        if self.owner.ndim == 0:
            return values[int(self.owner)]
        return values.at[self.owner].get(mode="promise_in_bounds")[:, None, None]

    def how_many(self, marks: Array, arrays: int) -> Int[Array, " arrays"]:
        """Marks of the entries of each of the `arrays` arrays."""
        owns = np.arange(arrays)[:, None] == np.atleast_1d(self.owner)
        axes = (1, 2) if self.owner.ndim else None
        sums = jnp.sum(marks, axis=axes, dtype=jnp.int32)
        return jnp.sum(jnp.where(owns, sums, 0), axis=1, dtype=jnp.int32)


def _select_alike(
    scores: list[Float[Array, "..."]],
    count: Int[Array, " arrays"],
    lenient: bool,
    sharded: list[bool],
) -> list[tuple[Bool[Array, "..."], Bool[Array, ""]]]:
    """`select_each` for arrays of one dtype."""
    together = [n for n, apart in enumerate(sharded) if not apart]
    groups = [_in_blocks(scores, together)] if together else []
    groups += [_as_it_is(scores[n], n) for n, apart in enumerate(sharded) if apart]
    sizes = jnp.asarray([leaf.size for leaf in scores], jnp.int32)
    key_of, width = groups[0].keys.dtype, jnp.iinfo(groups[0].keys.dtype).bits

    def how_many(marks: Callable[[_Entries], Array]) -> Int[Array, " arrays"]:
        counted = jnp.stack([g.how_many(marks(g), len(scores)) for g in groups])
        return jnp.sum(counted, axis=0, dtype=jnp.int32)

    # the largest threshold t with #{keys >= t} >= count, found from its highest bit down
    def set_value_bit(i: Array, threshold: Array) -> Array:
        tried = threshold | lax.shift_left(key_of.type(1), (width - 1 - i).astype(key_of))
        enough = how_many(lambda group: group.keys >= group.of_owner(tried)) >= count
        return jnp.where(enough, tried, threshold)

    threshold = lax.fori_loop(0, width, set_value_bit, jnp.zeros(len(scores), key_of))
    is_above = lambda group: group.keys > group.of_owner(threshold)
    is_tied = lambda group: (
        (group.keys == group.of_owner(threshold)) & (group.index < group.of_owner(sizes))
    )
    lowest, highest = _infinities(scores[0].dtype)
    wanted, tied = count - how_many(is_above), how_many(is_tied)
    finite = how_many(lambda group: group.keys > lowest)

    # the largest bound b with #{ties at an index < b} <= wanted
    index_width = max(leaf.size for leaf in scores).bit_length()

    def set_index_bit(i: Array, bound: Array) -> Array:
        tried = bound | lax.shift_left(jnp.int32(1), (index_width - 1 - i).astype(jnp.int32))
        within = how_many(lambda group: is_tied(group) & (group.index < group.of_owner(tried)))
        return jnp.where(within <= wanted, tried, bound)

    bound = lax.cond(
        jnp.any(tied > wanted),
        lambda: lax.fori_loop(0, index_width, set_index_bit, jnp.zeros(len(scores), jnp.int32)),
        lambda: sizes,
    )
    left = tied - wanted
    is_open = (wanted > 0) & (left > 0)
    decided = jnp.minimum(wanted, left) if lenient else tied
    # `by_index` of the counts: all ties have the key of the threshold
    separated = finite - jnp.where(threshold > lowest, tied, 0)
    endless = (threshold <= lowest) | (threshold >= highest)
    unranked = is_open & ((decided > separated) | endless)

    found: list[Any] = [None] * len(scores)
    for group in groups:
        marks = is_above(group) | (is_tied(group) & (group.index < group.of_owner(bound)))
        if group.owner.ndim == 0:
            found[int(group.owner)] = marks
            continue
        start, marks = 0, marks.reshape(-1)
        for n in together:
            found[n] = marks[start : start + scores[n].size].reshape(scores[n].shape)
            start += _blocks(scores[n]) * math.prod(_BLOCK)
    return [(marks, unranked[n]) for n, marks in enumerate(found)]


def _as_it_is(scores: Float[Array, "..."], owner: int) -> _Entries:
    index = jnp.zeros(scores.shape, jnp.int32)
    for axis in range(scores.ndim):
        step = np.int32(math.prod(scores.shape[axis + 1 :]))
        index += step * lax.broadcasted_iota(jnp.int32, scores.shape, axis)
    return _Entries(order_keys(scores), index, np.asarray(owner))


def _in_blocks(scores: list[Float[Array, "..."]], chosen: list[int]) -> _Entries:
    """The chosen arrays in a `[blocks, *_BLOCK]`, each filled up with zeros."""
    parts, blocks = [], [_blocks(scores[n]) for n in chosen]
    for n, many in zip(chosen, blocks, strict=True):
        keys = order_keys(scores[n].reshape(-1))
        missing = many * math.prod(_BLOCK) - keys.size
        parts += [keys, jnp.zeros(missing, keys.dtype)] if missing else [keys]
    first = np.concatenate([np.arange(many, dtype=np.int32) for many in blocks])
    within = lax.iota(jnp.int32, math.prod(_BLOCK)).reshape(1, *_BLOCK)
    return _Entries(
        jnp.concatenate(parts).reshape(sum(blocks), *_BLOCK),
        jnp.asarray(np.int32(math.prod(_BLOCK)) * first)[:, None, None] + within,
        np.repeat(np.asarray(chosen, np.int32), blocks),
    )


def _blocks(scores: Float[Array, "..."]) -> int:
    return -(-scores.size // math.prod(_BLOCK))


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
