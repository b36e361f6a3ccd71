"""The public kernel function."""

import functools
from typing import Any, Literal, TypeAlias, overload

import equinox as eqx
import numpy as np
from jaxtyping import Array, Float, Shaped

from .._distribute import left_to_xla, replicate
from .._stateful import check_warm
from .._types import Implementation, KernelKind, Outputs, PyTree
from ..kernels import Precision
from ._given import given_batches, given_directions, given_leaves, given_model
from ._kernel import kernel_and_outputs, known_index
from ._spec import KernelSpec, check_options, kernel_spec

Directions: TypeAlias = (
    tuple[Float[Array | np.ndarray, "r k"], Float[Array | np.ndarray, "s k"]] | None
)


@overload
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
    by_layer: Literal[False] = False,
) -> Float[Array, "n m *outputs"]: ...


@overload
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
    by_layer: Literal[True],
) -> dict[str, Float[Array, "n m *outputs"]]: ...


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
    by_layer: bool = False,
) -> Float[Array, "n m *outputs"] | dict[str, Float[Array, "n m *outputs"]]:
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
    - `by_layer`: return the share of each layer instead of their sum, at the same cost; the result
      takes as many times the memory.

    **Returns:**

    `[N, M, K, K]` for K outputs (`[N, M, K]` for the diagonal, `[N, M]` for the trace,
    `[N, M, R, S]` for directions), in float32, or float64 where the model computes in float64.
    With `by_layer=True` a dict of such kernels, which sum up to the whole, by parameter as
    `explain` names them: a layer's weight and bias have one share, named
    `".layers[0].weight + .layers[0].bias"`. Parameters that the outputs do not depend on have none.

    **Raises:**

    `ValueError` if the two batches hold samples of different shape or dtype, if a name is unknown,
    if the model does not map one sample to one array or has no parameters, if an array has a type
    that JAX lacks (`longdouble`, masked arrays), if the result exceeds the device's memory, and if
    a forward-mode derivative is taken.
    """
    spec, arrays = _given(
        "ntk", model, x1, x2, metric, directions, max_bytes,
        kernel=kernel, outputs=outputs, precision=precision, implementation=implementation,
        by_layer=by_layer,
    )  # fmt: skip
    return _run(spec, *arrays, with_outputs=False)


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

    A model with a derivative rule of its own that computes the value anew, such as a
    straight-through estimator, costs another forward pass: its outputs have the rule's gradient.

    **Arguments:**

    - `model`, `x1`, `x2`, `kernel`, `metric`, `outputs`, `directions`, `precision`,
      `max_bytes`: those of `ntk`.

    **Returns:**

    The kernel as `ntk` gives it, and the outputs `[N, K]` and `[M, K]`, flattened, in the dtype of
    the model.

    **Raises:**

    What `ntk` raises.
    """
    spec, arrays = _given(
        "ntk_and_outputs", model, x1, x2, metric, directions, max_bytes,
        kernel=kernel, outputs=outputs, precision=precision, implementation=None,
    )  # fmt: skip
    return _run(spec, *arrays, with_outputs=True)


def _given(
    caller: str,
    model: PyTree,
    x1: Any,
    x2: Any,
    metric: PyTree | None,
    directions: Any,
    max_bytes: int | None,
    **options: Any,
) -> tuple[KernelSpec, tuple[Any, ...]]:
    """The spec of a kernel, and its arrays: checked, converted and on the devices in use."""
    model, (x1, x2) = given_model(caller, model), given_batches(caller, x1, x2)
    check_warm(caller, model)
    metric = given_leaves(caller, "metric", metric)
    directions = given_directions(caller, directions)
    check_options(caller, max_bytes, directions, **options)
    spec = kernel_spec(**options, max_bytes=max_bytes)
    model, x1, x2, metric, directions = replicate((model, x1, x2, metric, directions))
    return spec, (model, x1, x2, metric, directions, known_index(spec, model))


@eqx.filter_jit
def _run(spec: KernelSpec, *arrays: Any, with_outputs: bool) -> Any:
    """`kernel_and_outputs` under `jit`; XLA drops outputs that nobody asks for."""
    found = left_to_xla(functools.partial(kernel_and_outputs, spec), *arrays)
    return found if with_outputs else found[0]
