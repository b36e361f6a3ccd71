"""A model made linear in its parameters, and its training in closed form.

For a tangent kernel `Theta` and the loss `L(f)` of the outputs `f` of the training samples,
gradient flow on the parameters of the linearised model moves the outputs by `df/dt = -Theta dL/df`
(Lee et al. 2019, arXiv 1902.06720, section 2.2). All that happens to the outputs of any sample is
`f_0 + Theta(x, training) a`, where `a` sums up `-dL/df`: the *dual coefficients*.
"""

import math
import numbers
from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Shaped

from .._batch import as_array
from .._checks import check_count, check_finite
from .._ntk import NTKOperator
from .._parameters import Fixed, partition_parameters
from .._sparse import SparseModel
from .._types import PyTree
from ._regression import KernelRidge, by_problem, symmetric_kernel


class LinearizedModel(eqx.Module):
    """The first-order Taylor expansion of a model in its parameters; `linearize` makes it.

        f_lin(x; theta) = f(x; theta_0) + J(x; theta_0) (theta - theta_0)

    (Lee et al. 2019, section 2.2.) Train, evaluate and prune it as any other model: its parameters
    are `theta`. `theta_0` is no parameter, and gets no gradient.

    Attributes:
        model: the model with the weights `theta`.
        origin: the model with the weights `theta_0`.
    """

    model: PyTree
    origin: Fixed

    def __call__(self, x: Shaped[Array | np.ndarray, "..."]) -> Float[Array, "..."]:
        """The outputs for one sample, at the cost of one forward derivative of the model.

        Args:
            x: one sample.
        """
        theta, _ = partition_parameters(self.model)
        origin, rest = partition_parameters(self.origin.value)
        origin = jax.lax.stop_gradient(origin)
        change = jax.tree.map(jnp.subtract, theta, origin)
        outputs = lambda parameters: eqx.combine(parameters, rest)(x)
        at_origin, moved = jax.jvp(outputs, (origin,), (change,))
        return at_origin + moved


def linearize(model: PyTree) -> PyTree:
    """The model that is linear in its parameters, and has the values and derivatives of `model`.

    Its tangent kernel is that of `model`, wherever it is trained to.

    **Arguments:**

    - `model`: any Equinox model with a forward derivative, or other callable PyTree. It runs in
      the mode that it has; see `eqx.nn.inference_mode`. Of a `SparseModel` the kept weights move,
      and the pruned ones are zero before and after.

    **Returns:**

    A `LinearizedModel`; for a `SparseModel` one with a `LinearizedModel` under the same masks.

    **Raises:**

    `ValueError` if `model` has no parameters.
    """
    if not isinstance(model, SparseModel):
        if not jax.tree.leaves(partition_parameters(model)[0]):
            raise ValueError(
                "linearize: the model has no parameters. Of a function f(params, x) make a model "
                "by eqx.Partial(f, params)."
            )
        return LinearizedModel(model, Fixed(model))
    dense: Any = LinearizedModel(model.model, Fixed(model.to_dense()))
    mask: Any = LinearizedModel(model.mask, Fixed(None))
    return SparseModel(dense, mask)


class MSEPath(eqx.Module):
    """Training of a linearised model on squared error; `mse_path` makes it.

    One problem for all outputs together, or one for each output, by its eigenvectors.

    Attributes:
        eigenvalues: `[problems, rows]`, of the kernel, 0 where they are rounding errors.
        vectors: `[problems, rows, rows]`.
        residuals: `[problems, rows, columns]`, in the eigenvectors' coordinates; 0 where the
            eigenvalue is.
        shape: `(N, K)`.
        learning_rate: of a step, or `None` for gradient flow.
        axes: of the kernel; see `KernelRidge`.
    """

    eigenvalues: Float[Array, "problems rows"]
    vectors: Float[Array, "problems rows rows"]
    residuals: Float[Array, "problems rows columns"]
    shape: tuple[int, int] = eqx.field(static=True)
    learning_rate: float | None = eqx.field(static=True)
    axes: int | None = eqx.field(static=True, default=None)

    def __call__(self, time: Any) -> KernelRidge:
        """The change that training has made after some time, as a function of a kernel.

        Args:
            time: `>= 0`; of gradient flow the time, otherwise the number of steps, an integer. It
                may be traced; NaN results from a traced one that cannot be.

        Raises:
            ValueError: a time that is known is negative or infinite, or no number of steps.
        """
        time = jnp.asarray(time)
        possible = (time >= 0) & jnp.isfinite(time)
        if self.learning_rate is not None:
            possible &= time == jnp.floor(time)
        if not isinstance(time, Tracer) and not bool(possible):
            what = "finite" if self.learning_rate is None else "a number of steps"
            raise ValueError(f"MSEPath: time must be >= 0 and {what}, got {time}.")
        learnt = jnp.where(possible, self._learnt(time), jnp.nan)[..., None] * self.residuals
        dual = jnp.einsum("prc,prs->psc", learnt, self.vectors.swapaxes(1, 2), precision="highest")
        n, k = self.shape
        if len(dual) > 1:
            return KernelRidge(dual[..., 0].T, self.axes)
        return KernelRidge(dual.reshape(n, k), self.axes)

    def _learnt(self, time: Array) -> Float[Array, "problems rows"]:
        """`(1 - r) / lambda`, where `r` is the share of an eigenvector's residual that is left."""
        rates = self.eigenvalues
        if self.learning_rate is None:
            limit = time.astype(rates.dtype)
            left = jnp.expm1(-rates * limit)
        else:
            limit = self.learning_rate * time.astype(rates.dtype)
            left = _power_minus_one(-self.learning_rate * rates, time)
        flat = jnp.abs(rates * limit) < jnp.finfo(rates.dtype).eps  # the quotient's limit at 0
        return jnp.where(flat, limit, -left / jnp.where(flat, 1.0, rates).astype(rates.dtype))


