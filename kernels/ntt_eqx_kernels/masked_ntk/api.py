"""The masked NTK product of a dense layer: the entry that validates and dispatches."""

from typing import Any

from jaxtyping import Array, Bool, Float

from .._dispatch import Choice, Request
from .._gather import GatheredMetric
from .._operation import case_of, check_factors, check_shapes, plan_call, run
from .._precision import Precision
from .implementations import IMPLEMENTATIONS

OPERATION = "masked_ntk"


def masked_ntk(
    a1: Float[Array, "n j"],
    d1: Float[Array, "n k i"],
    a2: Float[Array, "m j"],
    d2: Float[Array, "m l i"],
    mask: Bool[Array, "i j"] | Float[Array, "i j"] | GatheredMetric | None = None,
    *,
    precision: Precision | None = None,
    implementation: Request = None,
) -> Float[Array, "n m k l"]:
    """The NTK contribution of one masked weight matrix `W[i, j]` of a layer `y = W a`.

        Theta[n,m,k,l] = sum_ij mask[i,j] d1[n,k,i] a1[n,j] d2[m,l,i] a2[m,j]

    Differentiable (reverse mode, first order) in all four factors; the mask is a constant.

    **Arguments:**

    - `a1`, `a2`: activations that came into the layer, for both batches of samples.
    - `d1`, `d2`: cotangents `df_k/dy_i` of its output, of the same dtype as the activations.
    - `mask`: the 0/1 mask of the weight, or any weights `c >= 0` of the sum over parameters;
      `None` for all ones. A `GatheredMetric` holds its non-zeros alone: the work for them falls
      with their number.
    - `precision`: `"float32"`, `"tf32"` or `"bfloat16"`, with errors below 1e-5, 1e-3 and 1e-2 of
      the largest entry (the kernels' bfloat16, where a few terms cancel, of what it would be if
      they did not); by default `"bfloat16"` for bfloat16 inputs and `"float32"` for others.
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
    return run(plan, a1, d1, a2, d2, mask)


def masked_ntk_choice(
    a1: Any,
    d1: Any,
    a2: Any,
    d2: Any,
    mask: Any = None,
    *,
    precision: Precision | None = None,
    implementation: Request = None,
) -> Choice:
    """Which implementation `masked_ntk` would run for these arguments, and what refused before.

    **Arguments:**

    - `a1`, `d1`, `a2`, `d2`, `mask`, `precision`, `implementation`: those of `masked_ntk`; arrays
      may be `jax.ShapeDtypeStruct`s.

    **Returns:**

    The `Choice`: the implementation, and the reasons of those that were asked before it.

    **Raises:**

    `ValueError` and `NotImplementedError`, like `masked_ntk`.
    """
    return _plan(a1, d1, a2, d2, mask, precision, implementation)[1]


def _plan(a1, d1, a2, d2, mask, precision, implementation):
    shape = _check(a1, d1, a2, d2, mask)
    case = case_of(a1, mask, shape)
    return plan_call(OPERATION, IMPLEMENTATIONS, case, precision, implementation)


def _check(a1, d1, a2, d2, mask) -> tuple[int, int, int, int, int, int]:
    """The sizes (N, M, K, L, I, J), if all arguments agree on them."""
    check_factors(OPERATION, (a1, d1, a2, d2), mask, ranks=(2, 3, 2, 3))
    (n, j), (_, k, i), (m, _), (_, l, _) = a1.shape, d1.shape, a2.shape, d2.shape  # noqa: E741
    expected = dict(d1=(n, k, i), a2=(m, j), d2=(m, l, i), mask=(i, j))
    check_shapes(OPERATION, dict(a1=a1, d1=d1, a2=a2, d2=d2, mask=mask), expected)
    return n, m, k, l, i, j
