"""The public kernel function."""

from typing import Any, TypeAlias

import equinox as eqx
import numpy as np
from jaxtyping import Array, Float, PyTree, Shaped

from .._checks import is_count
from .._distribute import left_to_xla, replicate
from .._stateful import check_warm
from ..kernels import PRECISIONS, Precision, target_device
from ._costs import costs_on
from ._given import given_batches, given_directions, given_leaves, given_model
from ._kernel import ORACLES, Implementation, kernel_between, known_support, oracle
from ._pairs import default_budget
from ._plan import KernelKind, Outputs

Directions: TypeAlias = (
    tuple[Float[Array | np.ndarray, "r k"], Float[Array | np.ndarray, "s k"]] | None
)


def ntk(
    model: PyTree,
    x1: Shaped[Array | np.ndarray, "n ..."],
    x2: Shaped[Array | np.ndarray, "m ..."] | None = None,
    *,
    kernel: KernelKind = "active",
    metric: PyTree | None = None,
    outputs: Outputs = "full",
    directions: Directions = None,
    precision: Precision = "float32",
    implementation: Implementation | None = None,
    max_bytes: int | None = None,
) -> Float[Array, "n m *outputs"]:
    """Exact finite-width neural tangent kernel of any Equinox model, masked or not.

    `Theta[n,m,k,l] = sum_p c_p df_k(x1_n)/dp df_l(x2_m)/dp` over all parameters `p`, which are the
    floating-point and complex arrays of the model that are not part of an `eqx.nn.State`
    (Jacot et al. 2018; with a mask: Liu & Zenke 2020, section 3). Differentiable in reverse mode
    (`jax.grad`, `jax.vjp`, `jax.jacrev`) and in that mode only; with `implementation="jacobian"`
    in forward mode (`jax.jvp`, `jax.jacfwd`), too.

    **Arguments:**

    - `model`: maps one sample to its outputs; a `SparseModel` or any other Equinox model. For a
      function `f(params, x)` pass `eqx.Partial(f, params)`. A `StatefulModel` runs in inference
      mode, with its running statistics; `warm_up(model, x)` sets them to those of a batch.
    - `x1`, `x2`: two batches of samples, of JAX or NumPy; `x2=None` means `x1` again.
    - `kernel`: `"active"` sums over kept weights only (`c_p` is the mask), `"ambient"` over all
      weights, at the masked weights (`c_p = 1`). The same for a model without a mask.
    - `metric`: further weights `c_p >= 0`, such as per-parameter learning rates: the structure of
      the model (of `SparseModel.model` for a sparse one) with an array of the parameter's shape, or
      `None` for 1, at every leaf. Multiplies the mask of the active kernel; no gradient
      reaches it.
    - `outputs`: `"full"` for all pairs of outputs, `"diagonal"` for k = l, `"trace"` for the
      mean of the diagonal.
    - `directions`: `(V[R, K], W[S, K])`: return `V Theta W^T` instead, at the cost of R and S
      outputs; see `sketch_directions`.
    - `precision`: precision of float32 matrix products, in the passes through the model and in the
      contraction: `"float32"`, `"tf32"` or `"bfloat16"`, with errors of about 1e-6, 1e-3 and 1e-2
      of the largest entry on GPUs and TPUs; a CPU always uses float32. It replaces JAX's
      `default_matmul_precision`, which does not affect the kernel.
    - `implementation`: `"factors"` (the default), or one of the oracles `"jacobian"` and
      `"ntk_vector_products"`, which take neither `directions` nor `max_bytes`.
    - `max_bytes`: memory budget for intermediates, beside inputs and result. The kernel is computed
      in blocks of pairs of samples that fit it, down to one pair. Defaults to an eighth of the
      memory, at most 256 MiB, and on an accelerator to a quarter of its memory. It changes results
      by rounding at most.

    **Returns:**

    `[N, M, K, K]` for K outputs (`[N, M, K]` for the diagonal, `[N, M]` for the trace,
    `[N, M, R, S]` for directions), in float32, or float64 where the model computes in float64.

    **Raises:**

    `ValueError` if the two batches hold samples of different shape or dtype, if a name is unknown,
    if the model does not map one sample to one array or has no parameters, if an array has a type
    that JAX lacks (`longdouble`, masked arrays), if the result exceeds the device's memory, and if
    a forward-mode derivative is taken.
    """
    model, (x1, x2) = given_model("ntk", model), given_batches("ntk", x1, x2)
    check_warm("ntk", model)
    metric = given_leaves("ntk", "metric", metric)
    directions = given_directions("ntk", directions)
    _check("ntk", kernel, outputs, directions, precision, implementation, max_bytes)
    model, x1, x2, metric, directions = replicate((model, x1, x2, metric, directions))
    if implementation in ORACLES:
        x2 = x1 if x2 is None else x2
        return _ntk_oracle(model, x1, x2, kernel, metric, outputs, precision, implementation)
    how = _decided(model, kernel, max_bytes)
    return _kernel(model, x1, x2, metric, kernel, outputs, directions, precision, *how)


