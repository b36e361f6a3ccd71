"""Kernels as matrices, their eigenvalues, and ridge regression with them.

A kernel is what `ntk` returns for N and M samples: `[N, M, K, L]` for all pairs of outputs,
`[N, M, K]` for their diagonal, `[N, M]` for one kernel that all outputs share.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from .._batch import as_array
from .._checks import check_finite, check_weight
from .._ntk import AbstractNTKOperator


def kernel_matrix(theta: Float[Array | np.ndarray, "n m *outputs"]) -> Float[Array, "rows columns"]:
    """A kernel as a matrix, one row for each sample and output, samples before outputs.

    **Arguments:**

    - `theta`: `[N, M, K, L]`, `[N, M, K]` or `[N, M]`.

    **Returns:**

    `[N K, M L]` with `theta[n, m, k, l]` in row `n K + k` and column `m L + l`; `[N K, M K]` for a
    diagonal kernel, with zeros between different outputs; `[N, M]` as it is.

    **Raises:**

    `ValueError` for another number of axes.
    """
    theta = _checked("kernel_matrix", theta)
    n, m, *outputs = theta.shape
    if not outputs:
        return theta
    if len(outputs) == 1:
        (k,) = outputs
        theta = theta[..., None] * jnp.eye(k, dtype=theta.dtype)[None, None]
        outputs = [k, k]
    k, l = outputs
    return theta.transpose(0, 2, 1, 3).reshape(n * k, m * l)


def kernel_eigenvalues(
    theta: Float[Array | np.ndarray, "n m *outputs"], *, jitter: float | int | None = None
) -> Float[Array, " rows"]:
    """Eigenvalues of the kernel of a batch with itself, the largest first.

    They are the rates at which gradient flow on a squared loss learns the matching directions of
    the outputs (Jacot et al. 2018).

    **Arguments:**

    - `theta`: the kernel of a batch with itself, as `ntk(model, x)` returns it.
    - `jitter`: what is added to every eigenvalue, `>= 0`. By default `eps * trace` of the matrix,
      `eps` being the spacing of its dtype at 1 (1.2e-7 in float32): as much as rounding may move an
      eigenvalue, so that those of a singular kernel come out positive and have a logarithm. `0`
      gives the eigenvalues as computed, of which some may then be negative.

    **Returns:**

    `[N K]` eigenvalues of `kernel_matrix(theta)`; `[N]` for `[N, N]`.

    **Raises:**

    `ValueError` if `theta` is not square or not symmetric, or `jitter` not a number `>= 0`.
    """
    theta = symmetric_kernel("kernel_eigenvalues", theta)
    added = _jitter("kernel_eigenvalues", theta, jitter)
    return jnp.linalg.eigvalsh(kernel_matrix(theta))[::-1] + added


class KernelRidge(eqx.Module):
    """Kernel ridge regression, fitted; `fit_kernel_ridge` makes it.

    Attributes:
        dual: `[N, K]`, the coefficients of the N training samples.
        axes: of the kernel that was fitted: 4 for all pairs of outputs, 3 for one of each output, 2
            for one that they share; `None` takes any.
    """

    dual: Float[Array, "n k"]
    axes: int | None = eqx.field(static=True, default=None)

    def __call__(
        self, theta: Float[Array | np.ndarray, "m n *outputs"] | AbstractNTKOperator
    ) -> Float[Array, "m k"]:
        """Predict at M new samples: `sum_nl theta[m, n, k, l] dual[n, l]`.

        Args:
            theta: the kernel of the new samples with the training samples, in this order, of the
                same kind as the one that was fitted; or `ntk_operator(model, new, x)`.

        Raises:
            ValueError: a kernel of another kind, or of other training samples.
        """
        n, k = self.dual.shape
        if isinstance(theta, AbstractNTKOperator):
            self._check_kind(4)
            return theta.mv(self.dual)
        theta = _checked("KernelRidge", theta)
        self._check_kind(theta.ndim)
        if theta.shape[1] != n or any(size != k for size in theta.shape[2:]):
            raise ValueError(
                f"KernelRidge: fitted to {n} samples of {k} outputs, it needs the kernel of new "
                f"samples with these, [M, {n}, ...]; got shape {theta.shape}."
            )
        pattern = {2: "mn,nk->mk", 3: "mnk,nk->mk", 4: "mnkl,nl->mk"}[theta.ndim]
        return jnp.einsum(pattern, theta, self.dual, precision=jax.lax.Precision.HIGHEST)

    def _check_kind(self, axes: int) -> None:
        """Refuse a kernel of `axes` axes where the fitted one had others."""
        # The coefficients of one kind fit the shapes of all; for one output the kinds are the same.
        if self.axes not in (None, axes) and self.dual.shape[1] > 1:
            kinds = {2: 'outputs="trace"', 3: 'outputs="diagonal"', 4: 'outputs="full"'}
            raise ValueError(
                f"KernelRidge: fitted to a kernel with {kinds[self.axes]}, it needs that of new "
                f"samples to be of this kind, too; got {kinds[axes]}."
            )


def fit_kernel_ridge(
    theta: Float[Array | np.ndarray, "n m *outputs"],
    targets: Float[Array | np.ndarray, "samples *k"],
    *,
    ridge: float | int = 0.0,
    jitter: float | int | None = None,
) -> KernelRidge:
    """Fit kernel ridge regression: `dual = (Theta + (ridge + jitter) I)^-1 targets`.

    With the tangent kernel of a model at its weights, and `targets` less its outputs there, the
    prediction is what the linearised model gains by training to the end on the loss
    `1/2 sum (f - y)^2 + ridge/2 |change of weights|^2` (Lee et al. 2019, section 2.2, for ridge
    0): add the outputs of the model at the new samples. A `SparseModel` whose active kernel is used
    trains its kept weights alone.

    **Arguments:**

    - `theta`: the kernel of the training samples with themselves, `[N, N, K, K]`, `[N, N, K]` (each
      output with its own) or `[N, N]` (all outputs with the same).
    - `targets`: `[N, K]`, of the dtype of `theta`.
    - `ridge`: `>= 0`, in the units of the kernel.
    - `jitter`: added to it so that the Cholesky factor exists; by default as in
      `kernel_eigenvalues`. Kernels of many samples are often too ill-conditioned for float32
      without a ridge: compute them in float64 (`jax.enable_x64`).

    **Returns:**

    A `KernelRidge`; call it on the kernel of new samples with the training samples.

    **Raises:**

    `ValueError` if shapes, dtypes or settings do not fit, if `theta` is not symmetric, or if it is
    not positive definite with this ridge and jitter. Inside `jit`, where values cannot be looked
    at, that last gives NaN.
    """
    caller = "fit_kernel_ridge"
    theta, targets = _checked(caller, theta), as_array(caller, "targets", targets)
    if targets.ndim != 2 or targets.dtype != theta.dtype:
        raise ValueError(
            f"{caller}: targets must be {theta.dtype} [N, K], got {targets.dtype} {targets.shape}."
        )
    k = targets.shape[1]
    if len(targets) != len(theta) or any(size != k for size in theta.shape[2:]):
        raise ValueError(
            f"{caller}: a kernel of shape {theta.shape} does not go with targets of shape "
            f"{targets.shape}."
        )
    check_weight(f"{caller}: ridge", ridge)
    check_finite(caller, "targets", targets)
    theta = symmetric_kernel(caller, theta)
    added = ridge + _jitter(caller, theta, jitter)
    if theta.ndim == 3:  # one system for each output
        dual = jax.vmap(_solve, in_axes=(2, 1, None), out_axes=1)(theta, targets, added)
    else:
        matrix = kernel_matrix(theta)
        dual = _solve(matrix, targets.reshape(len(matrix), -1), added).reshape(targets.shape)
    if not isinstance(dual, Tracer) and not bool(jnp.isfinite(dual).all()):
        raise ValueError(
            f"{caller}: the kernel is not positive definite with ridge={ridge} and "
            f"jitter={jitter}; raise the ridge, or compute the kernel in float64."
        )
    return KernelRidge(dual, theta.ndim)


class KernelGP(eqx.Module):
    """A Gaussian process whose covariance is a kernel, given N samples; `fit_kernel_gp` makes it.

    Attributes:
        ridge: the regression whose predictions are the posterior mean.
        factors: lower Cholesky factors of the training samples' covariance, `[problems, R, R]`:
            one for all outputs together (R = N K, or N), or one for each output (R = N).
    """

    ridge: KernelRidge
    factors: Float[Array, "problems r r"]

    def __call__(
        self,
        cross: Float[Array | np.ndarray, "m n *outputs"],
        prior: Float[Array | np.ndarray, "rows columns *others"],
    ) -> tuple[Float[Array, "m k"], Float[Array, "m m *outputs"]]:
        """Mean `[M, K]` and covariance, a kernel of the form of `prior`, at M new samples.

        Args:
            cross: the kernel of the new samples with the training samples.
            prior: the kernel of the new samples with themselves.
        """
        cross, prior = _checked("KernelGP", cross), symmetric_kernel("KernelGP", prior)
        mean = self.ridge(cross)
        if cross.ndim != prior.ndim or len(cross) != len(prior):
            raise ValueError(
                f"KernelGP: cross and prior must be kernels of one form and of the same new "
                f"samples, got shapes {cross.shape} and {prior.shape}."
            )
        columns = by_problem(cross).swapaxes(1, 2)
        solve = jax.lax.linalg.triangular_solve
        half = solve(self.factors, columns, left_side=True, lower=True)  # L^-1 Theta*^T
        known = jnp.einsum("prm,prs->pms", half, half, precision=jax.lax.Precision.HIGHEST)
        left = by_problem(prior) - known
        if prior.ndim == 3:
            return mean, left.transpose(1, 2, 0)
        if prior.ndim == 2:
            return mean, left[0]
        m, _, k, _ = prior.shape
        return mean, left[0].reshape(m, k, m, k).transpose(0, 2, 1, 3)


def fit_kernel_gp(
    theta: Float[Array | np.ndarray, "n m *outputs"],
    targets: Float[Array | np.ndarray, "samples *k"],
    *,
    noise: float | int = 0.0,
    jitter: float | int | None = None,
) -> KernelGP:
    """The Gaussian process with a kernel as covariance, given noisy targets.

        mean = Theta* (Theta + noise I)^-1 targets
        covariance = Theta** - Theta* (Theta + noise I)^-1 Theta*^T

    (Rasmussen & Williams 2006, equations 2.25 and 2.26.) With the tangent kernel it is the "NTKGP"
    of He, Lakshminarayanan & Teh (NeurIPS 2020, arXiv 2007.05864), the posterior that an ensemble
    of linearised networks samples if each starts at a draw of the prior of covariance Theta. It is
    not the ensemble of standard training, which starts at the network's own outputs and has
    another covariance.

    **Arguments:**

    - `theta`: the kernel of the training samples with themselves, `[N, N, K, K]`, `[N, N, K]` (each
      output a process of its own) or `[N, N]` (all outputs with the same covariance).
    - `targets`: `[N, K]`, of the dtype of `theta`, less the mean of the prior (such as the outputs
      of the model).
    - `noise`: variance of the targets' noise, `>= 0`.
    - `jitter`: added to it so that the Cholesky factor exists; as in `fit_kernel_ridge`.

    **Returns:**

    A `KernelGP`; call it on the kernels of new samples.

    **Raises:**

    What `fit_kernel_ridge` raises.
    """
    check_weight("fit_kernel_gp: noise", noise)
    ridge = fit_kernel_ridge(theta, targets, ridge=noise, jitter=jitter)
    theta = symmetric_kernel("fit_kernel_gp", theta)
    added = noise + _jitter("fit_kernel_gp", theta, jitter)
    kernels = by_problem(theta)
    kernels = kernels + added * jnp.eye(kernels.shape[1], dtype=theta.dtype)[None]
    return KernelGP(ridge, jnp.linalg.cholesky(kernels))


def by_problem(theta: Array) -> Float[Array, "problems rows columns"]:
    """One matrix for all outputs together, or one for each output."""
    return theta.transpose(2, 0, 1) if theta.ndim == 3 else kernel_matrix(theta)[None]


def _solve(
    matrix: Float[Array, "rows rows"], targets: Float[Array, "rows *columns"], added: Array
) -> Float[Array, "rows *columns"]:
    from jax.scipy.linalg import cho_factor, cho_solve  # what `import ntt_eqx` saves

    matrix = matrix + added * jnp.eye(len(matrix), dtype=matrix.dtype)
    return cho_solve(cho_factor(matrix, lower=True), targets)


def _jitter(caller: str, theta: Array, jitter: float | int | None) -> Array:
    if jitter is not None:
        check_weight(f"{caller}: jitter", jitter)
        return jnp.asarray(jitter, theta.dtype)
    same = jnp.diagonal(theta)  # [..., N]: pairs of a sample with itself
    trace = jnp.trace(same).sum() if theta.ndim == 4 else same.sum()
    return jnp.finfo(theta.dtype).eps * trace


def symmetric_kernel(caller: str, theta: Any) -> Array:
    """`theta` made symmetric to the last bit; an error unless it is so but for rounding."""
    theta = _checked(caller, theta)
    axes = (1, 0, *reversed(range(2, theta.ndim)))
    other = theta.transpose(axes)
    if other.shape != theta.shape:
        raise ValueError(
            f"{caller}: needs the kernel of a batch with itself, [N, N, ...]; got shape "
            f"{theta.shape}."
        )
    if theta.size == 0:
        raise ValueError(f"{caller}: the kernel is of no samples, its shape is {theta.shape}.")
    if not isinstance(theta, Tracer):
        check_finite(caller, "theta", theta)
        largest = float(jnp.abs(theta).max())
        if float(jnp.abs(theta - other).max()) > float(jnp.finfo(theta.dtype).eps) ** 0.5 * largest:
            raise ValueError(
                f"{caller}: theta is not symmetric; give the kernel of one batch with itself, "
                "ntk(model, x)."
            )
    return (theta + other) / 2


def _checked(caller: str, theta: Any) -> Array:
    theta = as_array(caller, "theta", theta)
    if not jnp.issubdtype(theta.dtype, jnp.floating):
        raise ValueError(f"{caller}: theta must be floats, got {theta.dtype}.")
    if not 2 <= theta.ndim <= 4:
        raise ValueError(
            f"{caller}: theta must be [N, M, K, L], [N, M, K] or [N, M], got shape {theta.shape}."
        )
    return theta
