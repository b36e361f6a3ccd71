"""Kernel ridge regression without the kernel: conjugate gradients, and Nyström's landmarks."""

import math
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from .._batch import as_array, as_stream, pair
from .._checks import check_count, check_finite, check_weight
from .._ntk import AbstractNTKOperator, ntk
from .._types import PyTree
from ._products import HostProduct, check_symmetric, scipy_operator
from ._regression import KernelRidge, kernel_matrix, symmetric_kernel


def fit_kernel_ridge_cg(
    operator: AbstractNTKOperator,
    targets: Float[Array | np.ndarray, "n k"],
    *,
    ridge: float | int,
    rank: int = 0,
    rtol: float | None = None,
    max_steps: int = 1000,
    seed: int = 0,
) -> KernelRidge:
    """Fit kernel ridge regression by preconditioned conjugate gradients, from products alone.

    It solves what `fit_kernel_ridge` solves, `(Theta + ridge I) dual = targets`. The number of
    steps grows with the square root of the condition number. `rank` removes as many of the largest
    eigenvalues from it, by a randomised Nyström approximation of the kernel (Frangella, Tropp &
    Udell, SIAM J. Matrix Anal. Appl. 2023), which takes `rank` products, in blocks that share
    passes through the model.

    **Arguments:**

    - `operator`: `ntk_operator(model, x)`, of the N training samples with themselves.
    - `targets`: `[N, K]`, in the kernel's dtype.
    - `ridge`: above 0, in the units of the kernel.
    - `rank`: of the preconditioner; `0` for none, at most N K.
    - `rtol`: norm of what is left, `targets - (Theta + ridge I) dual`, in that of the targets; by
      default the root of the spacing of the dtype: 3e-4 in float32, 1e-8 in float64.
    - `max_steps`: most products.
    - `seed`: of the approximation.

    **Returns:**

    A `KernelRidge`; call it on `ntk_operator(model, new, x)`, or on that kernel.

    **Raises:**

    `ValueError` for shapes, dtypes and settings that do not fit; `RuntimeError` where the residual,
    computed anew, is above `rtol`. Not under `jit`: the host iterates.
    """
    from scipy.sparse.linalg import cg  # as in `scipy_operator`

    caller = "fit_kernel_ridge_cg"
    check_symmetric(caller, operator)
    like = operator.in_structure()
    targets = as_array(caller, "targets", targets)
    if targets.shape != like.shape or targets.dtype != like.dtype:
        raise ValueError(
            f"{caller}: targets must be {like.dtype} {list(like.shape)}, got {targets.dtype} "
            f"{list(targets.shape)}."
        )
    check_finite(caller, "targets", targets)
    ridge = positive_ridge(caller, ridge)
    check_count(f"{caller}: rank", rank, 0)
    check_count(f"{caller}: max_steps", max_steps)
    if rtol is None:
        rtol = math.sqrt(jnp.finfo(like.dtype).eps)
    check_weight(f"{caller}: rtol", rtol)
    multiply = HostProduct(caller, operator)
    if rank > multiply.rows:
        raise ValueError(f"{caller}: rank must be at most {multiply.rows}, got {rank}.")
    system = scipy_operator(
        multiply.rows, lambda v: multiply(v.reshape(-1)) + ridge * v.reshape(-1)
    )
    b = np.asarray(targets, np.float64).reshape(-1)
    how = {
        "rtol": rtol / 2,
        "maxiter": max_steps,
        "M": _preconditioner(multiply, rank, ridge, seed),
    }
    dual, _ = cg(system, b, **how)
    size = float(np.linalg.norm(b))
    left = float(np.linalg.norm(b - system.matvec(dual)))
    if left > rtol * size:
        raise RuntimeError(
            f"{caller}: after {multiply.count} products {left / size:.1e} of the targets is left, "
            f"more than rtol={rtol:.1e}; raise rank, max_steps, ridge or rtol."
        )
    return KernelRidge(jnp.asarray(dual.reshape(like.shape), like.dtype), 4)