def ntk_and_outputs(
    model: PyTree,
    x1: Shaped[Array | np.ndarray, "n ..."],
    x2: Shaped[Array | np.ndarray, "m ..."] | None = None,
    *,
    kernel: KernelKind = "active",
    metric: PyTree | None = None,
    outputs: Outputs = "full",
    directions: Directions = None,
    precision: Precision = "float32",
    max_bytes: int | None = None,
) -> tuple[Float[Array, "n m *outputs"], Float[Array, "n k"], Float[Array, "m k"]]:
    """`ntk`, and the model's outputs for both batches, at no further cost.

    **Arguments:**

    - `model`, `x1`, `x2`, `kernel`, `metric`, `outputs`, `directions`, `precision`,
      `max_bytes`: those of `ntk`.

    **Returns:**

    The kernel as `ntk` gives it, and the outputs `[N, K]` and `[M, K]`, flattened, in the dtype of
    the model.

    **Raises:**

    What `ntk` raises.
    """
    caller = "ntk_and_outputs"
    model, (x1, x2) = given_model(caller, model), given_batches(caller, x1, x2)
    check_warm(caller, model)
    metric = given_leaves(caller, "metric", metric)
    directions = given_directions(caller, directions)
    _check(caller, kernel, outputs, directions, precision, None, max_bytes)
    model, x1, x2, metric, directions = replicate((model, x1, x2, metric, directions))
    how = _decided(model, kernel, max_bytes)
    return _both(model, x1, x2, metric, kernel, outputs, directions, precision, *how)


def _decided(model: PyTree, kernel: KernelKind, max_bytes: int | None) -> tuple[Any, ...]:
    """Support, budget, device and costs of a kernel, as arguments and so as part of the jit key."""
    device = target_device()
    budget = default_budget(device) if max_bytes is None else max_bytes
    return known_support(model, kernel), budget, device, costs_on(device)


@eqx.filter_jit
def _kernel(*arguments: Any) -> Array:
    return left_to_xla(lambda *a: kernel_between(*a)[0], *arguments)


@eqx.filter_jit
def _both(*arguments: Any) -> tuple[Array, Array, Array]:
    return left_to_xla(kernel_between, *arguments)


@eqx.filter_jit
def _ntk_oracle(*arguments: Any) -> Array:
    return left_to_xla(oracle, *arguments)


def _check(
    caller: str,
    kernel: str,
    outputs: str,
    directions: Any,
    precision: str,
    implementation: str | None,
    max_bytes: int | None,
) -> None:
    for name, value, allowed in (
        ("kernel", kernel, ("active", "ambient")),
        ("outputs", outputs, ("full", "diagonal", "trace")),
        ("precision", precision, PRECISIONS),
        ("implementation", implementation, (None, "factors", *ORACLES)),
    ):
        if value not in allowed:
            raise ValueError(f"{caller}: {name} must be one of {allowed}, got {value!r}.")
    if directions is not None and (outputs != "full" or implementation in ORACLES):
        raise ValueError(
            f"{caller}: directions go with outputs='full' and implementation='factors'."
        )
    if max_bytes is not None and not is_count(max_bytes):
        raise ValueError(f"{caller}: max_bytes must be positive, got {max_bytes}.")
