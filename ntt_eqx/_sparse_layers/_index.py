"""`KeptIndex`: where the kept entries of a matrix are, in arrays of static shape."""

import abc
from collections.abc import Sequence

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

# What a group of rows and a pass over eight slots of it cost, in products of entries: a few
# microseconds of launches, where an entry takes 5 ns at 64 samples. A group costs a share of the
# whole as well, because each is a loop to compile.
_GROUP, _PASS, _SHARE = 2000, 500, 0.02
SLOTS = 8


class Group(eqx.Module):
    """Rows with nearly the same number of kept entries, padded to the same.

    Attributes:
        rows: which rows these are.
        others: for each slot and row, the index along the other axis; a padded slot repeats one of
            its row.
        entries: for each slot and row, the number of the entry; of a padded slot the number of
            entries, which is out of range.
    """

    rows: Int[Array, " r"]
    others: Int[Array, "s r"]
    entries: Int[Array, "s r"]


class Side(eqx.Module):
    """The entries by rows, or by columns, in groups of equal width.

    Attributes:
        groups: all rows with entries, the fullest first.
        place: for each row its position in the rows of all groups, behind them if it is empty.
        empty: whether there is an empty row.
    """

    groups: tuple[Group, ...]
    place: Int[Array, " n"]
    empty: bool = eqx.field(static=True)


class AbstractIndex(eqx.Module):
    """Where the kept entries of a matrix `[I, J]` are; they are numbered row by row.

    Attributes:
        order: for each entry its position in the slots of the index.
        shape: `(I, J)`.
    """

    order: eqx.AbstractVar[Int[Array, " kept"]]
    shape: eqx.AbstractVar[tuple[int, int]]

    @abc.abstractmethod
    def scatter(self, values: Array) -> Array:
        """The matrix `[I, J]` with these entries and zeros elsewhere."""

    @abc.abstractmethod
    def chunks(self, width: int) -> tuple[Array, Array, Array]:
        """The entries in chunks of one row each.

        **Returns:**

        The row of each chunk, the columns of its entries and their numbers, `[chunks, width]`; the
        number of all entries where there is none.
        """

    @property
    def kept(self) -> int:
        """The number of entries."""
        return self.order.shape[0]

    def mask(self) -> Bool[Array, "i j"]:
        """The mask that this is the index of."""
        return self.scatter(jnp.ones(self.kept, jnp.int32)).astype(bool)


class KeptIndex(AbstractIndex):
    """The entries by rows and by columns, for masks of any kind.

    Attributes:
        rows: the entries by rows, for products with the matrix.
        columns: the entries by columns, for products with its transpose.
        order: for each entry its position in the slots of all groups of `rows`.
        shape: `(I, J)`.
    """

    rows: Side
    columns: Side
    order: Int[Array, " kept"]
    shape: tuple[int, int] = eqx.field(static=True)

    def __init__(self, mask: Bool[np.ndarray, "i j"]):
        """Index the entries where `mask` is `True`."""
        row, column = np.nonzero(mask)
        self.shape = (mask.shape[0], mask.shape[1])
        self.rows = side_of(row, column, mask.shape[0])
        self.columns = side_of(column, row, mask.shape[1])
        slots = [np.asarray(group.entries).ravel() for group in self.rows.groups]
        entries = np.concatenate([*slots, np.zeros(0, np.int32)])
        order = np.zeros(len(row), np.int32)
        real = np.flatnonzero(entries < len(row))
        order[entries[real]] = real
        self.order = as_int(order)

    def scatter(self, values: Array) -> Array:
        """See `AbstractIndex`."""
        return scatter_groups(values, self.rows.groups, self.shape)

    def chunks(self, width: int) -> tuple[Array, Array, Array]:
        """See `AbstractIndex`; the slots of a row, cut into chunks."""
        return chunks_of_groups(self.rows.groups, width, self.kept)


def scatter_groups(values: Array, groups: Sequence[Group], shape: tuple[int, int]) -> Array:
    """The matrix of this shape with the entries of groups of rows, and zeros elsewhere."""
    matrix = jnp.zeros(shape, values.dtype)
    for group in groups:
        slots = values.at[group.entries].get(mode="fill", fill_value=0)
        matrix = matrix.at[group.rows, group.others].add(slots)
    return matrix


def chunks_of_groups(
    groups: Sequence[Group], width: int, unused: int
) -> tuple[Array, Array, Array]:
    """`AbstractIndex.chunks` of groups of rows; `unused` is the number of no entry."""

    def of(group: Group) -> tuple[Array, Array, Array]:
        slots, rows = group.others.shape
        each = -(-slots // width)
        spare = ((0, 0), (0, each * width - slots))
        columns = jnp.pad(group.others.T, spare).reshape(-1, width)
        entries = jnp.pad(group.entries.T, spare, constant_values=unused).reshape(-1, width)
        return jnp.repeat(group.rows, each, total_repeat_length=rows * each), columns, entries

    rows, columns, entries = (jnp.concatenate(a) for a in zip(*map(of, groups), strict=True))
    order = jnp.argsort(rows)
    return rows[order], columns[order], entries[order]


def as_int(array: np.ndarray) -> Int[Array, "*s"]:
    return jnp.asarray(np.ascontiguousarray(array, np.int32))


def side_of(row: np.ndarray, other: np.ndarray, size: int) -> Side:
    """Entries with these two coordinates by the first, of which there are `size`."""
    by_row = np.argsort(row, kind="stable")
    lengths = np.bincount(row, minlength=size)
    starts = np.cumsum(lengths) - lengths
    ranked = np.argsort(-lengths, kind="stable")
    groups, place, done = [], np.full(size, np.count_nonzero(lengths), np.int32), 0
    for count in group_sizes(lengths[lengths > 0]):
        rows = ranked[done : done + count]
        slot = np.arange(lengths[rows].max())[:, None]
        real = slot < lengths[rows]
        number = by_row[starts[rows] + np.where(real, slot, 0)]
        entries = np.where(real, number, len(row))
        groups.append(Group(as_int(rows), as_int(other[number]), as_int(entries)))
        place[rows] = np.arange(done, done + count)
        done += count
    return Side(tuple(groups), as_int(place), bool(done < size))


def padded_slots(lengths: Int[np.ndarray, " n"]) -> int:
    """The slots of rows of these lengths in groups, padding included."""
    ranked, done, slots = np.sort(lengths)[::-1], 0, 0
    for count in group_sizes(lengths[lengths > 0]):
        slots += int(ranked[done]) * count
        done += count
    return slots


def group_sizes(lengths: Int[np.ndarray, " n"]) -> list[int]:
    """How many of the fullest rows to pad to the same length, and so on: the cheapest division."""
    widths, counts = np.unique(-lengths, return_counts=True)
    widths = -widths
    total = np.concatenate([[0], np.cumsum(counts)])
    once = _GROUP + _SHARE * float(lengths.sum()) + _PASS * np.ceil(widths / SLOTS)
    best, cut = np.zeros(len(total)), np.zeros(len(total), int)
    for end in range(1, len(total)):
        costs = best[:end] + once[:end] + widths[:end] * (total[end] - total[:end])
        cut[end] = int(np.argmin(costs))
        best[end] = costs[cut[end]]
    sizes, end = [], len(total) - 1
    while end:
        sizes.append(int(total[end] - total[cut[end]]))
        end = cut[end]
    return sizes[::-1]
