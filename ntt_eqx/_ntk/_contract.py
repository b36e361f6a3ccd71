"""Contract the factors of two batches to a kernel, layer by layer."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._types import widen
from ..kernels import masked_ntk_reference, masked_tangent_ntk_reference
from ._factors import Factors
from ._layers import Layer


def contract(
    layers: list[Layer],
    rest: list[int],
    first: Factors,
    second: Factors,
    metric: Sequence[Array | None],
) -> Float[Array, "n m k l"]:
    """Sum over all parameters of `c_p df_k(x_n)/dp df_l(x'_m)/dp`.

    **Arguments:**

    - `first`, `second`: the factors of the two batches.
    - `metric`: for each parameter its `c` (a mask, or weights >= 0), or `None` for c = 1.
    """
    terms = []
    sides = (first.activations, first.cotangents, second.activations, second.cotangents)
    for layer, a1, d1, a2, d2 in zip(layers, *sides, strict=True):
        terms.append(_layer_kernel(layer, a1, d1, a2, d2, metric))
    for p, j1, j2 in zip(rest, first.jacobians, second.jacobians, strict=True):
        terms.append(_jacobian_kernel(j1, j2, metric[p]))
    return sum(terms[1:], start=terms[0])


def _layer_kernel(
    layer: Layer, a1: Array, d1: Array, a2: Array, d2: Array, metric: Sequence[Array | None]
) -> Array:
    """One layer: groups are independent; a bias is one more input feature that is always 1."""
    c = _layer_metric(layer, metric)
    if layer.bias is not None:
        a1, a2 = _append_one(a1), _append_one(a2)
    total = 0.0
    for g in range(layer.groups):
        mask = None if c is None else c[g]
        sides = (a1[:, g], d1[:, :, g], a2[:, g], d2[:, :, g])
        if layer.positions == 1:
            sides = [x[..., 0] for x in sides]
            total = total + masked_ntk_reference(*sides, mask)
        else:
            total = total + masked_tangent_ntk_reference(*sides, mask)
    return total  # pyright: ignore[reportReturnType]


def _layer_metric(layer: Layer, metric: Sequence[Array | None]) -> Array | None:
    """The metric `[G, I, J]` of the weight, with a column for the bias; `None` if all are 1."""
    weight = metric[layer.weight]
    bias = None if layer.bias is None else metric[layer.bias]
    if weight is None and bias is None:
        return None
    shape = (layer.groups, layer.features, layer.inputs)
    columns = jnp.ones(shape, bool) if weight is None else layer.metric(weight)
    if layer.bias is None:
        return columns
    column = jnp.ones(shape[:2], bool) if bias is None else layer.bias_metric(bias)
    if columns.dtype != column.dtype:
        dtype = jnp.result_type(*(c.dtype for c in (columns, column) if c.dtype != bool))
        columns, column = columns.astype(dtype), column.astype(dtype)
    return jnp.concatenate([columns, column[..., None]], axis=2)


def _append_one(a: Array) -> Array:
    return jnp.concatenate([a, jnp.ones_like(a[:, :, :1])], axis=2)


def _jacobian_kernel(j1: Array, j2: Array, c: Array | None) -> Array:
    """Contract explicit Jacobians `[N, K, *shape]` and `[M, L, *shape]` of one parameter."""
    if c is not None:
        j1 = widen(j1)
        j1 = j1 * c.astype(j1.dtype)[None, None]
    flat = lambda j: widen(j.reshape(math.prod(j.shape[:2]), -1))
    theta = flat(j1) @ flat(j2).T
    theta = theta.reshape(*j1.shape[:2], *j2.shape[:2])
    return jax.numpy.transpose(theta, (0, 2, 1, 3))
