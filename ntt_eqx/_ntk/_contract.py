"""Contract the factors of two batches to a kernel, term by term."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from .._types import wide_dtype
from ._execute import Factors
from ._plan import Operands, Plan


def contract(
    plan: Plan, operands: Operands, first: Factors, second: Factors
) -> Float[Array, "n m *outputs"] | dict[str, Float[Array, "n m *outputs"]]:
    """Sum over all parameters of `c_p df_k(x_n)/dp df_l(x'_m)/dp`.

    **Arguments:**

    - `first`, `second`: the factors of the two batches.

    **Returns:**

    All pairs k, l, the diagonal k = l, or its mean over k, as the plan says; the terms of the sum
    by name if the plan asks for them.
    """
    outputs, precision = plan.spec.outputs, plan.spec.precision
    terms, sides = [], (operands.metrics, first.kept, second.kept)
    for form, metric, one, two in zip(plan.forms, *sides, strict=True):
        terms.append(form.contract(one, two, metric, outputs, precision))
    if not terms and not plan.spec.by_layer:  # the outputs depend on no parameter
        r, s = first.directions, second.directions
        pairs = {"full": (r, s), "diagonal": (r,), "trace": ()}[outputs]
        shape = (len(first.outputs), len(second.outputs), *pairs)
        return jnp.zeros(shape, wide_dtype(plan.traced.output_aval.dtype))
    # A bfloat16 parameter beside float64 ones gives a float32 term.
    widest = jnp.float64 if any(t.dtype == jnp.float64 for t in terms) else jnp.float32
    terms = [t.astype(widest) for t in terms]
    if plan.spec.by_layer:
        return dict(zip(map(plan.name_of, plan.forms), terms, strict=True))
    return sum(terms[1:], start=terms[0])