def mse_path(
    theta: Float[Array | np.ndarray, "n m *outputs"],
    residuals: Float[Array | np.ndarray, "samples k"],
    *,
    learning_rate: float | int | None = None,
) -> MSEPath:
    """Training on `1/2 sum (f - y)^2` at any time, in closed form.

    In an eigenvector of the kernel with the eigenvalue `lambda` what is left of the residual after
    the time t is `exp(-lambda t)` under gradient flow (Lee et al. 2019, section 2.2), and
    `(1 - eta lambda)^t` after t steps of gradient descent on all samples with the learning rate
    `eta`. For the mean over N samples (and K outputs) multiply times or learning rates by 1/N
    (1/(N K)), and for a loss without the factor 1/2 by 2.

    **Arguments:**

    - `theta`: the kernel of the training samples with themselves, `[N, N, K, K]`, `[N, N, K]` or
      `[N, N]`.
    - `residuals`: `[N, K]`: the targets less the outputs of the model, in the kernel's dtype.
    - `learning_rate`: of each step; `None` for gradient flow. Above `2 / lambda` training diverges,
      and so does the result.

    **Returns:**

    `path`, a function of time: `path(t)` is a `KernelRidge`, and so
    `outputs + path(t)(ntk(model, new, training))` are the outputs of new samples at time t. What
    rounding hides, directions whose eigenvalue is below `eps * trace`, stays as it is.

    **Raises:**

    `ValueError` if shapes or dtypes do not fit, if `theta` is not symmetric or the learning rate
    no positive number.
    """
    caller = "mse_path"
    theta = symmetric_kernel(caller, theta)
    residuals = _given_outputs(caller, "residuals", theta, residuals)
    if learning_rate is not None:
        _check_positive(caller, "learning_rate", learning_rate)
        learning_rate = float(learning_rate)
    n, k = residuals.shape
    kernels = by_problem(theta)
    if theta.ndim == 3:
        columns = residuals.T[..., None]
    else:
        columns = residuals.reshape(1, kernels.shape[1], -1)
    eigenvalues, vectors = jnp.linalg.eigh(kernels)
    columns = jnp.einsum("prs,prc->psc", vectors, columns, precision="highest")
    # Rounding moves eigenvalues by as much as this. Below 0 their exponentials would grow, and what
    # is divided by smaller ones is noise: training leaves what the kernel does not see.
    eps = jnp.finfo(theta.dtype).eps
    seen = eigenvalues >= eps * jnp.trace(kernels, axis1=1, axis2=2)[:, None]
    eigenvalues = jnp.where(seen, eigenvalues, 0)
    columns = jnp.where(seen[..., None], columns, 0)
    return MSEPath(eigenvalues, vectors, columns, (n, k), learning_rate, theta.ndim)


