"""Spectra of kernels that are never formed: largest eigenpairs, and sums over all eigenvalues.

Both work on products alone, `ntk_operator(model, x)`, and on the host: vectors are NumPy arrays in
float64, and the device sees one product at a time.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from .._checks import check_count, check_weight
from .._ntk import AbstractNTKOperator

_FORMED = 256  # rows up to which all columns are computed
_BLOCK = 32  # vectors that share a product


class Eigenpairs(eqx.Module):
    """The largest eigenvalues of a kernel with their eigenvectors; `top_eigenpairs` finds them.

    Attributes:
        values: `[R]`, falling.
        vectors: `[N, K, R]`, orthonormal.
        residuals: `[R]`, `|Theta v - lambda v|`. There is an eigenvalue within this distance of
            each value.
    """

    values: Float[np.ndarray, " r"]
    vectors: Float[np.ndarray, "n k r"]
    residuals: Float[np.ndarray, " r"]


def top_eigenpairs(
    operator: AbstractNTKOperator,
    num_pairs: int,
    *,
    tol: float | None = None,
    max_products: int = 20_000,
    seed: int = 0,
) -> Eigenpairs:
    """The largest eigenvalues of a kernel and their eigenvectors, by implicitly restarted Lanczos.

    ARPACK (Lehoucq, Sorensen & Yang 1998) finds one eigenvector of each of many equal eigenvalues
    for sure, and kernels have them: that of a linear model has each K times. It therefore runs
    again on what is orthogonal to the pairs so far, until nothing there is larger than the least
    of them. A Rayleigh-Ritz step in the span of all gives the result and its residuals. Kernels of
    up to 256 rows, or of which a quarter of all pairs is asked for, are formed.

    **Arguments:**

    - `operator`: `ntk_operator(model, x)`, of a batch with itself.
    - `num_pairs`: R, from 1 to N K.
    - `tol`: the largest residual in units of the largest eigenvalue; by default the square root of
      the spacing of the operator's dtype, at most 1e-6.
    - `max_products`: most products with vectors.
    - `seed`: of the random starts.

    **Returns:**

    `Eigenpairs`, NumPy arrays in float64. A residual may be a little above `tol` times the largest
    value where float32 products are less exact than that.

    **Raises:**

    `ValueError` for an operator between two batches, settings out of range and products that are
    not finite; `RuntimeError` without convergence. Not under `jit`: the host iterates.
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
    if rows <= _FORMED or 4 * num_pairs >= rows:
        basis = np.eye(rows)
    else:
        basis = _Lanczos(multiply, num_pairs, tol, max_products, seed).basis()
    return _rayleigh_ritz(multiply, basis, num_pairs, operator.in_structure().shape)


