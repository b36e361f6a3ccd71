"""The largest eigenpairs of a kernel that is never formed, by block Lanczos with restarts."""

import json
import os
import pathlib
import time
import zipfile

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from .._checks import check_count, check_weight
from .._files import written_whole
from .._ntk import AbstractNTKOperator
from ._products import HostProduct, check_symmetric

_FORMED = 256  # rows up to which all columns are computed
_SAVE_EVERY = 60.0  # seconds between two writes of a checkpoint


class Eigenpairs(eqx.Module):
    """The largest eigenvalues of a kernel with their eigenvectors; `top_eigenpairs` finds them.

    Attributes:
        values: `[R]`, falling.
        vectors: `[N, K, R]`, orthonormal.
        residuals: `[R]`, `|Theta v - lambda v|`. There is an eigenvalue within this distance of
            each value.
        num_products: vectors that the kernel was multiplied by.
    """

    values: Float[np.ndarray, " r"]
    vectors: Float[np.ndarray, "n k r"]
    residuals: Float[np.ndarray, " r"]
    num_products: int = eqx.field(static=True)


def top_eigenpairs(
    operator: AbstractNTKOperator,
    num_pairs: int,
    *,
    tol: float | None = None,
    max_products: int = 20_000,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Eigenpairs:
    """The largest eigenvalues of a kernel and their eigenvectors, by block Lanczos with restarts.

    Blocks of vectors share passes through the model, and the space of their products is cut down to
    its best part when it is full (thick restart: Wu & Simon, SIAM J. Matrix Anal. Appl. 2000). Such
    a space misses some of many equal eigenvalues, and kernels have them: that of a linear model has
    each K times. Found pairs are therefore checked: random vectors orthogonal to them span a new
    space, until nothing there is larger than the least of them. Kernels of up to 256 rows, or of
    which a quarter of all pairs is asked for, are formed.

    **Arguments:**

    - `operator`: `ntk_operator(model, x)`, of a batch with itself.
    - `num_pairs`: R, from 1 to N K.
    - `tol`: the largest residual in units of the largest eigenvalue; by default the square root of
      the spacing of the operator's dtype, at most 1e-6.
    - `max_products`: most products with vectors.
    - `seed`: of the random starts.
    - `checkpoint`: a file for the state of the iterations, at most `3 R + 60` vectors of float64
      and their products, written once a minute and at the end. A call that was stopped, however it
      was, is made again, also with larger `max_products`, and continues with the same bits.

    **Returns:**

    `Eigenpairs`, NumPy arrays in float64. A residual may be a little above `tol` times the largest
    value where float32 products are less exact than that.

    **Raises:**

    `ValueError` for an operator between two batches, settings out of range, products that are not
    finite and the checkpoint of another call; `RuntimeError` without convergence. Not under `jit`:
    the host iterates.
    """
    caller = "top_eigenpairs"
    check_symmetric(caller, operator)
    rows = operator.shape[0]
    check_count(f"{caller}: num_pairs", num_pairs)
    check_count(f"{caller}: max_products", max_products)
    if num_pairs > rows:
        raise ValueError(f"{caller}: num_pairs must be at most {rows}, got {num_pairs}.")
    if tol is None:
        tol = min(1e-6, float(jnp.finfo(operator.in_structure().dtype).eps) ** 0.5)
    check_weight(f"{caller}: tol", tol)
    multiply = HostProduct(caller, operator)
    shape = operator.in_structure().shape
    if rows <= _FORMED or 4 * num_pairs >= rows:
        basis = np.eye(rows)
        return _rayleigh_ritz(basis, multiply(basis).T, multiply, num_pairs, shape)
    lanczos = _BlockLanczos(multiply, num_pairs, tol, seed)
    file = None if checkpoint is None else _Checkpoint(pathlib.Path(checkpoint), lanczos)
    while not lanczos.done:
        if multiply.count + len(lanczos.block) > max_products:
            if file is not None:
                file.write()
            raise RuntimeError(
                f"{caller}: no convergence to tol={tol:.1e} in {multiply.count} products; raise "
                "tol or max_products, or ask for fewer pairs."
            )
        lanczos.step()
        if file is not None and (lanczos.done or file.is_due()):
            file.write()
    size = lanczos.size
    basis, images = lanczos.basis[:size], lanczos.images[:size]
    return _rayleigh_ritz(basis, images, multiply, num_pairs, shape)


class _BlockLanczos:
    """A space of orthonormal vectors, their products, and the block that extends it next.

    Attributes:
        basis: `V`, `[size, rows]` of `[capacity, rows]`.
        images: `V Theta`, in the dtype of the operator.
        small: `V Theta V^T`.
        block: orthonormal vectors that are orthogonal to those of the space.
        known: the wanted eigenvalues when the check began, or none before.
        width: of the next block.
    """

    def __init__(self, multiply: HostProduct, pairs: int, tol: float, seed: int):
        self.multiply, self.pairs, self.tol, self.seed = multiply, pairs, tol, seed
        rows = multiply.rows
        self.capacity = min(rows, 3 * pairs + 60)
        self.basis = np.empty((self.capacity, rows))
        self.images = np.empty((self.capacity, rows), multiply.dtype)
        self.small = np.zeros((self.capacity, self.capacity))
        self.size, self.width, self.done = 0, 8, False
        self.known = np.zeros(0)
        self.block = self._with_random(np.zeros((0, rows)))

    def step(self) -> None:
        """Multiply the block and add it to the space; then choose how to go on."""
        start, stop = self.size, self.size + len(self.block)
        image = self.multiply(self.block.T).T
        self.basis[start:stop], self.images[start:stop] = self.block, image
        inner = self.basis[:stop] @ image.T
        self.small[:stop, start:stop], self.small[start:stop, :stop] = inner, inner.T
        self.size = stop
        values, inside = _falling(self.small[:stop, :stop])
        # Theta times the space lies in the space and in what the last block adds to it. For a Ritz
        # vector that is its residual.
        rest = self._outside(image)
        left, lengths, right = np.linalg.svd(rest, full_matrices=False)
        residuals = np.linalg.norm((left * lengths).T @ inside[start:], axis=0)
        scale = max(float(values[0]), 0.0)
        if self._settled(values, residuals, self.tol * scale):
            if len(self.known) and np.allclose(
                values[: self.pairs], self.known, rtol=0, atol=self.tol * scale
            ):
                self.done = True
                return
            self._check(values, inside)
        else:
            new = right[lengths > self.multiply.eps * scale]
            if stop + self.width > self.capacity < self.multiply.rows:
                self._shrink(inside, self.pairs + (self.capacity - self.pairs) // 3)
            self.block = self._with_random(new)

    def _settled(self, values: np.ndarray, residuals: np.ndarray, limit: float) -> bool:
        """Whether the wanted pairs are exact enough, and in a check the largest of the others."""
        if len(values) == self.multiply.rows:
            self.known = values[: self.pairs]  # the space is whole, and nothing left to check
            return True
        wanted = self.pairs + bool(len(self.known))
        if len(values) < wanted or residuals[: self.pairs].max() > limit:
            return False
        # The largest of the others only has to be told from the least of the wanted ones.
        return wanted == self.pairs or bool(
            residuals[self.pairs] <= max(limit, 1e-2 * values[self.pairs])
        )

    def _check(self, values: np.ndarray, inside: np.ndarray) -> None:
        """Keep the wanted vectors alone, and start again outside of them."""
        # A missing copy of an eigenvalue is found by one vector; where some are, there may be many.
        self.width = min(2 * self.width, 32) if len(self.known) else 1
        self.known = values[: self.pairs]
        self._shrink(inside, self.pairs)
        self.block = self._with_random(np.zeros((0, self.multiply.rows)))

    def _shrink(self, inside: np.ndarray, keep: int) -> None:
        """Replace the space by that of its `keep` best Ritz vectors."""
        turn = inside[:, :keep].T
        self.basis[:keep] = turn @ self.basis[: self.size]
        self.images[:keep] = turn @ self.images[: self.size]
        self.small[:keep, :keep] = turn @ self.small[: self.size, : self.size] @ turn.T
        self.size = keep

    def _with_random(self, block: np.ndarray) -> np.ndarray:
        """A block of the wanted width from these orthonormal vectors, and random ones if too few.

        Random vectors begin a check. They also fill the block when products add nothing new to the
        space.
        """
        rows = self.multiply.rows
        missing = min(self.width, rows - self.size) - len(block)
        rng = np.random.default_rng([self.seed, self.multiply.count])
        block = np.concatenate([block, rng.normal(size=(max(missing, 0), rows))])
        for _ in range(2):
            block = np.linalg.qr(self._outside(block).T)[0].T
        return np.ascontiguousarray(block)

    def _outside(self, vectors: np.ndarray) -> np.ndarray:
        """Their part that is orthogonal to the space."""
        basis = self.basis[: self.size]
        for _ in range(2):  # twice is enough (Parlett 1998, section 6.9)
            vectors = vectors - (vectors @ basis.T) @ basis
        return vectors


class _Checkpoint:
    """A file with the state of the iterations, read where there is one."""

    def __init__(self, path: pathlib.Path, lanczos: _BlockLanczos):
        self._path, self._lanczos, self._written = path, lanczos, time.monotonic()
        settings = {name: getattr(lanczos, name) for name in ("pairs", "tol", "seed", "capacity")}
        dtype = np.dtype(lanczos.multiply.dtype).str
        self._settings = json.dumps(settings | {"rows": lanczos.multiply.rows, "dtype": dtype})
        if path.exists():
            self._read()
        elif not path.parent.is_dir():
            raise ValueError(f"top_eigenpairs: checkpoint: there is no folder {path.parent}.")

    def is_due(self) -> bool:
        """Whether a minute has passed since the last time."""
        return time.monotonic() - self._written >= _SAVE_EVERY

    def write(self) -> None:
        """Write the state, whole or not at all."""
        state = self._lanczos
        with written_whole(self._path) as file:
            np.savez(
                file,
                settings=np.array(self._settings),
                counts=np.array([state.multiply.count, state.width, state.done]),
                basis=state.basis[: state.size],
                images=state.images[: state.size],
                small=state.small[: state.size, : state.size],
                block=state.block,
                known=state.known,
            )
        self._written = time.monotonic()

    def _read(self) -> None:
        state = self._lanczos
        try:
            with open(self._path, "rb") as file, np.load(file) as found:
                same = str(found["settings"]) == self._settings
                if same:
                    count, state.width, done = (int(n) for n in found["counts"])
                    state.done = bool(done)
                    state.size = size = len(found["small"])
                    state.basis[:size], state.images[:size] = found["basis"], found["images"]
                    state.small[:size, :size] = found["small"]
                    state.block, state.known = found["block"], found["known"]
        except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"top_eigenpairs: {self._path} is no checkpoint: {error}") from error
        # The image of one vector tells whether it is the same kernel.
        last = state.multiply(state.basis[state.size - 1]) if same else np.zeros(1)
        if not same or not np.allclose(
            last, state.images[state.size - 1], rtol=0, atol=1e-3 * np.abs(last).max()
        ):
            raise ValueError(
                f"top_eigenpairs: {self._path} is the checkpoint of another kernel, or of other "
                "settings."
            )
        state.multiply.count = count


def _rayleigh_ritz(
    basis: np.ndarray,
    images: np.ndarray,
    multiply: HostProduct,
    num_pairs: int,
    shape: tuple[int, ...],
) -> Eigenpairs:
    """The best pairs in the span of `basis`, and what is left of them: `images` are products."""
    values, inside = _falling(basis @ images.T)
    values, turn = values[:num_pairs], inside[:, :num_pairs].T
    vectors = turn @ basis
    residuals = np.linalg.norm(turn @ images - values[:, None] * vectors, axis=1)
    return Eigenpairs(values, vectors.T.reshape(*shape, num_pairs), residuals, multiply.count)


def _falling(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues of a symmetric matrix, the largest first, and the vectors as columns."""
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    return values[::-1], vectors[:, ::-1]