def loss_path(
    theta: Float[Array | np.ndarray, "n m *outputs"] | NTKOperator,
    outputs: Float[Array | np.ndarray, "samples k"],
    loss: Callable[[Array], Array],
    *,
    step_size: float | int,
    num_steps: int,
    method: Literal["rk4", "sgd"] = "rk4",
) -> KernelRidge:
    """Training of a linearised model on any loss of its outputs, step by step.

    **Arguments:**

    - `theta`: the kernel of the training samples with themselves, `[N, N, K, K]`, `[N, N, K]` or
      `[N, N]`, or their `ntk_operator`, which is never formed.
    - `outputs`: `[N, K]`, those of the model at the training samples, in the kernel's dtype.
    - `loss`: outputs `[N, K]` to a number; it knows the labels.
    - `step_size`: time of a step of `"rk4"`, the learning rate of `"sgd"`.
    - `num_steps`: number of steps.
    - `method`: `"rk4"` integrates gradient flow by the classical Runge-Kutta method of order 4,
      with fixed steps and no estimate of its error: halve `step_size` to see it. It is stable for
      `step_size * lambda < 2.78`, where `lambda` is the largest eigenvalue of the kernel times the
      loss's second derivative. `"sgd"` takes steps of gradient descent on all samples, exactly.

    **Returns:**

    A `KernelRidge`: its values for the kernel of new samples with the training samples, added to
    the outputs of the model, are the outputs after all steps.

    **Raises:**

    `ValueError` if shapes or dtypes do not fit, or a setting is out of range.
    """
    caller = "loss_path"
    if not isinstance(theta, NTKOperator):
        theta = symmetric_kernel(caller, theta)
    elif theta.x2 is not None:
        raise ValueError(f"{caller}: the operator must be that of a batch with itself, without x2.")
    outputs = _given_outputs(caller, "outputs", theta, outputs)
    _check_positive(caller, "step_size", step_size)
    check_count(f"{caller}: num_steps", num_steps, 0)
    if method not in ("rk4", "sgd"):
        raise ValueError(f"{caller}: method must be 'rk4' or 'sgd', got {method!r}.")
    dual = _integrated(theta, outputs, loss, float(step_size), num_steps, method)
    return KernelRidge(dual, 4 if isinstance(theta, NTKOperator) else theta.ndim)


@eqx.filter_jit
def _integrated(
    theta: Any, outputs: Array, loss: Any, step_size: float, num_steps: int, method: str
) -> Array:
    """The dual coefficients `a`, of which `da/dt = -dL/df (f_0 + Theta a)`."""
    multiply = theta.mv if isinstance(theta, NTKOperator) else lambda a: KernelRidge(a)(theta)
    h = jnp.asarray(step_size, outputs.dtype)

    def velocity(dual: Array) -> Array:
        return -jax.grad(lambda f: loss(f).astype(outputs.dtype))(outputs + multiply(dual))

    def sgd(dual: Array, _: None) -> tuple[Array, None]:
        return dual + h * velocity(dual), None

    def rk4(dual: Array, _: None) -> tuple[Array, None]:
        one = velocity(dual)
        two = velocity(dual + h / 2 * one)
        three = velocity(dual + h / 2 * two)
        four = velocity(dual + h * three)
        return dual + h / 6 * (one + 2 * two + 2 * three + four), None

    step = sgd if method == "sgd" else rk4
    return jax.lax.scan(step, jnp.zeros_like(outputs), None, num_steps)[0]


def _power_minus_one(x: Array, n: Array) -> Array:
    """`(1 + x)^n - 1` for whole numbers `n >= 0`, exact to rounding also near `x = 0`."""
    base = 1 + x
    odd = (n % 2 == 1) & (base < 0)
    tiny = jnp.finfo(x.dtype).tiny
    size = jnp.where(base > 0, jnp.log1p(jnp.maximum(x, -0.5)), 0.0).astype(x.dtype)
    size = jnp.where(x < -0.5, jnp.log(jnp.maximum(jnp.abs(base), tiny)), size)
    grown = n.astype(x.dtype) * size
    positive = jnp.expm1(grown)
    return jnp.where(odd, -jnp.exp(grown) - 1, positive).astype(x.dtype)


def _given_outputs(caller: str, name: str, theta: Any, values: Any) -> Array:
    values = as_array(caller, name, values)
    if isinstance(theta, NTKOperator):
        like = theta.out_structure()
        n, outputs, dtype = like.shape[0], like.shape[1:], like.dtype
    else:
        n, outputs, dtype = len(theta), theta.shape[2:], theta.dtype
    fits = values.ndim == 2 and len(values) == n and all(k == values.shape[1] for k in outputs)
    if not fits or values.dtype != dtype:
        k = outputs[0] if outputs else "K"
        raise ValueError(
            f"{caller}: {name} must be {dtype} [{n}, {k}], got {values.dtype} {list(values.shape)}."
        )
    check_finite(caller, name, values)
    return values


def _check_positive(caller: str, name: str, value: Any) -> None:
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not (real and 0 < value < math.inf):  # pyright: ignore[reportOperatorIssue]
        raise ValueError(f"{caller}: {name} must be a positive number, got {value!r}.")
