"""Sums over all eigenvalues of a kernel that is never formed.

They work on products alone, `ntk_operator(model, x)`, and on the host: vectors are NumPy arrays in
float64, and the device sees one product at a time.
"""

from collections.abc import Callable

import equinox as eqx
import numpy as np
from jaxtyping import Float

from .._checks import check_count, check_weight
from .._ntk import AbstractNTKOperator
from ._eigenpairs import Eigenpairs
from ._products import HostProduct, check_symmetric


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


def _positive(caller: str, ridge: float) -> float:
    check_weight(f"{caller}: ridge", ridge)
    if not ridge:
        raise ValueError(f"{caller}: ridge must be above 0; small eigenvalues are rounding errors.")
    return float(ridge)
