"""Alignment of two kernels, or of a kernel with labels, from tiles: neither is ever formed."""

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from jaxtyping import Array, Float

from .._batch import as_array
from .._checks import check_count, check_finite
from .._ntk import NTKOperator, ntk_tiles
from ._products import check_symmetric


def kernel_alignment(
    one: NTKOperator,
    two: NTKOperator | Float[Array | np.ndarray, "n k"],
    *,
    outputs: Literal["full", "trace"] = "full",
    tile: int = 256,
) -> float:
    """The centred alignment of two kernels of the same N samples, or of a kernel with targets.

        A = <C Theta_1 C, C Theta_2 C> / (|C Theta_1 C| |C Theta_2 C|)

    (CKA; Cortes, Mohri & Rostamizadeh, JMLR 2012, definition 4.) `C` subtracts the mean over the
    samples, for each output. Targets `y` have the kernel `y_nk y_ml`: the alignment of the tangent
    kernel with the labels (Baratin et al., AISTATS 2021). It is 1 for kernels that are the same up
    to scale; a kernel that is constant over all samples has 0.

    **Arguments:**

    - `one`: `ntk_operator(model, x)`, of a batch with itself.
    - `two`: that of another model, which may be masked otherwise, with as many samples and outputs;
      or targets `[N, K]`, such as one-hot labels.
    - `outputs`: `"full"` for all pairs of outputs, as `Alignment` compares them; `"trace"` for the
      kernels between samples, summed over the outputs, as `compare_kernels` does.
    - `tile`: samples on a side of the tiles. All tiles are computed: `N^2 / 2` pairs of samples,
      and memory for one tile.

    **Returns:**

    A number from -1 to 1, summed up in float64.

    **Raises:**

    `ValueError` for an operator between two batches, kernels of different shapes, targets of
    another shape, and entries that are not finite.
    """
    caller = "kernel_alignment"
    check_symmetric(caller, one)
    check_count(f"{caller}: tile", tile)
    if outputs not in ("full", "trace"):
        raise ValueError(f"{caller}: outputs must be 'full' or 'trace', got {outputs!r}.")
    shape = one.in_structure().shape
    if isinstance(two, NTKOperator):
        check_symmetric(caller, two)
        other = two.in_structure().shape
    else:
        two = np.asarray(as_array(caller, "two", two), np.float64)
        check_finite(caller, "two", two)
        other = two.shape
    if other != shape:
        raise ValueError(
            f"{caller}: both kernels must have as many samples and outputs, got {shape} and "
            f"{other}."
        )
    n, k = shape
    sums = _Sums(n, k if outputs == "full" else 1)
    pairs = zip(_tiles(one, outputs, tile, n), _tiles(two, outputs, tile, n), strict=True)
    for (rows, columns, first), (_, _, second) in pairs:
        sums.add(rows, columns, first, second)
    return sums.alignment(caller)


Tile = tuple[slice, slice, np.ndarray]


def _tiles(kernel: Any, outputs: str, tile: int, n: int) -> Iterator[Tile]:
    """The tiles on and above the diagonal, `[rows, columns, K, K]` in float64."""
    if isinstance(kernel, NTKOperator):
        how = dict(kernel=kernel.kernel, metric=kernel.metric, precision=kernel.precision)
        found = ntk_tiles(
            kernel.model, np.asarray(kernel.x1), tile=(tile, tile), outputs=outputs, **how
        )
        for rows, columns, theta in found:
            if rows.start <= columns.start:
                yield (
                    rows,
                    columns,
                    theta.astype(np.float64).reshape(*theta.shape[:2], *_last(theta)),
                )
        return
    for start in range(0, n, tile):
        for other in range(start, n, tile):
            rows, columns = slice(start, min(start + tile, n)), slice(other, min(other + tile, n))
            one, two = kernel[rows], kernel[columns]
            pattern = "nk,ml->nmkl" if outputs == "full" else "nk,mk->nm"
            theta = np.einsum(pattern, one, two)
            yield rows, columns, theta.reshape(*theta.shape[:2], *_last(theta))


def _last(theta: np.ndarray) -> tuple[int, int]:
    return theta.shape[2:] if theta.ndim == 4 else (1, 1)  # pyright: ignore[reportReturnType]


class _Sums:
    """Products of two kernels' entries, and what centring takes off them."""

    def __init__(self, n: int, k: int):
        self._n = n
        self._products = np.zeros(3)  # 11, 12, 22
        self._rows = np.zeros((2, n, k, k))  # sums over the columns

    def add(self, rows: slice, columns: slice, one: np.ndarray, two: np.ndarray) -> None:
        both = rows.start != columns.start
        found = [np.vdot(one, one), np.vdot(one, two), np.vdot(two, two)]
        self._products += (1 + both) * np.array(found)
        for side, theta in enumerate((one, two)):
            self._rows[side, rows] += theta.sum(axis=1)
            if both:
                self._rows[side, columns] += theta.sum(axis=0).swapaxes(1, 2)

    def alignment(self, caller: str) -> float:
        means = self._rows / self._n
        # <C A C, C B C> = <A, B> - 2 n <row means> + n^2 <means>, for A and B symmetric
        grand = means.mean(axis=1)
        centred = lambda a, b, product: (
            product
            - 2 * self._n * np.vdot(means[a], means[b])
            + self._n**2 * np.vdot(grand[a], grand[b])
        )
        one, both, two = (centred(a, b, p) for (a, b), p in zip(
            ((0, 0), (0, 1), (1, 1)), self._products, strict=True
        ))  # fmt: skip
        if not np.isfinite([one, both, two]).all():
            raise ValueError(f"{caller}: a kernel has NaN or infinite entries.")
        rounding = 1e-12 * self._products[[0, 2]]
        if one <= rounding[0] or two <= rounding[1]:
            return 0.0
        return float(both / np.sqrt(one * two))
