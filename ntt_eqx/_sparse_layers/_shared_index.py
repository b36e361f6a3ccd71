"""`SharedIndex`: the entries of a matrix of which groups of rows keep the same columns."""

import math
from typing import TypeAlias

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from ._index import (
    AbstractIndex,
    Group,
    KeptIndex,
    Side,
    as_int,
    chunks_of_groups,
    scatter_groups,
    side_of,
)

# A product of fewer rows is slower than one that takes the entries singly.
_FEWEST = 8
# Groups that keep unequally many columns are padded. So many slots a tile are too many.
_MOST_PADDING = 1.5

Index: TypeAlias = "SharedIndex | KeptIndex"


class SharedIndex(AbstractIndex):
    """The entries of groups of rows that keep the same columns, as small dense matrices.

    A column that a group keeps is a tile of `height` entries; the last group may have fewer rows.

    Attributes:
        inputs: the columns that each group keeps; one again where it keeps fewer than others.
        entries: the numbers of the entries of each group, a matrix; the number of all where there
            is none.
        columns: the tiles by columns; `others` are their places in `inputs`.
        order: for each entry its position in `entries`.
        tiles: the number of columns that groups keep, all together.
        shape: `(I, J)`.
    """

    inputs: Int[Array, "groups inputs"]
    entries: Int[Array, "groups height inputs"]
    columns: Side
    order: Int[Array, " kept"]
    tiles: int = eqx.field(static=True)
    shape: tuple[int, int] = eqx.field(static=True)

    def __init__(self, mask: Bool[np.ndarray, "i j"], height: int):
        """Index the entries where `mask` is `True`; `height` rows after one another are alike."""
        tiles = mask[::height]
        group, column = np.nonzero(tiles)
        per_group = tiles.sum(1)
        width = int(per_group.max())
        place = np.arange(len(group)) - np.repeat(np.cumsum(per_group) - per_group, per_group)
        inputs = np.zeros((len(tiles), width), np.int32)
        inputs[group, place] = column
        numbers = np.cumsum(mask).reshape(mask.shape) - 1
        entries = np.full((len(tiles), height, width), int(mask.sum()), np.int32)
        missing = len(tiles) * height - len(mask)  # rows of the last group
        rows = np.pad(numbers, ((0, missing), (0, 0)), constant_values=int(mask.sum()))
        entries[group, :, place] = rows.reshape(len(tiles), height, -1)[group, :, column]
        order = np.zeros(int(mask.sum()), np.int32)
        real = np.flatnonzero(entries.ravel() < len(order))
        order[entries.ravel()[real]] = real
        self.inputs, self.entries, self.order = map(as_int, (inputs, entries, order))
        self.columns = side_of(column, group * width + place, mask.shape[1])
        self.tiles = len(group)
        self.shape = (mask.shape[0], mask.shape[1])

    def scatter(self, values: Array) -> Array:
        """See `AbstractIndex`."""
        return scatter_groups(values, [self._rows], self.shape)

    def chunks(self, width: int) -> tuple[Array, Array, Array]:
        """See `AbstractIndex`; the slots of a row, cut into chunks."""
        return chunks_of_groups([self._rows], width, self.kept)

    @property
    def _rows(self) -> Group:
        groups, height, width = self.entries.shape
        others = jnp.broadcast_to(self.inputs[:, None], self.entries.shape)
        by_slot = lambda a: a.reshape(groups * height, width)[: self.shape[0]].T
        rows = jnp.arange(self.shape[0], dtype=jnp.int32)
        return Group(rows, by_slot(others), by_slot(self.entries))


def index_of(mask: Bool[np.ndarray, "i j"]) -> Index:
    """The index of a mask, by groups of rows where these are alike."""
    height = shared_rows(mask)
    return KeptIndex(mask) if height == 1 else SharedIndex(mask, height)


def shared_rows(mask: Bool[np.ndarray, "i j"]) -> int:
    """How many rows after one another keep the same columns; 1 where that is of no use."""
    if not mask.any():
        return 1
    edges = np.flatnonzero((mask[1:] != mask[:-1]).any(1)) + 1
    height = math.gcd(*edges.tolist()) or len(mask)
    kept = mask[::height].sum(1)
    padded = len(kept) * int(kept.max()) > _MOST_PADDING * int(kept.sum())
    return 1 if height < _FEWEST or padded else height
