"""Exact selection of the k highest scores, without a sort, in all layers at once."""

import functools
import math
from collections.abc import Sequence
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

    Bisection over the bits of the threshold: at most as many counting passes as the dtype has bits,
    where a sort of 235,200 floats takes 30 times as long on a CPU. Ties at the threshold, when
    there are more than fit, are settled by further passes, over the bits of the index; see
    `by_index` for how many may be settled so.

    One loop serves all arrays, because XLA takes a quarter of a second to compile one: the arrays
    lie side by side in blocks, and each block has the threshold of its array. An array that is
    sharded stays where it is, beside the blocks.

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
            a block has the key 0.
        ranks: the order of those with equal keys: from the size of their array at the first entry
            down to 1 at the last one. What fills a block is below.
        owner: the array of each block; of an array as it is, its own number.
    """

    keys: Array
    ranks: Array
    owner: np.ndarray

    def from_on(self, key: Array, rank: Array) -> Bool[Array, "..."]:
        """Whether each entry is at the threshold of its array or above: at a key and a rank."""
        key, rank = self._of_owner(key), self._of_owner(rank)
        return (self.keys > key) | ((self.keys == key) & (self.ranks >= rank))

    def how_many(self, marks: Array, arrays: int) -> Int[Array, " arrays"]:
        """Marks of the entries of each of the `arrays` arrays."""
        owns = np.arange(arrays)[:, None] == np.atleast_1d(self.owner)
        axes = (1, 2) if self.owner.ndim else None
        sums = jnp.sum(marks, axis=axes, dtype=jnp.int32)
        return jnp.sum(jnp.where(owns, sums, 0), axis=1, dtype=jnp.int32)

    def _of_owner(self, values: Array) -> Array:
        """To each entry the value of its array."""
        if self.owner.ndim == 0:
            return values[int(self.owner)]
        return values.at[self.owner].get(mode="promise_in_bounds")[:, None, None]


class _Search(NamedTuple):
    """The search for the threshold of each array, after some tries.

    Attributes:
        tries: their number.
        key: with `rank`, the highest threshold known to have as many entries from there on as are
            wanted, or more.
        rank: see `key`.
        exact: whether it has as many as are wanted.
        from_key: entries at `key` and above, of any rank.
        above_key: entries above `key`, once all of its bits were tried.
        finite: entries above minus infinity.
    """

    tries: Int[Array, ""]
    key: UInt[Array, " arrays"]
    rank: Int[Array, " arrays"]
    exact: Bool[Array, " arrays"]
    from_key: Int[Array, " arrays"]
    above_key: Int[Array, " arrays"]
    finite: Int[Array, " arrays"]


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
    lowest, highest = _infinities(scores[0].dtype)
    found = _searched(groups, count, [leaf.size for leaf in scores], lowest)

    tied, wanted = found.from_key - found.above_key, count - found.above_key
    left = found.from_key - count
    is_open = (wanted > 0) & (left > 0)
    decided = jnp.minimum(wanted, left) if lenient else tied
    # `by_index` of the counts: all ties have the key of the threshold
    separated = found.finite - jnp.where(found.key > lowest, tied, 0)
    endless = (found.key <= lowest) | (found.key >= highest)
    unranked = is_open & ((decided > separated) | endless)

    masks: list[Any] = [None] * len(scores)
    for group in groups:
        marks = group.from_on(found.key, found.rank)
        if group.owner.ndim == 0:
            masks[int(group.owner)] = marks
            continue
        start, marks = 0, marks.reshape(-1)
        for n in together:
            masks[n] = marks[start : start + scores[n].size].reshape(scores[n].shape)
            start += _blocks(scores[n]) * math.prod(_BLOCK)
    return [(mask, unranked[n]) for n, mask in enumerate(masks)]


def _searched(
    groups: list[_Entries], count: Int[Array, " arrays"], sizes: list[int], lowest: Any
) -> _Search:
    """Find for each array the highest threshold with `count` entries from there on.

    After the first try, which counts what is above `lowest`, the bits of the key are tried, and
    after them those of the rank, the highest first. The search ends with the first thresholds that
    are all exact: before the ranks, unless ties are open.
    """
    key_of, arrays = groups[0].keys.dtype, len(sizes)
    width, rank_width = jnp.iinfo(key_of).bits, max(sizes).bit_length()

    def is_open(search: _Search) -> Array:
        return (search.tries <= width + rank_width) & ~jnp.all(search.exact)

    def next_try(search: _Search) -> _Search:
        bit = search.tries - 1  # from the highest of the key down to the lowest of the rank
        first, of_key = bit < 0, bit < width
        key_bit = lax.shift_left(key_of.type(1), (width - 1 - bit).astype(key_of))  # or none
        rank_bit = lax.shift_left(jnp.int32(1), width + rank_width - 1 - bit)
        key = jnp.where(first, lowest + key_of.type(1), search.key | key_bit)
        rank = search.rank | jnp.where(of_key, 0, rank_bit)
        counted = [g.how_many(g.from_on(key, rank), arrays) for g in groups]
        marked = jnp.sum(jnp.stack(counted), axis=0, dtype=jnp.int32)
        enough = ~first & (marked >= count)
        return _Search(
            search.tries + 1,
            jnp.where(enough, key, search.key),
            jnp.where(enough, rank, search.rank),
            search.exact | (enough & (marked == count)),
            jnp.where(of_key & enough, marked, search.from_key),
            jnp.where(of_key & ~first & ~enough, marked, search.above_key),
            jnp.where(first, marked, search.finite),
        )

    none = jnp.zeros(arrays, jnp.int32)
    start = _Search(
        tries=jnp.zeros((), jnp.int32),
        key=jnp.zeros(arrays, key_of),
        rank=none,
        exact=jnp.zeros(arrays, bool),
        from_key=jnp.asarray(sizes, jnp.int32),
        above_key=none,
        finite=none,
    )
    return lax.while_loop(is_open, next_try, start)


def _as_it_is(scores: Float[Array, "..."], owner: int) -> _Entries:
    ranks = jnp.full(scores.shape, scores.size, jnp.int32)
    for axis in range(scores.ndim):
        step = np.int32(math.prod(scores.shape[axis + 1 :]))
        ranks -= step * lax.broadcasted_iota(jnp.int32, scores.shape, axis)
    return _Entries(order_keys(scores), ranks, np.asarray(owner))


def _in_blocks(scores: list[Float[Array, "..."]], chosen: list[int]) -> _Entries:
    """The chosen arrays in a `[blocks, *_BLOCK]`, each filled up with zeros."""
    parts, blocks = [], [_blocks(scores[n]) for n in chosen]
    for n, many in zip(chosen, blocks, strict=True):
        keys = order_keys(scores[n].reshape(-1))
        missing = many * math.prod(_BLOCK) - keys.size
        parts += [keys, jnp.zeros(missing, keys.dtype)] if missing else [keys]
    first = [
        scores[n].size - math.prod(_BLOCK) * np.arange(many, dtype=np.int32)
        for n, many in zip(chosen, blocks, strict=True)
    ]
    within = lax.iota(jnp.int32, math.prod(_BLOCK)).reshape(1, *_BLOCK)
    return _Entries(
        jnp.concatenate(parts).reshape(sum(blocks), *_BLOCK),
        jnp.asarray(np.concatenate(first, dtype=np.int32))[:, None, None] - within,
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
