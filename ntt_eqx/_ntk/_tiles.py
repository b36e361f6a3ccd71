"""Bring a kernel that is larger than the device to the host, tile by tile."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Shaped

from .._batch import as_array
from .._distribute import replicate
from .._types import PyTree
from ._given import check_side, check_tile, given_model
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

    `ValueError` for a tile that is not two positive integers, for `by_layer=True`, and what `ntk`
    raises.
    """
    check_tiles("ntk_tiles", x1, x2, tile, options)
    model = given_model("ntk_tiles", model)
    return tiles_between(model, x1, x2, tile_shape(x1, x2, tile), options)


def check_tiles(
    caller: str, x1: Any, x2: Any, tile: tuple[int, int], options: dict[str, Any]
) -> None:
    """Raise `ValueError` for bad batches, an invalid tile, or a kernel without symmetry."""
    check_side(caller, "x1", x1)
    if x2 is not None:
        check_side(caller, "x2", x2)
    check_tile(caller, tile)
    if options.get("by_layer"):
        raise ValueError(f"{caller}: a tile is one kernel; by_layer=True goes with ntk alone.")
    if x2 is None and options.get("directions") is not None:
        raise ValueError(f"{caller}: with directions the kernel is not symmetric; pass x2=x1.")


def tile_shape(x1: Any, x2: Any, tile: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of all tiles but the last ones: square if both batches are the same."""
    rows, columns = (min(tile),) * 2 if x2 is None else tile
    return min(rows, len(x1)), min(columns, len(x1 if x2 is None else x2))


def tiles_between(
    model: PyTree,
    x1: Any,
    x2: Any,
    shape: tuple[int, int],
    options: dict[str, Any],
    wanted: Callable[[slice, slice], bool] = lambda rows, columns: True,
) -> Iterator[tuple[slice, slice, np.ndarray]]:
    """Yield the requested tiles `[rows, columns]` of a kernel."""
    symmetric, model = x2 is None, replicate(model)  # once, and not for every tile
    sides = (x1, x1 if symmetric else x2)
    for row in range(0, len(sides[0]), shape[0]):
        for column in range(row if symmetric else 0, len(sides[1]), shape[1]):
            rows = slice(row, min(row + shape[0], len(sides[0])))
            columns = slice(column, min(column + shape[1], len(sides[1])))
            mirrors = symmetric and row != column
            asked = wanted(rows, columns), mirrors and wanted(columns, rows)
            if not any(asked):
                continue
            # A last tile that would be smaller starts earlier, and is cut: one shape, one program.
            starts = [
                min(start, len(x) - size)
                for start, x, size in zip((row, column), sides, shape, strict=True)
            ]
            parts = [
                as_array("ntk_tiles", name, x[start : start + size])
                for name, x, start, size in zip(("x1", "x2"), sides, starts, shape, strict=True)
            ]
            theta = np.asarray(jax.device_get(ntk(model, *parts, **options)))
            theta = theta[row - starts[0] :, column - starts[1] :]
            if asked[0]:
                yield rows, columns, theta
            if asked[1]:
                yield columns, rows, mirrored(theta)
