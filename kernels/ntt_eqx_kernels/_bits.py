"""Masks as bits: how many entries are before a place, and where the entry of a number is.

XLA takes 15 to 30 ms to compile each loop over an array on a CPU, whatever its length. So all masks
of a network are looked at as one row of bits, by a number of loops that does not depend on theirs.
"""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Int, UInt32

from ._dispatch import target_device
from .manual_axes import like_varying, varying_alike


class MaskBits(eqx.Module):
    """Several masks, one behind the other.

    Attributes:
        words: entry `n` is bit `n % 32` of word `n // 32`.
        shapes: of the masks.
    """

    words: UInt32[Array, " words"]
    shapes: tuple[tuple[int, int], ...] = eqx.field(static=True)

    @classmethod
    def of(cls, masks: Sequence[Bool[Array, "_ _"]]) -> "MaskBits":
        """The bits of `masks`."""
        size = sum(mask.size for mask in masks)
        bits = [*(mask.reshape(-1) for mask in masks), jnp.zeros(-size % 32, bool)]
        fours = jnp.concatenate(bits).astype(jnp.uint8).reshape(-(-size // 32), 8, 4)
        # Four bytes of 0 or 1 become four bits by one product: byte i, 2^(8 i), goes to bit 24 + i
        # by its 2^(24 - 7 i), and all other products are below or beyond the 32 bits. Bit by bit
        # the masks of LeNet-300-100 took 1.3 ms and more on a CPU by themselves, and so 0.2.
        fours = lax.bitcast_convert_type(fours, jnp.uint32) * np.uint32(0x01020408) >> np.uint32(24)
        places = np.arange(0, 32, 4, dtype=np.uint32)[None]
        words = jnp.sum(fours << places, axis=1, dtype=jnp.uint32)
        return cls(words, tuple((len(mask), mask.shape[1]) for mask in masks))

    @property
    def starts(self) -> list[int]:
        """The first place of each mask, and one past the last."""
        return np.cumsum([0, *(i * j for i, j in self.shapes)]).tolist()

    @property
    def count(self) -> Int[Array, ""]:
        """The number of entries of all masks together."""
        return jnp.sum(lax.population_count(self.words), dtype=jnp.uint32).astype(jnp.int32)

    def at(self, place: Int[Array, "*s"]) -> Bool[Array, "*s"]:
        """Whether there is an entry at each place, which is inside."""
        bit = at(self.words, place // 32) >> (place % 32).astype(jnp.uint32)
        return bit & jnp.uint32(1) == jnp.uint32(1)


class RankedBits(eqx.Module):
    """Bits that know how many entries are before each word.

    Attributes:
        words: of `MaskBits`, at least one.
        before_word: the number of entries before each, and one past the last.
    """

    words: UInt32[Array, " words"]
    before_word: Int[Array, " words_and_one"]

    @classmethod
    def of(cls, words: UInt32[Array, " words"]) -> "RankedBits":
        """Count the entries of `words`."""
        counts = running(lax.population_count(words).astype(jnp.int32))
        return cls(words, jnp.concatenate([jnp.zeros(1, jnp.int32), counts]))

    def before(self, place: Int[np.ndarray, " s"]) -> Int[Array, " s"]:
        """The number of entries before each place."""
        word = at(self.words, np.minimum(place // 32, self.words.size - 1))
        below = (np.uint32(1) << (place % 32).astype(np.uint32)) - np.uint32(1)
        inside = lax.population_count(word & below).astype(jnp.int32)
        return at(self.before_word, place // 32) + inside

    def place_of(self, number: Int[Array, " s"]) -> Int[Array, " s"]:
        """The place of the entry with each number, from 0; any place where there is none."""
        index = jnp.minimum(first_above(self.before_word[1:], number), self.words.size - 1)
        word, place = at(self.words, index), 32 * index
        left = number - at(self.before_word, index)
        for half in (16, 8, 4, 2, 1):
            low = lax.population_count(word & np.uint32(2**half - 1)).astype(jnp.int32)
            above = left >= low
            left = jnp.where(above, left - low, left)
            place = jnp.where(above, place + half, place)
            word = jnp.where(above, word >> np.uint32(half), word)
        return place


def running(x: Int[Array, " n"]) -> Int[Array, " n"]:
    """The running sum.

    On a CPU of 32 numbers at a time, one loop each: XLA unrolls `cumsum` there into very many.

    **Arguments:**

    - `x`: integers.

    **Returns:**

    At each place the sum of the numbers up to it, that one included.
    """
    if target_device().platform != "cpu":
        return jnp.cumsum(x, dtype=x.dtype)
    n = x.size
    blocks = jnp.pad(x, (0, -n % 32)).reshape(-(-n // 32), 1, 32)
    up_to = np.tri(32, dtype=bool)[None]
    sums = jnp.sum(jnp.where(up_to, blocks, 0), axis=2, dtype=x.dtype)
    if len(sums) > 1:
        totals = sums[:, -1]
        sums = sums + (running(totals) - totals)[:, None]
    return sums.reshape(-1)[:n]


def first_above(values: Int[Array, " n"], wanted: Int[Array, " s"]) -> Int[Array, " s"]:
    """The first place at which ascending values are above wanted ones.

    **Arguments:**

    - `values`: ascending integers, one at least.
    - `wanted`: integers.

    **Returns:**

    A place for each of `wanted`; n where no value is above.
    """
    length = values.size

    def halve(_: Any, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = (low + high) // 2
        above = at(values, jnp.minimum(middle, length - 1)) > wanted
        open_ = low < high
        return jnp.where(open_ & ~above, middle + 1, low), jnp.where(open_ & above, middle, high)

    ends = [jnp.zeros_like(wanted), jnp.full_like(wanted, length)]
    low, high = like_varying(ends, [values, wanted])
    return lax.fori_loop(0, length.bit_length(), halve, (low, high))[0]


def at(x: Any, places: Any) -> Any:
    """The rows `x[places]`.

    `lax` itself: indexing by `jnp` adds a treatment of negative places and passes over the result,
    which take longer to trace and to compile than the look-up.

    **Arguments:**

    - `x`: any array; its first axis is looked up.
    - `places`: integers that are inside.

    **Returns:**

    `[*places.shape, *x.shape[1:]]`.
    """
    x, places = varying_alike(x, jnp.asarray(places))
    dims = lax.GatherDimensionNumbers(
        offset_dims=tuple(range(places.ndim, places.ndim + x.ndim - 1)),
        collapsed_slice_dims=(0,),
        start_index_map=(0,),
    )
    mode = lax.GatherScatterMode.PROMISE_IN_BOUNDS
    return lax.gather(x, lax.expand_dims(places, [places.ndim]), dims, (1, *x.shape[1:]), mode=mode)


def sum_at(places: Int[Array, "*s"], entries: Any, length: int, *, ascending: bool = False) -> Any:
    """The transpose of `at`: sums of rows.

    **Arguments:**

    - `places`: integers that are inside.
    - `entries`: `[*places.shape, ...]`.
    - `length`: rows of the result.
    - `ascending`: whether `places` ascend.

    **Returns:**

    `[length, ...]`, with entry n of `entries` added at `places[n]`.
    """
    places, entries = varying_alike(places, entries)
    inner = entries.shape[places.ndim :]
    dims = lax.ScatterDimensionNumbers(
        update_window_dims=tuple(range(places.ndim, entries.ndim)),
        inserted_window_dims=(0,),
        scatter_dims_to_operand_dims=(0,),
    )
    zeros = like_varying(jnp.zeros((length, *inner), entries.dtype), [entries])
    return lax.scatter_add(
        zeros,
        lax.expand_dims(places, [places.ndim]),
        entries,
        dims,
        indices_are_sorted=ascending,
        mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS,
    )
