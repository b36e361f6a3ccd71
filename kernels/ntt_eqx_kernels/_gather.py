"""The non-zeros of a metric, gathered row by row into short chunks of one width.

A row of the mask of a pruned layer holds few and unequally many non-zeros. Cut into chunks of some
width W, any mask with P non-zeros in I rows fits P // W + I chunks: the shapes depend on the number
of non-zeros alone, so that another mask with as many compiles nothing again, and the work falls
with the density however unequal the rows are.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from ._bits import MaskBits, RankedBits, at, first_above, running
from ._dispatch import target_device

# The width of chunks, by the mean number of non-zeros in a row: the wider, the fewer and larger are
# the products, and the more entries are not in use, half a chunk a row. Counted on an H100 with 246
# a row, gradient included: 16, 32 and 64 take 3.0, 2.4 and 2.0 ms. On a CPU 8, 16 and 32 are within
# a fifth of each other at 24 a row.
_WIDTHS = {192: 64, 96: 32, 0: 16}


class GatheredMetric(eqx.Module):
    """A metric `c[I, J]` of which only the non-zeros are stored.

    Where rows of a mask are alike (blocks of weights that are kept or dropped together), one is
    stored for `height` of them, and u is made once for all of them.

    Attributes:
        rows: the stored row of each chunk, ascending; their number for a chunk that is not in use.
        columns: the columns of its entries.
        values: their values; 0 where an entry is not in use.
        offset: what is added to `u[n,m,i]`: the metric of a bias, or 0.
        shape: (I, J).
        height: rows i that one stored row is for; the last may be for fewer.
    """

    rows: Int[Array, " chunks"]
    columns: Int[Array, "chunks width"]
    values: Float[Array, "chunks width"]
    offset: Float[Array, " i"]
    shape: tuple[int, int] = eqx.field(static=True)
    height: int = eqx.field(static=True, default=1)

    @property
    def stored(self) -> int:
        """How many rows are stored."""
        return -(-self.shape[0] // self.height)

    def spread(self, u: Float[Array, "n m stored"]) -> Float[Array, "n m i"]:
        """From the u of the stored rows that of all rows."""
        if self.height == 1:
            return u
        return jnp.repeat(u, self.height, axis=2)[:, :, : self.shape[0]]

    def pool(self, u_bar: Float[Array, "n m i"]) -> Float[Array, "n m stored"]:
        """The transpose of `spread`."""
        if self.height == 1:
            return u_bar
        missing = self.stored * self.height - self.shape[0]
        u_bar = jnp.pad(u_bar, ((0, 0), (0, 0), (0, missing)))
        return jnp.sum(u_bar.reshape(*u_bar.shape[:2], self.stored, self.height), axis=3)


class GatheredRows(eqx.Module):
    """Where a mask `[I, J]` has its entries.

    Attributes:
        rows: the stored row of each chunk, ascending; their number for a chunk that is not in use.
        columns: the columns of its entries, ascending in each row; J where one is not in use.
        shape: (I, J).
        height: rows i that one stored row is for (see `GatheredMetric`).
    """

    rows: Int[Array, " chunks"]
    columns: Int[Array, "chunks width"]
    shape: tuple[int, int] = eqx.field(static=True)
    height: int = eqx.field(static=True, default=1)

    @property
    def stored(self) -> int:
        """How many rows are stored."""
        return -(-self.shape[0] // self.height)

    @property
    def room(self) -> int:
        """So many entries of stored rows fit in, however they are spread over the rows."""
        chunks, width = self.columns.shape
        return (chunks - self.stored + 1) * width - 1

    def of_stored(self, mask: Bool[Array, "i j"]) -> Bool[Array, "stored j"]:
        """The rows of a mask that are stored."""
        return mask[:: self.height]

    def fits(self, mask: Bool[Array, "i j"], count: Int[Array, ""]) -> Bool[Array, ""]:
        """Whether there is room for the `count` entries of stored rows, and others are alike."""
        return (count <= self.room) & self.alike(mask)

    def alike(self, mask: Bool[Array, "i j"]) -> Bool[Array, ""]:
        """Whether the rows of a mask that are not stored are those that stand for them."""
        if self.height == 1:
            return jnp.ones((), bool)
        whole = jnp.repeat(self.of_stored(mask), self.height, axis=0)[: self.shape[0]]
        return jnp.all(whole == mask)

    def of(self, mask: Bool[Array, "i j"]) -> "GatheredRows":
        """Where another mask has its entries, in arrays of the same shapes; works under `jit`."""
        return gather_each([self], MaskBits.of([self.of_stored(mask)]))[0][0]

    def metric(
        self, c: Bool[Array, "i j"] | Float[Array, "i j"], offset: Float[Array, " i"]
    ) -> GatheredMetric:
        """A metric at the mask's entries; zero elsewhere.

        **Arguments:**

        - `c`: the metric; its rows are alike where those of the mask are.
        - `offset`: see `GatheredMetric`; its dtype becomes that of the values.
        """
        used = self._used()
        values = jnp.where(used, self._at(c).astype(offset.dtype), 0)
        columns = jnp.where(used, self.columns, 0)
        return GatheredMetric(self.rows, columns, values, offset, self.shape, self.height)

    def holds(self, mask: Bool[Array, "i j"]) -> Bool[Array, ""]:
        """Whether these are the entries of the stored rows of `mask`: `hold_each` of one."""
        return hold_each([self], MaskBits.of([self.of_stored(mask)]))

    def _used(self) -> Bool[Array, "chunks width"]:
        return (self.rows < self.stored)[:, None] & (self.columns < self.shape[1])

    def _at(self, x: Shaped[Array, "i j"]) -> Shaped[Array, "chunks width"]:
        """`x` at every entry; whatever it may be where one is not in use."""
        places = self.rows[:, None] * (self.height * self.shape[1]) + self.columns
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
    mask: Bool[Array, "i j"] | np.ndarray, nonzeros: int, *, height: int = 1
) -> GatheredRows:
    """Where `mask` has its entries, under `jit` too; on the host if it is a NumPy array.

    **Arguments:**

    - `mask`: a mask, with at most `nonzeros` entries: of one with more, some are left out.
    - `nonzeros`: how many to make room for, of stored rows.
    - `height`: rows of the mask that are alike, from the first on: one of them is stored.

    **Returns:**

    `GatheredRows`, whose shapes depend on the mask's shape and on `nonzeros` alone.
    """
    (i, j), stored = mask.shape, mask[::height]
    return _gather(stored, gathered_shape(nonzeros, len(stored)), (i, j), height)


def _gather(
    mask: Bool[Array, "stored j"] | np.ndarray,
    shape: tuple[int, int],
    whole: tuple[int, int],
    height: int,
) -> GatheredRows:
    (i, j), (chunks, width) = mask.shape, shape
    if isinstance(mask, np.ndarray):
        row, column = np.nonzero(mask)
        chunk, slot = _places(mask, row, width)
        rows, columns = np.full(chunks, i, np.int32), np.full(shape, j, np.int32)
        rows[chunk], columns[chunk, slot] = row, column
        return GatheredRows(jnp.asarray(rows), jnp.asarray(columns), whole, height)
    empty = GatheredRows(jnp.zeros(chunks, jnp.int32), jnp.zeros(shape, jnp.int32), whole, height)
    return gather_each([empty], MaskBits.of([mask]))[0][0]


def _places(mask: np.ndarray, row: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Chunk and slot of a mask's entries, of which the row is known, in their order."""
    per_row = np.sum(mask, axis=1, dtype=np.int32)
    first = np.cumsum(per_row) - per_row
    chunks = -(-per_row // width)
    first_chunk = np.cumsum(chunks) - chunks
    place = np.arange(len(row), dtype=np.int32) - first[row]
    return first_chunk[row] + place // width, place % width


def hold_each(supports: Sequence[GatheredRows], masks: MaskBits) -> Bool[Array, ""]:
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
        used = (0 <= rows) & (rows < i) & (0 <= columns) & (columns < j)
        inside = (0 <= rows) & (rows <= i) & (0 <= columns) & (columns <= j)
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
    wrong, count = jnp.sum(~right, dtype=jnp.int32), jnp.sum(used, dtype=jnp.int32)
    return (wrong == 0) & (count == masks.count)


def gather_each(
    supports: Sequence[GatheredRows], masks: MaskBits
) -> tuple[list[GatheredRows], Bool[Array, " masks"]]:
    """Where masks have the entries of their stored rows, and whether there is room for them.

    Each chunk looks for its row in the running number of chunks, and each slot for its entry in the
    running number of entries.

    **Arguments:**

    - `supports`: the shapes; what they hold is not looked at.
    - `masks`: stored rows of other masks of these shapes.

    **Returns:**

    The entries, in arrays of the same shapes, and for each mask whether all of them are there.
    """
    i, j = (np.asarray(sizes, np.int32) for sizes in zip(*masks.shapes, strict=True))
    sizes = [support.columns.shape for support in supports]
    chunks, width = (np.asarray(size, np.int32) for size in zip(*sizes, strict=True))
    if not masks.words.size:
        empty = lambda s, i, j: (jnp.full_like(s.rows, i), jnp.full_like(s.columns, j))
        found = [empty(s, *shape) for s, shape in zip(supports, masks.shapes, strict=True)]
        return _filled(supports, found), jnp.ones(len(supports), bool)
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
    number = number + at(ends, np.repeat(edge[:-1], chunks))
    row = first_above(ends[1:], number)
    used = row < np.repeat(edge[1:], chunks)
    row = jnp.where(used, row, 0)
    first = at(before, row) + (number - at(ends, row)) * np.repeat(width, chunks)
    last = jnp.where(used, at(before, row + 1), first)
    start = at(jnp.asarray(row_starts), row)
    row = jnp.where(used, row - np.repeat(edge[:-1], chunks), np.repeat(i, chunks))

    cuts = np.cumsum(chunks)[:-1].tolist()
    rows, first, last, start = (jnp.split(x, cuts) for x in (row, first, last, start))
    slot_in = [np.arange(w, dtype=np.int32)[None] for w in width]
    slots = [f[:, None] + w for f, w in zip(first, slot_in, strict=True)]
    place = ranked.place_of(jnp.concatenate([slot.reshape(-1) for slot in slots]))
    places = jnp.split(place, np.cumsum([slot.size for slot in slots])[:-1].tolist())
    columns = [
        jnp.where(slot < last[:, None], place.reshape(slot.shape) - start[:, None], none)
        for slot, place, last, start, none in zip(slots, places, last, start, j, strict=True)
    ]
    # The capacity holds however the entries are spread over rows, so that whether a mask fits is a
    # matter of its count alone; some masks with more would fit, too.
    capacity = np.asarray([support.room for support in supports], np.int32)
    room = at(before, edge[1:]) - at(before, edge[:-1]) <= capacity
    return _filled(supports, list(zip(rows, columns, strict=True))), room


def _filled(supports: Sequence[GatheredRows], found: list[Any]) -> list[GatheredRows]:
    one = lambda s, rows, columns: dataclasses.replace(s, rows=rows, columns=columns)
    return [one(s, *arrays) for s, arrays in zip(supports, found, strict=True)]


def gathered_u(
    a1: Float[Array, "n j"], a2: Float[Array, "m j"], c: GatheredMetric
) -> Float[Array, "n m i"]:
    """`u[n,m,i] = sum_j c[i,j] a1[n,j] a2[m,j] + offset[i]`: one small matrix product a chunk."""
    left = at(a1.T, c.columns) * c.values[:, :, None]  # [chunks, width, N]
    right = at(a2.T, c.columns)
    parts = jnp.einsum("cwn,cwm->cnm", left, right)
    # Told that rows ascend, XLA takes 45 s on a GPU to compile what takes 0.1 s otherwise.
    ascend = target_device().platform != "gpu"
    u = jax.ops.segment_sum(parts, c.rows, c.stored, indices_are_sorted=ascend)
    return c.spread(u.transpose(1, 2, 0)) + c.offset[None, None]


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
    rows = jnp.minimum(c.rows, d.shape[1] - 1)
    parts = jnp.einsum("cks,cws->ckw", at(d.swapaxes(0, 1), rows), at(a, c.columns))
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
    parts = (
        c.pool(u_bar).transpose(2, 0, 1).at[c.rows].get(mode="fill", fill_value=0)
    )  # [chunks, N, M]

    def one(spec, other, like):
        entries = jnp.einsum(spec, parts, at(other.T, c.columns) * c.values[:, :, None])
        return jnp.zeros_like(like.T).at[c.columns].add(entries).T

    return one("cnm,cwm->cwn", a2, a1), one("cnm,cwn->cwm", a1, a2)


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
    zeros = jnp.zeros((columns, entries.shape[2]), entries.dtype)
    return zeros.at[c.columns].add(entries).T