class SpectralDensity(eqx.Module):
    """The spectrum of a kernel as weighted points, for sums over all eigenvalues.

    `spectral_density` makes it. The sums are estimates, but for those over the pairs that it was
    given; `sum` returns their standard errors.

    Attributes:
        nodes: `[P, S]`, estimates of eigenvalues from each of P random vectors.
        weights: `[P, S]`, the number of eigenvalues for which a node stands.
        exact: `[R]`, eigenvalues that are known.
    """

    nodes: Float[np.ndarray, "probes steps"]
    weights: Float[np.ndarray, "probes steps"]
    exact: Float[np.ndarray, " r"]

    def sum(self, function: Callable[[np.ndarray], np.ndarray]) -> tuple[float, float]:
        """`sum_i f(lambda_i)` over all eigenvalues, and its standard error over the probes.

        Args:
            function: of a NumPy array of eigenvalues, entry by entry.
        """
        used = self.weights > 0  # log(0) of a node without weight is no part of the sum
        terms = np.where(used, function(np.where(used, self.nodes, 1.0)), 0.0) * self.weights
        sums = terms.sum(axis=1)
        error = sums.std(ddof=1) / len(sums) ** 0.5 if len(sums) > 1 else np.inf
        return float(np.sum(function(self.exact)) + sums.mean()), float(error)

    def trace(self) -> float:
        """The trace, by Hutchinson's estimator; `operator.diagonal().sum()` is exact."""
        return self.sum(lambda v: v)[0]

    def log_determinant(self, ridge: float) -> float:
        """`log det (Theta + ridge I)`.

        Args:
            ridge: above 0.
        """
        ridge = _positive("log_determinant", ridge)
        return self.sum(lambda v: np.log(v + ridge))[0]

    def effective_rank(self) -> float:
        """The exponential of the spectrum's entropy (Roy & Vetterli, EUSIPCO 2007)."""
        trace = self.trace()
        if trace <= 0:
            return 0.0
        log = lambda v: v * np.log(np.where(v > 0, v / trace, 1.0))
        return float(np.exp(-self.sum(log)[0] / trace))

    def effective_dimension(self, ridge: float) -> float:
        """`tr Theta (Theta + ridge I)^-1`, the degrees of freedom of kernel ridge regression.

        Args:
            ridge: above 0.
        """
        ridge = _positive("effective_dimension", ridge)
        return self.sum(lambda v: v / (v + ridge))[0]

    def condition(self, ridge: float) -> float:
        """The condition number of `Theta + ridge I`, from below: of the nodes that were found.

        Args:
            ridge: above 0. The condition is at most `1 + largest / ridge`.
        """
        ridge = _positive("condition", ridge)
        all_of_them = np.concatenate([self.nodes[self.weights > 0], self.exact])
        return float((all_of_them.max() + ridge) / (all_of_them.min() + ridge))


def spectral_density(
    operator: AbstractNTKOperator,
    *,
    num_probes: int = 8,
    num_steps: int = 50,
    pairs: Eigenpairs | None = None,
    seed: int = 0,
) -> SpectralDensity:
    """The spectrum of a kernel by stochastic Lanczos quadrature, from products alone.

    (Ubaru, Chen & Saad, SIAM J. Matrix Anal. Appl. 2017; Ghorbani, Krishnan & Xiao, ICML 2019.)
    Few eigenvalues hold most of a kernel's trace, and most of the variance of such estimates: give
    the largest `pairs`, and only the rest is estimated.

    **Arguments:**

    - `operator`: `ntk_operator(model, x)`, of a batch with itself.
    - `num_probes`: P, random vectors on the sphere; the standard error falls as `1 / sqrt(P)`.
    - `num_steps`: S, Lanczos steps from each, with full reorthogonalisation, for which `P S`
      vectors `[N, K]` of float64 are stored. The quadrature is exact for polynomials of degree
      `2 S - 1`, and for all functions once S reaches the number of different eigenvalues.
    - `pairs`: eigenpairs of this kernel from `top_eigenpairs`, which count exactly.
    - `seed`: of the probes.

    **Returns:**

    A `SpectralDensity`.

    **Raises:**

    `ValueError` for an operator between two batches, counts below 1, pairs of another kernel's
    shape and products that are not finite.
    """
    caller = "spectral_density"
    check_symmetric(caller, operator)
    check_count(f"{caller}: num_probes", num_probes)
    check_count(f"{caller}: num_steps", num_steps)
    rows = operator.shape[0]
    exact, vectors = np.zeros(0), np.zeros((rows, 0))
    if pairs is not None:
        if pairs.vectors.shape[:2] != operator.in_structure().shape:
            raise ValueError(
                f"{caller}: pairs have vectors of shape {pairs.vectors.shape[:2]}, the operator "
                f"takes {operator.in_structure().shape}."
            )
        exact, vectors = np.maximum(pairs.values, 0.0), pairs.vectors.reshape(rows, -1)
    left = rows - len(exact)  # eigenvalues that are not known
    probes = np.random.default_rng(seed).normal(size=(rows, num_probes))
    probes -= vectors @ (vectors.T @ probes)
    probes = probes / np.linalg.norm(probes, axis=0, keepdims=True) if left else 0 * probes
    multiply, steps = HostProduct(caller, operator), max(min(num_steps, left), 1)
    diagonal, beside = _tridiagonals(multiply, probes, vectors, steps)
    matrices = np.zeros((num_probes, steps, steps))
    at = np.arange(steps)
    matrices[:, at, at] = diagonal
    matrices[:, at[1:], at[:-1]] = beside[:, : steps - 1]
    nodes, inside = np.linalg.eigh(matrices)
    weights = left * inside[:, 0, :] ** 2
    return SpectralDensity(np.maximum(nodes, 0.0), weights, exact)


