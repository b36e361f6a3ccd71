"""A kernel that is larger than the device: tile by tile to the host."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, PyTree, Shaped

from .._checks import is_count
from ._ntk import ntk
from ._pairs import mirrored


def ntk_tiles(
    model: PyTree,
    x1: Shaped[Array, "n ..."] | np.ndarray,
    x2: Shaped[Array, "m ..."] | np.ndarray | None = None,
    *,
    tile: tuple[int, int] = (256, 256),
    **options: Any,
) -> Iterator[tuple[slice, slice, np.ndarray]]:
    """The kernel of two batches in tiles, each of them in the host's memory.

    One tile is on the device at a time, so that neither the kernel nor the batches have to fit
    there. With `x2=None` the tiles below the diagonal are those above it turned round, and are not
    computed again.

    **Arguments:**

    - `model`, `x1`, `x2`: those of `ntk`; batches may be NumPy arrays, memory-mapped ones too.
    - `tile`: most rows and columns of a tile.
    - `options`: those of `ntk`, such as `outputs` or `max_bytes`, which then holds for a tile. With
      `directions`, give `x2`.

    **Returns:**

    An iterator over `(rows, columns, tile)`: two slices of the kernel and its entries there,
    `[rows, columns, ...]`, in no particular order and each once.

    **Raises:**

    `ValueError` for a tile that is not two positive integers, and what `ntk` raises.
    """
    if len(tile) != 2 or not all(map(is_count, tile)):
        raise ValueError(f"ntk_tiles: tile must be two positive integers, got {tile!r}.")
    if x2 is None and options.get("directions") is not None:
        raise ValueError("ntk_tiles: with directions the kernel is not symmetric; pass x2=x1.")
    return _tiles(model, x1, x2, tile, options)


def _tiles(
    model: PyTree, x1: Any, x2: Any, tile: tuple[int, int], options: dict[str, Any]
) -> Iterator[tuple[slice, slice, np.ndarray]]:
    symmetric = x2 is None
    side = min(tile)
    shape = (side, side) if symmetric else tile
    sides = (x1, x1 if symmetric else x2)
    shape = tuple(min(size, len(x)) for size, x in zip(shape, sides, strict=True))
    for row in range(0, len(sides[0]), shape[0]):
        for column in range(row if symmetric else 0, len(sides[1]), shape[1]):
            # A last tile that would be smaller starts earlier, and is cut: one shape, one program.
            starts = [
                min(start, len(x) - size)
                for start, x, size in zip((row, column), sides, shape, strict=True)
            ]
            parts = [
                jax.numpy.asarray(x[start : start + size])
                for x, start, size in zip(sides, starts, shape, strict=True)
            ]
            theta = np.asarray(jax.device_get(ntk(model, *parts, **options)))
            theta = theta[row - starts[0] :, column - starts[1] :]
            rows, columns = slice(row, row + len(theta)), slice(column, column + theta.shape[1])
            yield rows, columns, theta
            if symmetric and row != column:
                yield columns, rows, mirrored(theta)