def fit_kernel_ridge_nystrom(
    model: PyTree,
    batches: Iterable[Any],
    landmarks: Shaped[Array | np.ndarray, "m ..."],
    *,
    ridge: float | int,
    **options: Any,
) -> KernelRidge:
    """Fit kernel ridge regression on any number of samples, with M of them as landmarks.

    The regression is restricted to functions `sum_m Theta(x, landmark_m) dual_m` (Williams &
    Seeger, NIPS 2000; Rudi, Camoriano & Rosasco, NIPS 2015, equation 6): with all training samples
    as landmarks it is that of `fit_kernel_ridge`. It takes one pass over the data, `N M` pairs of
    samples, and memory for `[M K, M K]` and one batch.

    **Arguments:**

    - `model`: that of `ntk`.
    - `batches`: a pair `(x, targets [B, K])`, or anything that yields such pairs once. To train on
      labels give what is missing at the model's outputs, `one_hot - outputs`.
    - `landmarks`: M samples, some of the training samples.
    - `ridge`: above 0, in the units of the kernel.
    - `options`: those of `ntk`, such as `kernel` and `outputs`; `outputs="trace"` for one kernel
      for all outputs, with a system of M rows.

    **Returns:**

    A `KernelRidge` of the landmarks; call it on the kernel of new samples with the landmarks.

    **Raises:**

    `ValueError` for bad batches, settings or options, and for no batch at all.
    """
    caller = "fit_kernel_ridge_nystrom"
    ridge = positive_ridge(caller, ridge)
    outputs = options.get("outputs", "full")
    if outputs not in ("full", "trace") or options.get("directions") is not None:
        raise ValueError(f"{caller}: outputs must be 'full' or 'trace', and directions None.")
    own = symmetric_kernel(caller, ntk(model, landmarks, **options))
    among = np.asarray(kernel_matrix(own), np.float64)
    values, vectors = np.linalg.eigh(among)
    eps = float(jnp.finfo(own.dtype).eps)
    kept = values > len(values) * eps * max(values[-1], 0.0)
    root = vectors[:, kept] / np.sqrt(values[kept])  # Theta_mm^(-1/2) where that exists
    system, right = np.zeros((root.shape[1],) * 2), 0.0
    for batch in as_stream(f"{caller}: batches", batches):
        x, y = pair(caller, batch)
        theta = ntk(model, x, landmarks, **options)
        columns = _columns(caller, theta, y)
        features = np.asarray(kernel_matrix(theta), np.float64) @ root
        system += features.T @ features
        right = right + features.T @ columns
    if isinstance(right, float):
        raise ValueError(f"{caller}: there was no batch.")
    system[np.diag_indices_from(system)] += ridge
    dual = root @ np.linalg.solve(system, right)
    return KernelRidge(jnp.asarray(dual.reshape(len(landmarks), -1), own.dtype), own.ndim)


def _columns(caller: str, theta: Array, y: Any) -> np.ndarray:
    """Targets `[B, K]` as columns of the rows of the kernel's matrix."""
    columns = targets_of(caller, len(theta), theta.shape[2] if theta.ndim > 2 else None, y)
    return columns.reshape(-1, 1) if theta.ndim > 2 else columns


def targets_of(caller: str, samples: int, outputs: int | None, y: Any) -> np.ndarray:
    """Targets `[B, K]` in float64; `None` takes any number K of outputs."""
    y = as_array(caller, "targets", y)
    check_finite(caller, "targets", y)
    if y.ndim != 2 or len(y) != samples or outputs not in (None, y.shape[1]):
        k = "K" if outputs is None else outputs
        raise ValueError(
            f"{caller}: targets must be [{samples}, {k}] for this batch, got {list(y.shape)}."
        )
    return np.asarray(y, np.float64)


def _preconditioner(multiply: HostProduct, rank: int, ridge: float, seed: int) -> Any:
    """The inverse of Nyström's approximation with the ridge, scaled to 1 where it is not known."""
    if not rank:
        return None
    rows = multiply.rows
    test = np.linalg.qr(np.random.default_rng(seed).normal(size=(rows, rank)))[0]
    image = multiply(test)
    image += multiply.eps * np.linalg.norm(image) * test
    inner = test.T @ image
    values, vectors = np.linalg.eigh((inner + inner.T) / 2)
    kept = values > multiply.eps * max(values[-1], 0.0)
    if not kept.any():
        return None
    left, singular, _ = np.linalg.svd(
        image @ (vectors[:, kept] / np.sqrt(values[kept])), full_matrices=False
    )
    least = singular[-1] ** 2
    scaled = (least + ridge) / (singular**2 + ridge) - 1
    product = lambda v: v.reshape(-1) + left @ (scaled * (left.T @ v.reshape(-1)))
    return scipy_operator(rows, product)


def positive_ridge(caller: str, ridge: Any) -> float:
    check_weight(f"{caller}: ridge", ridge)
    if not ridge:
        raise ValueError(f"{caller}: ridge must be above 0, got {ridge!r}.")
    return float(ridge)