class HostProduct:
    """Products of a kernel with matrices `[N K, R]` of NumPy, in float64."""

    def __init__(self, caller: str, operator: AbstractNTKOperator):
        self._caller, self._operator = caller, operator
        self.rows = operator.shape[0]
        self.eps = float(jnp.finfo(operator.in_structure().dtype).eps)
        self.count = 0  # vectors multiplied so far

    def __call__(self, vectors: np.ndarray) -> np.ndarray:
        """The product with one vector, or with the columns of a matrix."""
        like = self._operator.in_structure()
        if vectors.ndim == 1:
            return self(vectors[:, None])[:, 0]
        found = []
        for start in range(0, vectors.shape[1], _BLOCK):
            part = vectors[:, start : start + _BLOCK]
            v = jnp.asarray(part.reshape(*like.shape, -1), like.dtype)
            one = part.shape[1] == 1
            product = self._operator.mv(v[..., 0])[..., None] if one else self._operator.mv(v)
            found.append(np.asarray(product, np.float64).reshape(-1, part.shape[1]))
        self.count += vectors.shape[1]
        result = np.concatenate(found, axis=1)
        if not np.isfinite(result).all():
            raise ValueError(
                f"{self._caller}: a product of the kernel has NaN or infinite entries."
            )
        return result


def scipy_operator(rows: int, product: Callable[[np.ndarray], np.ndarray]) -> Any:
    """A square operator of float64 for SciPy's solvers."""
    from scipy.sparse.linalg import LinearOperator  # 0.2 seconds, which `import ntt_eqx` saves

    make: Any = LinearOperator  # its constructor is annotated wrongly
    return make((rows, rows), matvec=product, dtype=np.float64)


