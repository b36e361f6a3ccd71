"""`SortedIndex`: the entries of masks that change, in arrays whose shapes do not."""

import dataclasses
import math
from collections.abc import Sequence

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int

from ..kernels import MaskBits, RankedBits, at, first_above, running, sum_at
from ._index import AbstractIndex

# Rows are sorted by their numbers of entries and taken in blocks, and each block as many slots at a
# time as its fullest row has. Products of 64 to 1,024 samples are as fast with 32 to 256 rows.
BLOCK_ROWS = 64
BLOCK_SLOTS = 8
_LAST = np.int32(np.iinfo(np.int32).max)
_LONGEST = 2**20  # entries of a row


class SortedSide(eqx.Module):
    """The entries by rows, or by columns, block by block of rows with similar counts.

    Attributes:
        others: for each pass, slot and row of its block the index along the other axis.
        entries: the number of the entry there; the number of all where there is none.
        blocks: which block each pass belongs to, ascending.
        passes: how many passes there are; those behind them hold nothing.
        place: for each row its position in the rows of all blocks.
    """

    others: Int[Array, "pass slot row"]
    entries: Int[Array, "pass slot row"]
    blocks: Int[Array, " pass"]
    passes: Int[Array, ""]
    place: Int[Array, " n"]


class SortedIndex(AbstractIndex):
    """The entries of a mask in arrays whose shapes follow from its shape and its count alone.

    Attributes:
        rows: the entries by rows, for products with the matrix.
        columns: the entries by columns, for products with its transpose.
        order: for each entry its position in the slots of `rows`.
        places: for each entry its place in the flat matrix; the size of the matrix for an entry
            that the mask lacks.
        shape: `(I, J)`.
    """

    rows: SortedSide
    columns: SortedSide
    order: Int[Array, " kept"]
    places: Int[Array, " kept"]
    shape: tuple[int, int] = eqx.field(static=True)

    def gather(self, matrix: Array) -> Array:
        """The entries of a matrix; 0 for one that the mask lacks."""
        flat = matrix.reshape(-1)
        return flat.at[self.places].get(mode="fill", fill_value=0, unique_indices=True)

    def scatter(self, values: Array) -> Array:
        """See `AbstractIndex`."""
        flat = jnp.zeros(math.prod(self.shape), values.dtype)
        return flat.at[self.places].add(values, mode="drop").reshape(self.shape)

    def is_entry(self) -> Bool[Array, " kept"]:
        """Whether the mask has an entry of this number, or there is only room for it."""
        return self.places < math.prod(self.shape)

    def chunks(self, width: int) -> tuple[Array, Array, Array]:
        """See `AbstractIndex`; each entry is a chunk, because rows change."""
        row, column = self.places // self.shape[1], self.places % self.shape[1]
        here = self.is_entry()
        number = jnp.where(here, jnp.arange(self.kept, dtype=jnp.int32), self.kept)
        spare = ((0, 0), (0, width - 1))
        columns = jnp.pad(jnp.where(here, column, 0)[:, None], spare)
        entries = jnp.pad(number[:, None], spare, constant_values=self.kept)
        return jnp.minimum(row, self.shape[0] - 1), columns, entries


