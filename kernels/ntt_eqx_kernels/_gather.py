"""The non-zeros of a metric, gathered row by row into short chunks of one width.

A row of the mask of a pruned layer holds few and unequally many non-zeros. Cut into chunks of some
width W, any mask with P non-zeros in I rows fits P // W + I chunks: the shapes depend on the number
of non-zeros alone, so that another mask with as many compiles nothing again, and the work falls
with the density however unequal the rows are.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

from ._bits import MaskBits, RankedBits, at, first_above, running, sum_at
from ._blocks import block_size, map_blocks, scan_blocks
from ._dispatch import target_device
from .manual_axes import like_varying

# The width of chunks, by the mean number of non-zeros in a row: the wider, the fewer and larger are
# the products, and the more entries are not in use, half a chunk a row. Counted on an H100 with 246
# a row, gradient included: 16, 32 and 64 take 3.0, 2.4 and 2.0 ms. On a CPU 8, 16 and 32 are within
# a fifth of each other at 24 a row.
_WIDTHS = {192: 64, 96: 32, 0: 16}


class GatheredMetric(eqx.Module):
    """A metric `c[I, J]` of which only the non-zeros are stored.

    Where rows of a mask are alike (blocks of weights that are kept or dropped together), one is
    stored for `row_block` of them, and u is made once for all of them.

    Attributes:
        rows: the stored row of each chunk, ascending; their number for a chunk that is not in use.
        columns: the columns of its entries.
        values: their values; 0 where an entry is not in use.
        offset: what is added to `u[n,m,i]`: the metric of a bias, or 0.
        shape: (I, J).
        row_block: rows i that one stored row is for; the last may be for fewer.
    """

    rows: Int[Array, " chunks"]
    columns: Int[Array, "chunks width"]
    values: Float[Array, "chunks width"]
    offset: Float[Array, " i"]
    shape: tuple[int, int] = eqx.field(static=True)
    row_block: int = eqx.field(static=True, default=1)

    @property
    def stored(self) -> int:
        """How many rows are stored."""
        return -(-self.shape[0] // self.row_block)

    @property
    def owners(self) -> Int[Array, " chunks"]:
        """A stored row for each chunk: the last for one that is not in use, whose values are 0."""
        return jnp.minimum(self.rows, max(self.stored - 1, 0))

    def spread(self, u: Float[Array, "n m stored"]) -> Float[Array, "n m i"]:
        """From the u of the stored rows that of all rows."""
        if self.row_block == 1:
            return u
        return jnp.repeat(u, self.row_block, axis=2)[:, :, : self.shape[0]]

    def pool(self, u_bar: Float[Array, "n m i"]) -> Float[Array, "n m stored"]:
        """The transpose of `spread`."""
        if self.row_block == 1:
            return u_bar
        missing = self.stored * self.row_block - self.shape[0]
        u_bar = jnp.pad(u_bar, ((0, 0), (0, 0), (0, missing)))
        return jnp.sum(u_bar.reshape(*u_bar.shape[:2], self.stored, self.row_block), axis=3)


class GatheredRows(eqx.Module):
    """Where a mask `[I, J]` has its entries.

    Attributes:
        rows: the stored row of each chunk, ascending; their number for a chunk that is not in use.
        columns: the columns of its entries, ascending in each row; J where one is not in use.
        shape: (I, J).
        row_block: rows i that one stored row is for (see `GatheredMetric`).
    """

    rows: Int[Array, " chunks"]
    columns: Int[Array, "chunks width"]
    shape: tuple[int, int] = eqx.field(static=True)
    row_block: int = eqx.field(static=True, default=1)

    @property
    def stored(self) -> int:
        """How many rows are stored."""
        return -(-self.shape[0] // self.row_block)

    @property
    def capacity(self) -> int:
        """So many entries of stored rows fit in, however they are spread over the rows."""
        chunks, width = self.columns.shape
        return (chunks - self.stored + 1) * width - 1

    def of_stored(self, mask: Bool[Array, "i j"]) -> Bool[Array, "stored j"]:
        """The rows of a mask that are stored."""
        return mask[:: self.row_block]

    def fits(self, mask: Bool[Array, "i j"], count: Int[Array, ""]) -> Bool[Array, ""]:
        """Whether there is room for the `count` entries of stored rows, and others are alike."""
        return (count <= self.capacity) & self.repeats_rows(mask)

    def repeats_rows(self, mask: Bool[Array, "i j"]) -> Bool[Array, ""]:
        """Whether the rows of a mask that are not stored are those that stand for them."""
        if self.row_block == 1:
            return jnp.ones((), bool)
        whole = jnp.repeat(self.of_stored(mask), self.row_block, axis=0)[: self.shape[0]]
        return jnp.all(whole == mask)

    def of(self, mask: Bool[Array, "i j"]) -> "GatheredRows":
        """Where another mask has its entries, in arrays of the same shapes; works under `jit`."""
        return gather_each([self], MaskBits.of([self.of_stored(mask)]))[0][0]

    def metric(
        self, c: Bool[Array, "i j"] | Float[Array, "i j"] | None, offset: Float[Array, " i"]
    ) -> GatheredMetric:
        """A metric at the mask's entries; zero elsewhere.

        **Arguments:**

        - `c`: the metric; its rows are alike where those of the mask are. `None` is 1 everywhere.
        - `offset`: see `GatheredMetric`; its dtype becomes that of the values.
        """
        used = self._used()
        one = jnp.ones((), offset.dtype)
        values = jnp.where(used, one if c is None else self._at(c).astype(offset.dtype), 0)
        columns = jnp.where(used, self.columns, 0)
        return GatheredMetric(self.rows, columns, values, offset, self.shape, self.row_block)

    def matches(self, mask: Bool[Array, "i j"]) -> Bool[Array, ""]:
        """Whether these are the entries of the stored rows of `mask`: `match_each` of one."""
        return match_each([self], MaskBits.of([self.of_stored(mask)]))

    def _used(self) -> Bool[Array, "chunks width"]:
        return (self.rows < self.stored)[:, None] & (self.columns < self.shape[1])

    def _at(self, x: Shaped[Array, "i j"]) -> Shaped[Array, "chunks width"]:
        """`x` at every entry; whatever it may be where one is not in use."""
        places = self.rows[:, None] * (self.row_block * self.shape[1]) + self.columns
        return x.reshape(-1).at[jnp.where(self._used(), places, 0)].get(mode="clip")


def gathered_shape(nonzeros: int, rows: int) -> tuple[int, int]:
    """What a mask is gathered to.

    **Arguments:**

    - `nonzeros`, `rows`: how many of each the mask has.

    **Returns:**

    The number of chunks, and of the entries of each, used or not.
    """
    width = next(width for least, width in _WIDTHS.items() if nonzeros >= least * rows)
    return nonzeros // width + rows, width


def gather_rows(
    mask: Bool[Array, "i j"] | np.ndarray, nonzeros: int, *, row_block: int = 1
) -> GatheredRows:
    """Where `mask` has its entries, under `jit` too; on the host if it is a NumPy array.

    **Arguments:**

    - `mask`: a mask, with at most `nonzeros` entries: of one with more, some are left out.
    - `nonzeros`: how many to make room for, of stored rows.
    - `row_block`: rows of the mask that are alike, from the first on: one of them is stored.

    **Returns:**

    `GatheredRows`, whose shapes depend on the mask's shape and on `nonzeros` alone.
    """
    (i, j), stored = mask.shape, mask[::row_block]
    return _gather(stored, gathered_shape(nonzeros, len(stored)), (i, j), row_block)


def _gather(
    mask: Bool[Array, "stored j"] | np.ndarray,
    shape: tuple[int, int],
    whole: tuple[int, int],
    row_block: int,
) -> GatheredRows:
    (i, j), (chunks, width) = mask.shape, shape
    if isinstance(mask, np.ndarray):
        row, column = np.nonzero(mask)
        chunk, slot = _places(mask, row, width)
        rows, columns = np.full(chunks, i, np.int32), np.full(shape, j, np.int32)
        rows[chunk], columns[chunk, slot] = row, column
        return GatheredRows(jnp.asarray(rows), jnp.asarray(columns), whole, row_block)
    empty = GatheredRows(
        jnp.zeros(chunks, jnp.int32), jnp.zeros(shape, jnp.int32), whole, row_block
    )
    return gather_each([empty], MaskBits.of([mask]))[0][0]


def _places(mask: np.ndarray, row: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Chunk and slot of a mask's entries, of which the row is known, in their order."""
    per_row = np.sum(mask, axis=1, dtype=np.int32)
    first = np.cumsum(per_row) - per_row
    chunks = -(-per_row // width)
    first_chunk = np.cumsum(chunks) - chunks
    place = np.arange(len(row), dtype=np.int32) - first[row]
    return first_chunk[row] + place // width, place % width


def match_each(supports: Sequence[GatheredRows], masks: MaskBits) -> Bool[Array, ""]:
    """Whether these are the entries of the stored rows of all masks: each, and once.

    True of nothing else, whatever the arrays hold: places ascend, strictly where they are in use,
    are of the mask, and as many.

    **Arguments:**

    - `supports`: what may be the entries of the masks.
    - `masks`: their stored rows, in the same order.

    **Returns:**

    One boolean for all masks together.
    """
    places, orders, uses, first = [], [], [], 0
    for support, (i, j), start in zip(supports, masks.shapes, masks.starts, strict=False):
        rows, columns = support.rows[:, None], support.columns
        row, column = rows.astype(jnp.uint32), columns.astype(jnp.uint32)  # -1 is a large number
        used = (row < np.uint32(i)) & (column < np.uint32(j))
        inside = (row <= np.uint32(i)) & (column <= np.uint32(j))
        # Places outside come before all others, so they are not in order.
        order = jnp.where(inside, first + rows * (j + 1) + columns, -2)
        places.append(jnp.where(used, start + rows * j + columns, 0).reshape(-1))
        orders.append(order.reshape(-1))
        uses.append(used.reshape(-1))
        first += (i + 1) * (j + 1)
    order, used = jnp.concatenate(orders), jnp.concatenate(uses)
    before = jnp.concatenate([jnp.full(1, -1, jnp.int32), order])[:-1]
    right = jnp.where(used, before < order, before <= order)
    if masks.words.size:
        right &= ~used | masks.at(jnp.concatenate(places))
    # XLA on a CPU makes several functions of each sum over a long axis: so one sum of two rows.
    counts = lax.population_count(masks.words).astype(jnp.int32)
    none = jnp.zeros_like(counts)
    wrong = jnp.concatenate([(~right).astype(jnp.int32), none])
    surplus = jnp.concatenate([used.astype(jnp.int32), -counts])
    sums = jnp.sum(jnp.stack([wrong, surplus]), axis=1, dtype=jnp.int32)
    return (sums[0] == 0) & (sums[1] == 0)


def gather_each(
    supports: Sequence[GatheredRows], masks: MaskBits
) -> tuple[list[GatheredRows], Bool[Array, " masks"]]:
    """Where masks have the entries of their stored rows, and whether there is room for them.

    **Arguments:**

    - `supports`: the shapes; what they hold is not looked at.
    - `masks`: stored rows of other masks of these shapes.

    **Returns:**

    The entries, in arrays of the same shapes, and for each mask whether there is room for them; of
    one without, no entry is there.
    """
    rows, columns, room = _search(supports, masks)
    return _split(supports, rows, columns), room


def current_each(
    supports: Sequence[GatheredRows], masks: MaskBits
) -> tuple[list[GatheredRows], Bool[Array, " masks"]]:
    """`gather_each`, which searches only where the supports are not those of the masks already.

    **Arguments:**

    - `supports`: what may be the entries of the masks; where it is not, the shapes alone count.
    - `masks`: their stored rows, in the same order.

    **Returns:**

    The entries, in arrays of the same shapes, and for each mask whether all of them are there.
    """
    rows = jnp.concatenate([support.rows for support in supports])
    columns = jnp.concatenate([support.columns.reshape(-1) for support in supports])
    # The branches return the arrays of all masks one behind the other: XLA on a CPU would compile
    # the whole search once for each array that is cut off in the branch.
    rows, columns, room = lax.cond(
        match_each(supports, masks),
        lambda: (rows, columns, like_varying(jnp.ones(len(supports), bool), [rows])),
        lambda: _search(supports, masks),
    )
    return _split(supports, rows, columns), room


def _search(
    supports: Sequence[GatheredRows], masks: MaskBits
) -> tuple[Int[Array, " chunks"], Int[Array, " slots"], Bool[Array, " masks"]]:
    """Rows of all chunks, columns of all their slots, and whether there is room for each mask.

    Each chunk looks for its row in the running number of chunks, and each slot for its entry in the
    running number of entries.
    """
    i, j = (np.asarray(sizes, np.int32) for sizes in zip(*masks.shapes, strict=True))
    sizes = [support.columns.shape for support in supports]
    chunks, width = (np.asarray(size, np.int32) for size in zip(*sizes, strict=True))
    of_chunk = lambda of_mask: np.repeat(np.asarray(of_mask, np.int32), chunks)
    of_slot = functools.partial(_of_slots, chunks=chunks.tolist(), width=width.tolist())
    if not masks.words.size:
        none = jnp.asarray(of_chunk(i)), of_slot(jnp.asarray(of_chunk(j))).reshape(-1)
        return like_varying((*none, jnp.ones(len(supports), bool)), [masks.words])
    edge = np.cumsum([0, *i], dtype=np.int32)  # the first row of each mask, and one past the last
    row_starts = np.concatenate(
        [
            start + j * np.arange(i)
            for start, (i, j) in zip(masks.starts, masks.shapes, strict=False)
        ]
        + [masks.starts[-1:]]
    ).astype(np.int32)
    ranked = RankedBits.of(masks.words)
    before = ranked.before(row_starts)
    used_chunks = -((before[:-1] - before[1:]) // np.repeat(width, i))
    ends = jnp.concatenate([jnp.zeros(1, jnp.int32), running(used_chunks)])

    number = np.concatenate([np.arange(count, dtype=np.int32) for count in chunks])
    number = number + at(ends, of_chunk(edge[:-1]))
    # The capacity holds however the entries are spread over rows. Of a mask with more, nothing is
    # stored, even if they would fit by luck: so it never passes for one that fits.
    capacity = np.asarray([support.capacity for support in supports], np.int32)
    room = at(before, edge[1:]) - at(before, edge[:-1]) <= capacity
    past = at(jnp.where(room, edge[1:], edge[:-1]), of_chunk(np.arange(len(chunks))))
    row = first_above(ends[1:], number)
    used = row < past
    row = jnp.where(used, row, 0)
    table = jnp.stack([before[:-1], before[1:], ends[:-1], row_starts[:-1]], axis=1)
    first, last, chunk, start = at(table, row).T
    first = first + (number - chunk) * of_chunk(width)
    last = jnp.where(used, last, first)
    row = jnp.where(used, row - of_chunk(edge[:-1]), of_chunk(i))

    slot = of_slot(first, counted=True)
    column = ranked.place_of(slot) - of_slot(start)
    return row, jnp.where(slot < of_slot(last), column, of_slot(of_chunk(j))), room


def _of_slots(x: Any, chunks: list[int], width: list[int], *, counted: bool = False) -> Any:
    """To each slot the value of its chunk; `counted` adds the number of the slot in its chunk."""
    xp = np if isinstance(x, np.ndarray) else jnp
    if len(set(width)) == 1:
        chunks, width = [sum(chunks)], width[:1]
    parts, start = [], 0
    for count, wide in zip(chunks, width, strict=True):
        part = xp.broadcast_to(x[start : start + count, None], (count, wide))
        if counted:
            part = part + np.arange(wide, dtype=np.int32)[None]
        parts.append(part.reshape(-1))
        start += count
    return parts[0] if len(parts) == 1 else xp.concatenate(parts)


def _split(
    supports: Sequence[GatheredRows], rows: Int[Array, " chunks"], columns: Int[Array, " slots"]
) -> list[GatheredRows]:
    """The supports with other entries, which are those of all one behind the other."""
    found, chunk, slot = [], 0, 0
    for support in supports:
        count, width = support.columns.shape
        mine = columns[slot : slot + count * width].reshape(count, width)
        found.append(dataclasses.replace(support, rows=rows[chunk : chunk + count], columns=mine))
        chunk, slot = chunk + count, slot + count * width
    return found


def gathered_u(
    a1: Float[Array, "n j"], a2: Float[Array, "m j"], c: GatheredMetric
) -> Float[Array, "n m i"]:
    """`u[n,m,i] = sum_j c[i,j] a1[n,j] a2[m,j] + offset[i]`: one small matrix product a chunk."""
    right = at(a2.T, c.columns)  # [chunks, width, M]
    # Told that rows ascend, XLA takes 45 s on a GPU to compile what takes 0.1 s otherwise.
    ascend = target_device().platform != "gpu"

    def block(a1: Array) -> Array:
        left = at(a1.T, c.columns) * c.values[:, :, None]
        parts = jnp.einsum("cwn,cwm->cnm", left, right)
        return sum_at(c.owners, parts, c.stored, ascending=ascend).transpose(1, 2, 0)

    return c.spread(map_blocks(block, a1, len(a1), _block(a1, a2, c))) + c.offset[None, None]


def _block(a1: Array, a2: Array, c: GatheredMetric) -> int:
    """How many samples n are taken together: those whose products of chunks `[chunks, M]` fit.

    On one core a product of 1024 x 1024 at 4 %, 32 and 32 samples, takes 73 CPU ms with gradients
    instead of 96, and one of 784 x 300 at 6 %, 64 and 64 samples, 70 instead of 78.
    """
    return block_size(len(a1), c.columns.shape[0] * len(a2) * a2.dtype.itemsize)


def gathered_tangents(
    a: Float[Array, "j s"], d: Float[Array, "k i s"], c: GatheredMetric
) -> Float[Array, "k entries"]:
    """`T[k,i,j] = sum_s d[k,i,s] a[j,s]` of one sample where `c` has entries, chunk by chunk.

    **Arguments:**

    - `a`: what comes into the layer at each position s.
    - `d`: what flows back to its output, along each of k directions.
    - `c`: the metric, gathered; every row is stored.

    **Returns:**

    `[k, chunks * width]`, in the order of `c.values.reshape(-1)`; where an entry is not in use, any
    number of the products' size.
    """
    parts = jnp.einsum("cks,cws->ckw", at(d.swapaxes(0, 1), c.owners), at(a, c.columns))
    return parts.swapaxes(0, 1).reshape(len(d), -1)


def gathered_u_backward(
    u_bar: Float[Array, "n m i"],
    a1: Float[Array, "n j"],
    a2: Float[Array, "m j"],
    c: GatheredMetric,
) -> tuple[Float[Array, "n j"], Float[Array, "m j"]]:
    """The cotangents of `a1` and `a2` in `gathered_u`.

    dL/da1[n,j] = sum_mi dL/du[n,m,i] c[i,j] a2[m,j], and the same with the sides exchanged.
    """
    of_entries = lambda a: at(a.T, c.columns) * c.values[:, :, None]  # [chunks, width, samples]
    right = of_entries(a2)

    def both(u_bar: Array, a1: Array) -> tuple[Array, Array]:
        parts = at(c.pool(u_bar).transpose(2, 0, 1), c.owners)  # [chunks, N, M]
        one = jnp.einsum("cnm,cwm->cwn", parts, right)
        two = jnp.einsum("cnm,cwn->cwm", parts, of_entries(a1))
        return sum_at(c.columns, one, a1.shape[1]).T, two

    def block(total: Array, rows: tuple[Array, Array]) -> tuple[Array, Array]:
        a1_bar, entries = both(*rows)
        return total + entries, a1_bar

    size = _block(a1, a2, c)
    if size >= len(a1):
        a1_bar, entries = both(u_bar, a1)
    else:
        none = like_varying(jnp.zeros_like(right), (u_bar, a1, right))
        entries, a1_bar = scan_blocks(block, none, (u_bar, a1), len(a1), size)
    return a1_bar, sum_at(c.columns, entries, a2.shape[1]).T


def entries_of(a: Float[Array, "n j"], c: GatheredMetric) -> Float[Array, "chunks width n"]:
    """`a[n, j]` at the column of every entry."""
    return at(a.T, c.columns)


def row_starts(c: GatheredMetric) -> Int[Array, " rows_and_one"]:
    """The first chunk of every row, and one past the last: the chunks of a row are side by side."""
    rows = jnp.arange(c.stored + 1, dtype=c.rows.dtype)
    found = jnp.searchsorted(c.rows, rows, method="scan_unrolled")
    return found.astype(jnp.int32)


def sum_columns(
    entries: Float[Array, "chunks width n"], c: GatheredMetric, columns: int
) -> Float[Array, "n j"]:
    """The sums over all entries of one column."""
    return sum_at(c.columns, entries, columns).T