class _Lanczos:
    """ARPACK on what is orthogonal to the eigenvectors so far, until nothing larger is left."""

    def __init__(self, multiply: HostProduct, pairs: int, tol: float, most: int, seed: int):
        self._multiply, self._pairs, self._tol, self._most = multiply, pairs, tol, most
        self._rng = np.random.default_rng(seed)

    def basis(self) -> np.ndarray:
        """Orthonormal columns that span the eigenvectors, up to the tolerance."""
        v = self._start()
        for _ in range(4):
            v = self._multiply(v)
            if not np.any(v):
                break
            v /= np.linalg.norm(v)
        scale = float(v @ self._multiply(v))
        rows = len(v)
        values, vectors, count = np.zeros(0), np.zeros((rows, 0)), self._pairs
        while scale > 0:
            new, found = self._largest(values, vectors, scale, count)
            least = values[-1] if len(values) == self._pairs else -np.inf
            if new.max() <= least + self._tol * scale:
                break
            order = np.argsort(-np.concatenate([values, new]))[: self._pairs]
            # Equal eigenvalues: what was found anew is orthogonal but for rounding.
            vectors = np.concatenate([vectors, found], axis=1)[:, order]
            count = 1 if not len(values) else min(2 * count, self._pairs)
            values = np.concatenate([values, new])[order]
        wanted = self._pairs - vectors.shape[1]
        filled = np.concatenate([vectors, self._rng.normal(size=(rows, wanted))], axis=1)
        return np.linalg.qr(filled)[0]

    def _largest(
        self, values: np.ndarray, vectors: np.ndarray, scale: float, count: int
    ) -> tuple[np.ndarray, np.ndarray]:
        def product(v: np.ndarray) -> np.ndarray:
            v = v.reshape(-1)
            # Shifted by the scale, ARPACK's test, which is relative, is one of absolute residuals.
            return self._multiply(v) - vectors @ (values * (vectors.T @ v)) + scale * v

        from scipy.sparse.linalg import ArpackNoConvergence, eigsh

        find: Any = eigsh  # SciPy annotates `tol` as an integer
        rows = len(vectors)
        width = min(max(2 * count + 1, 20), rows)
        left = max(self._most - self._multiply.count, width)
        try:
            found, new = find(
                scipy_operator(rows, product),
                count,
                which="LA",
                ncv=width,
                tol=self._tol,
                v0=self._start() - vectors @ (vectors.T @ self._start()),
                maxiter=-(-left // (width - count)),
            )
        except ArpackNoConvergence as error:
            raise RuntimeError(
                f"top_eigenpairs: no convergence to tol={self._tol:.1e} in {self._multiply.count} "
                "products; raise tol or max_products, or ask for fewer pairs."
            ) from error
        return found - scale, new

    def _start(self) -> np.ndarray:
        return self._rng.normal(size=self._multiply.rows)


def _rayleigh_ritz(
    multiply: HostProduct, basis: np.ndarray, num_pairs: int, shape: tuple[int, ...]
) -> Eigenpairs:
    image = multiply(basis)
    small = basis.T @ image
    values, inside = np.linalg.eigh((small + small.T) / 2)
    values, inside = values[::-1][:num_pairs], inside[:, ::-1][:, :num_pairs]
    vectors = basis @ inside
    residuals = np.linalg.norm(image @ inside - vectors * values, axis=0)
    return Eigenpairs(values, vectors.reshape(*shape, num_pairs), residuals)


def _tridiagonals(
    multiply: HostProduct, probes: np.ndarray, known: np.ndarray, steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """Lanczos from each probe of length 1: diagonals `[P, S]`, and the numbers beside them.

    Where the Krylov space ends, what follows is zero, so that its nodes have no weight.
    """
    rows, count = probes.shape
    unit = lambda v, length: np.divide(v, length, out=np.zeros_like(v), where=length > 0)
    basis = np.zeros((steps, rows, count))
    basis[0] = probes
    diagonal, beside = np.zeros((count, steps)), np.zeros((count, steps))
    scale = np.zeros(count)
    for n in range(steps):
        v = multiply(basis[n])
        diagonal[:, n] = np.sum(basis[n] * v, axis=0)
        for _ in range(2):  # twice is enough (Parlett 1998, section 6.9)
            v -= known @ (known.T @ v)
            inner = np.einsum("srp,rp->sp", basis[: n + 1], v)
            v -= np.einsum("srp,sp->rp", basis[: n + 1], inner)
        length = np.linalg.norm(v, axis=0)
        scale = np.maximum(scale, np.abs(diagonal[:, n]) + length)
        length = np.where(length > multiply.eps * scale, length, 0.0)
        beside[:, n] = length
        if n + 1 < steps:
            basis[n + 1] = unit(v, length[None] * np.ones((rows, 1)))
    return diagonal, beside


def check_symmetric(caller: str, operator: AbstractNTKOperator) -> None:
    """Raise `ValueError` unless the operator is the kernel of a batch with itself."""
    if not operator.is_symmetric:
        raise ValueError(
            f"{caller}: the operator must be that of a batch with itself, ntk_operator(model, x)."
        )


def _positive(caller: str, ridge: float) -> float:
    check_weight(f"{caller}: ridge", ridge)
    if not ridge:
        raise ValueError(f"{caller}: ridge must be above 0; small eigenvalues are rounding errors.")
    return float(ridge)