@dataclasses.dataclass(frozen=True)
class _Side:
    """The static numbers of one side of one mask, within the tables of all sides.

    Attributes:
        first: the key of its first place.
        rows, others: its sizes.
        passes: how many passes there is room for.
        block: its first block.
        kept: how many entries there is room for.
    """

    first: int
    rows: int
    others: int
    passes: int
    block: int
    kept: int

    @property
    def blocks(self) -> int:
        return -(-self.rows // BLOCK_ROWS)

    def keys(self) -> np.ndarray:
        """The key of the first place of each row, of which there are whole blocks."""
        rows = np.arange(self.blocks * BLOCK_ROWS + 1, dtype=np.int64)
        return (self.first + np.minimum(rows, self.rows) * self.others).astype(np.int32)


def sorted_each(
    masks: Sequence[Bool[Array, "_ _"]], kept: Sequence[int]
) -> tuple[list[SortedIndex], Bool[Array, " masks"]]:
    """The index of each mask, and whether there is room for its entries; works under `jit`.

    **Arguments:**

    - `masks`: matrices.
    - `kept`: how many entries there is room for in each; of a mask with more the first are found.

    One search finds the entries of all masks, because XLA compiles each loop over an array of its
    own in 15 to 30 ms on a CPU, whatever its length.
    """
    shapes = [(mask.shape[0], mask.shape[1]) for mask in masks]
    places, keys, numbers, room = _entries(masks, kept)
    sides = _passes(_sides(shapes, kept), keys, numbers)
    index = [
        SortedIndex(
            rows=sides[n],
            columns=sides[len(masks) + n],
            order=_order(sides[n], kept[n]),
            places=places[n],
            shape=shape,
        )
        for n, shape in enumerate(shapes)
    ]
    return index, room


def _order(side: SortedSide, kept: int) -> Int[Array, " kept"]:
    """For each entry its position among the slots."""
    slots = side.entries.reshape(-1)
    where = jnp.zeros(kept, jnp.int32)
    return where.at[slots].set(jnp.arange(slots.size, dtype=jnp.int32), mode="drop")


def _sides(shapes: Sequence[tuple[int, int]], kept: Sequence[int]) -> list[_Side]:
    sides, first, block = [], 0, 0
    for transposed in (False, True):
        for shape, count in zip(shapes, kept, strict=True):
            rows, others = shape[::-1] if transposed else shape
            blocks = -(-rows // BLOCK_ROWS)
            # A block has as many slots as its fullest row, which has at most as many as the rows of
            # the block before have on average.
            slots = count // BLOCK_ROWS + min(others, count)
            passes = slots // BLOCK_SLOTS + blocks
            sides.append(_Side(first, rows, others, passes, block, count))
            first, block = first + rows * others, block + blocks
    return sides


def _entries(
    masks: Sequence[Array], kept: Sequence[int]
) -> tuple[list[Array], Array, Array, Bool[Array, " masks"]]:
    """The places of the entries in each flat mask; all of them by rows and then by columns.

    A place's key is its number among those of all masks one behind the other, and then of all their
    transposes. The ascending keys come with the number of the entry in its mask.
    """
    bits = MaskBits.of(masks)
    ranked = RankedBits.of(bits.words)
    edges = np.asarray(bits.starts, np.int32)
    before = ranked.before(edges)
    counts = before[1:] - before[:-1]
    of_entry = np.repeat(np.arange(len(kept)), kept)
    number = np.concatenate([np.arange(count, dtype=np.int32) for count in kept])
    real = number < at(counts, of_entry)
    place = ranked.place_of(number + at(before, of_entry)) - edges[of_entry]
    i, j = (np.asarray(sizes, np.int32)[of_entry] for sizes in zip(*bits.shapes, strict=True))
    row, column = place // j, place % j
    by_column = edges[-1] + edges[of_entry] + column * i + row
    both = (edges[of_entry] + place, by_column)
    keys = jnp.concatenate([jnp.where(real, key, _LAST) for key in both])
    keys, numbers = lax.sort((keys, jnp.concatenate([number, number])), num_keys=1)
    flat = jnp.where(real, place, i * j)
    cuts = np.cumsum([0, *kept])
    flats = [flat[a:b] for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
    return flats, keys, numbers, counts <= np.asarray(kept, np.int32)


def _passes(sides: Sequence[_Side], keys: Array, numbers: Array) -> list[SortedSide]:
    """Sort the rows of each side by their counts, and cut the entries of each block into passes."""
    tables = [side.keys() for side in sides]
    first = np.concatenate([table[:-1] for table in tables])
    past = np.concatenate([table[1:] for table in tables])
    edges = jnp.asarray(np.concatenate([first, past]) - 1)
    starts, ends = jnp.split(first_above(keys, edges), 2)
    lengths = ends - starts
    of_row = np.repeat(np.arange(len(sides)), [BLOCK_ROWS * side.blocks for side in sides])
    rank = jnp.asarray(of_row * _LONGEST + _LONGEST - 1, jnp.int32) - lengths
    every = jnp.arange(len(first), dtype=jnp.int32)
    _, order = lax.sort((rank, every), num_keys=1, is_stable=True)
    place = sum_at(order, every, len(first))

    blocks = order.reshape(-1, BLOCK_ROWS)
    passes = -(-at(lengths, blocks[:, 0]) // BLOCK_SLOTS)
    block_ends = running(passes)
    block_starts = block_ends - passes
    of_pass = np.repeat(np.arange(len(sides)), [side.passes for side in sides])
    number = np.concatenate([np.arange(side.passes, dtype=np.int32) for side in sides])
    side_first = np.asarray([side.block for side in sides])
    side_last = np.asarray([side.block + side.blocks - 1 for side in sides])
    number = number + at(block_starts, side_first[of_pass])
    used = number < at(block_ends, side_last[of_pass])
    block = jnp.minimum(first_above(block_ends, number), len(passes) - 1)
    slot = (number - at(block_starts, block)) * BLOCK_SLOTS
    slot = slot[:, None] + np.arange(BLOCK_SLOTS, dtype=np.int32)[None]

    rows = at(blocks, block)
    real = used[:, None, None] & (slot[:, :, None] < at(lengths, rows)[:, None])
    entry = jnp.where(real, at(starts, rows)[:, None] + slot[:, :, None], 0)
    others = jnp.where(real, at(keys, entry) - at(jnp.asarray(first), rows)[:, None], 0)
    full = np.asarray([side.kept for side in sides], np.int32)[of_pass]
    entries = jnp.where(real, at(numbers, entry), full[:, None, None])
    found, at_pass, at_row = [], 0, 0
    for n, side in enumerate(sides):
        mine = slice(at_pass, at_pass + side.passes)
        total = at(block_ends, side_last[n]) - at(block_starts, side_first[n])
        where = place[at_row : at_row + side.rows] - at_row
        found.append(
            SortedSide(others[mine], entries[mine], block[mine] - side.block, total, where)
        )
        at_pass, at_row = at_pass + side.passes, at_row + BLOCK_ROWS * side.blocks
    return found
