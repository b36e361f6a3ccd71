"""Contract the factors of two batches to a kernel, layer by layer."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from .._types import Outputs, wide_dtype, widen
from ..kernels import (
    GatheredMetric,
    masked_ntk,
    masked_ntk_diagonal_reference,
    masked_tangent_ntk,
)
from ._execute import Factors, LayerFactors, Tangents
from ._layers import Layer
from ._metric import DenseMetric, LayerMetric
from ._plan import Operands, Plan


def contract(
    plan: Plan, operands: Operands, first: Factors, second: Factors
) -> Float[Array, "n m *outputs"]:
    """Sum over all parameters of `c_p df_k(x_n)/dp df_l(x'_m)/dp`.

    **Arguments:**

    - `first`, `second`: the factors of the two batches.

    **Returns:**

    All pairs k, l, the diagonal k = l, or its mean over k, as the plan says.
    """
    outputs, terms = plan.spec.outputs, []
    layers = zip(plan.layers, operands.layers, first.layers, second.layers, strict=True)
    for planned, metric, one, two in layers:
        if isinstance(one, Tangents) and isinstance(two, Tangents):
            terms.append(_gram(one.t, two.t, _flat(planned.layer, metric), outputs))
        elif isinstance(one, LayerFactors) and isinstance(two, LayerFactors):
            terms.append(_layer_kernel(plan, planned.layer, metric, one, two))
    for c, one, two in zip(operands.jacobians, first.jacobians, second.jacobians, strict=True):
        terms.append(_gram(one.t, two.t, None if c is None else c.reshape(-1), outputs))
    if not terms:  # the outputs depend on no parameter
        r, s = first.directions, second.directions
        pairs = {"full": (r, s), "diagonal": (r,), "trace": ()}[outputs]
        shape = (len(first.outputs), len(second.outputs), *pairs)
        return jnp.zeros(shape, wide_dtype(plan.traced.output_aval.dtype))
    # A bfloat16 parameter beside float64 ones gives a float32 term.
    widest = jnp.float64 if any(t.dtype == jnp.float64 for t in terms) else jnp.float32
    terms = [t.astype(widest) for t in terms]
    return sum(terms[1:], start=terms[0])


def _layer_kernel(
    plan: Plan, layer: Layer, metric: LayerMetric, one: LayerFactors, two: LayerFactors
) -> Array:
    """A layer's share from its factors; groups are independent of each other."""
    outputs, total = plan.spec.outputs, 0.0
    for g in range(layer.groups):
        a1, d1, a2, d2 = one.a[:, g], one.d[:, :, g], two.a[:, g], two.d[:, :, g]
        if one.a.dtype != one.d.dtype:
            a1, d1, a2, d2 = widen(a1), widen(d1), widen(a2), widen(d2)
        mask = metric.values[g] if isinstance(metric, DenseMetric) else None
        if layer.positions > 1:
            assert outputs == "full"  # otherwise `_forms._form` keeps tangents
            total = total + masked_tangent_ntk(a1, d1, a2, d2, mask, precision=plan.spec.precision)
            continue
        a1, d1, a2, d2 = (side[..., 0] for side in (a1, d1, a2, d2))
        if isinstance(metric, GatheredMetric):
            if layer.bias is not None:  # the gathered metric adds the bias itself
                a1, a2 = a1[:, :-1], a2[:, :-1]
            mask = metric
        if outputs == "full":
            theta = masked_ntk(a1, d1, a2, d2, mask, precision=plan.spec.precision)
        else:
            theta = masked_ntk_diagonal_reference(a1, d1, a2, d2, mask)
        total = total + (jnp.mean(theta, axis=-1) if outputs == "trace" else theta)
    return total  # pyright: ignore[reportReturnType]


def _flat(layer: Layer, metric: LayerMetric) -> Array | None:
    """The metric of the entries of a layer's tangents."""
    if isinstance(metric, GatheredMetric):
        values = metric.values.reshape(-1)
        return values if layer.bias is None else jnp.concatenate([values, metric.offset])
    return metric.values.reshape(-1) if isinstance(metric, DenseMetric) else None


def _gram(t1: Array, t2: Array, c: Array | None, outputs: Outputs) -> Array:
    """Contract tangents `[N, K, P]` and `[M, L, P]`: one matrix product over the parameters."""
    t1, t2 = widen(t1), widen(t2)
    if c is not None:
        t1 = t1 * c.astype(t1.dtype)[None, None]
    if outputs == "diagonal":
        return jnp.einsum("nkp,mkp->nmk", t1, t2)
    if outputs == "trace":
        return t1.reshape(len(t1), -1) @ t2.reshape(len(t2), -1).T / t1.shape[1]
    theta = t1.reshape(-1, t1.shape[-1]) @ t2.reshape(-1, t2.shape[-1]).T
    return theta.reshape(*t1.shape[:2], *t2.shape[:2]).transpose(0, 2, 1, 3)
