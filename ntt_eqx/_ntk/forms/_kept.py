"""What forms store of each sample, and the contractions that several of them share."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from ..._types import Outputs, wide_dtype, widen
from ...kernels import (
    GatheredMetric,
    Precision,
    masked_ntk,
    masked_ntk_diagonal_reference,
)
from .._layers import Layer


class LayerFactors(eqx.Module):
    """Inputs `a[N, G, J, S]` and cotangents `d[N, R, G, I, S]` of a layer."""

    a: Array
    d: Array

    def wide(self) -> tuple[Array, Array]:
        """`a` and `d` in the dtype of their sums."""
        return _alike(widen(self.a), widen(self.d))

    def group(self, g: int) -> tuple[Array, Array]:
        """`a[N, J, S]` and `d[N, R, I, S]` of one group, in one dtype."""
        return _alike(self.a[:, g], self.d[:, :, g])

    def at_one_position(self) -> tuple[Array, Array]:
        """`a[G, N, J]` and `d[G, N, R, I]` of all groups at their one position, in one dtype."""
        return _alike(jnp.moveaxis(self.a[..., 0], 1, 0), jnp.moveaxis(self.d[..., 0], 2, 0))


def _alike(a: Array, d: Array) -> tuple[Array, Array]:
    if a.dtype == d.dtype:
        return a, d
    # A product of float32 samples and float64 weights, say, keeps its inputs as they are.
    dtype = wide_dtype(jnp.promote_types(a.dtype, d.dtype))
    return a.astype(dtype), d.astype(dtype)


class Tangents(eqx.Module):
    """The derivative of R output directions by P parameters or entries of a layer: `t[N, R, P]`."""

    t: Array


def factors(layer: Layer, operands: tuple[Array, ...], d: Array) -> LayerFactors:
    """The factors of one sample, `a[G, J, S]` and `d[R, G, I, S]`."""
    return LayerFactors(layer.activations(*operands), jax.vmap(layer.cotangents)(d))


def weight_factors(layer: Layer, operands: tuple[Array, ...], d: Array) -> LayerFactors:
    """`factors` without the input of the bias, for metrics that add the bias themselves."""
    return LayerFactors(layer.weight_activations(*operands), jax.vmap(layer.cotangents)(d))


def product_at_one_position(
    one: tuple[Array, Array],
    two: tuple[Array, Array],
    metric: Array | GatheredMetric | None,
    outputs: Outputs,
    precision: Precision,
) -> Array:
    """The term of a group from its factors `a[N, J]`, `d[N, R, I]` of either side."""
    if outputs == "full":
        return masked_ntk(*one, *two, metric, precision=precision)
    theta = masked_ntk_diagonal_reference(*one, *two, metric)
    return jnp.mean(theta, axis=-1) if outputs == "trace" else theta


def gram(one: Tangents, two: Tangents, c: Array | None, outputs: Outputs) -> Array:
    """Contract tangents `[N, K, P]` and `[M, L, P]`: one matrix product over the parameters."""
    t1, t2 = widen(one.t), widen(two.t)
    if c is not None:
        t1 = t1 * c.astype(t1.dtype)[None, None]
    if outputs == "diagonal":
        return jnp.einsum("nkp,mkp->nmk", t1, t2)
    if outputs == "trace":
        return t1.reshape(len(t1), -1) @ t2.reshape(len(t2), -1).T / t1.shape[1]
    theta = t1.reshape(-1, t1.shape[-1]) @ t2.reshape(-1, t2.shape[-1]).T
    return theta.reshape(*t1.shape[:2], *t2.shape[:2]).transpose(0, 2, 1, 3)
