"""The masked NTK product at many positions: the entry that validates and dispatches."""

from typing import Any

from jaxtyping import Array, Bool, Float

from .._dispatch import Choice, Request
from .._implementations import implementations
from .._operation import Plan, case_of, check_factors, check_shapes, plan_call, run
from .._precision import Precision
from . import pallas_gpu, pallas_tpu
from .reference import masked_tangent_ntk_reference

OPERATION = "masked_tangent_ntk"


def masked_tangent_ntk(
    a1: Float[Array, "n j s"],
    d1: Float[Array, "n k i s"],
    a2: Float[Array, "m j s"],
    d2: Float[Array, "m l i s"],
    mask: Bool[Array, "i j"] | Float[Array, "i j"] | None = None,
    *,
    precision: Precision | None = None,
    implementation: Request = None,
) -> Float[Array, "n m k l"]:
    """The NTK contribution of one masked weight `W[i, j]` applied at many positions `s`.

    A convolution, with its patches as activations, or a dense layer along a sequence: y_s = W a_s.

        T[n,k,i,j]     = sum_s d[n,k,i,s] a[n,j,s]
        Theta[n,m,k,l] = sum_ij mask[i,j] T1[n,k,i,j] T2[m,l,i,j]

    Differentiable (reverse mode, first order) in all four factors; the mask is a constant.

    **Arguments:**

    - `a1`, `a2`: activations that came into the layer at every position, for both batches.
    - `d1`, `d2`: cotangents `df_k/dy_is` of its output, of the same dtype as the activations.
    - `mask`: the 0/1 mask of the weight, or any weights `c >= 0` of the sum over parameters;
      `None` for all ones.
    - `precision`: `"float32"`, `"tf32"` or `"bfloat16"`, with errors below 1e-5, 1e-3 and 1e-2 of
      the largest entry; by default `"bfloat16"` for bfloat16 inputs and `"float32"` for others.
      An implementation may be more exact than asked.
    - `implementation`: `"reference"`, `"pallas_gpu"`, `"pallas_tpu"`, several of them in order of
      preference, or `None` for the best available (see `kernels.use_implementation`).
      `"pallas_gpu_interpret"` and `"pallas_tpu_interpret"` run the kernels on any device, slowly.

    **Returns:**

    `Theta`, accumulated in at least float32.

    **Raises:**

    `ValueError` when shapes, dtypes or names do not fit; `NotImplementedError`, with every reason,
    when no implementation asked for takes the call. Both before anything is traced.
    """
    plan, _ = _plan(a1, d1, a2, d2, mask, precision, implementation)
    return run(plan, masked_tangent_ntk_reference, a1, d1, a2, d2, mask)


def masked_tangent_ntk_choice(
    a1: Any,
    d1: Any,
    a2: Any,
    d2: Any,
    mask: Any = None,
    *,
    precision: Precision | None = None,
    implementation: Request = None,
) -> Choice:
    """Which implementation `masked_tangent_ntk` would run, and what refused before.

    **Arguments:**

    - `a1`, `d1`, `a2`, `d2`, `mask`, `precision`, `implementation`: those of
      `masked_tangent_ntk`; arrays may be `jax.ShapeDtypeStruct`s.

    **Returns:**

    The `Choice`: the implementation, and the reasons of those that were asked before it.

    **Raises:**

    `ValueError` and `NotImplementedError`, like `masked_tangent_ntk`.
    """
    return _plan(a1, d1, a2, d2, mask, precision, implementation)[1]


def _plan(a1, d1, a2, d2, mask, precision, implementation):
    shape = _check(a1, d1, a2, d2, mask)
    case = case_of(a1, mask, shape)
    return plan_call(OPERATION, IMPLEMENTATIONS, case, precision, implementation)


def _check(a1, d1, a2, d2, mask) -> tuple[int, int, int, int, int, int]:
    """The sizes (N, M, K, L, I, J), if all arguments agree on them."""
    check_factors(OPERATION, (a1, d1, a2, d2), mask, ranks=(3, 4, 3, 4))
    (n, j, s), (_, k, i, _), m, l = a1.shape, d1.shape, a2.shape[0], d2.shape[1]  # noqa: E741
    expected = dict(d1=(n, k, i, s), a2=(m, j, s), d2=(m, l, i, s), mask=(i, j))
    check_shapes(OPERATION, dict(a1=a1, d1=d1, a2=a2, d2=d2, mask=mask), expected)
    return n, m, k, l, i, j


def _gpu_config(plan: Plan, a1, *rest):
    del rest
    n, m, k, l, _, _ = plan.shape  # noqa: E741
    return pallas_gpu.config_for(plan.kind, n * k, m * l, a1.dtype, plan.precision)


def _tpu_config(plan: Plan, *args):
    del args
    n, m, k, l, i, j = plan.shape  # noqa: E741
    return pallas_tpu.config_for(plan.kind, n * k, m * l, i * j)


IMPLEMENTATIONS = implementations(
    masked_tangent_ntk_reference, pallas_gpu, _gpu_config, pallas_tpu, _tpu_config
)
