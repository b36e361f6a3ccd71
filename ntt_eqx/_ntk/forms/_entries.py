"""A layer at one position whose weight stores some entries alone, by products with these."""

import functools
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..._types import Outputs
from ...kernels import Precision, at_precision, map_blocks, scan_blocks
from .._layers import Layer
from .._linear import AbstractEntryUse
from ._form import Cost, Path, Sizes, cost_of_numbers
from ._kept import LayerFactors, weight_factors
from ._layer import AbstractLayerForm

# Pairs of samples whose u is taken together: products of 128 columns stay in cache.
_PAIRS = 128
# Bytes of u up to which it is kept for the gradient, which takes a quarter longer without.
_MOST_KEPT = 16 * 2**20


class EntryMetric(eqx.Module):
    """The metric of a weight that stores some entries alone, and where these are.

    Attributes:
        values: the metric of each entry.
        offset: that of the bias, for each output feature, or 0.
        index: the operands of the use that say where the entries are.
    """

    values: Float[Array, " kept"]
    offset: Float[Array, " i"]
    index: tuple[Array, ...]


class EntryForm(AbstractLayerForm[LayerFactors]):
    """The factors of a layer whose `u` is a product of its entries with products of activations.

    `u[i,(n,m)] = sum_j c[i,j] (a1[n,j] a2[m,j])` has pairs of samples for columns, and its
    cotangent goes back by the transposed product, once for both sides.
    """

    path: ClassVar[Path] = "gathered factors"
    layer: Layer

    def cost(self, sizes: Sizes, kept: int = 0) -> Cost:
        """As for `GatheredForm`, without padding."""
        layer, n, m, r = self.layer, sizes.n, sizes.m, sizes.directions
        rows, width, stored = layer.features, layer.inputs, math.prod(layer.view.shape)
        return cost_of_numbers(
            sizes,
            flops=2 * n * m * (stored + sizes.entries * rows),
            layer_flops=2 * stored,
            stored=r * rows + width,
            per_column=2 * r * rows,  # u d2 and y, a sample of the first batch at a time
            per_pair=rows,
            once=2 * stored + 2 * max(_PAIRS, m) * (rows + width),
        )

    def metric(
        self, weights: Sequence[Array | None], index: Sequence[Any], dtype: Any
    ) -> EntryMetric:
        """See `AbstractForm`."""
        layer, offset = self.layer, jnp.zeros(self.layer.features, dtype)
        if layer.bias is not None:
            bias, ones = weights[layer.bias], jnp.ones_like(offset)
            offset = ones if bias is None else layer.bias_metric(bias).reshape(-1).astype(dtype)
        c = weights[layer.weight]
        values = jnp.ones(math.prod(layer.view.shape), dtype)
        if c is not None:
            values = layer.view.apply(c).reshape(-1).astype(dtype)
        assert layer.index is not None
        return EntryMetric(values, offset, layer.index)

    def count(self, metric: EntryMetric) -> int | None:
        """See `AbstractForm`."""
        return int(np.count_nonzero(jax.device_get(metric.values)))

    def keep(self, metric: EntryMetric, operands: tuple[Array, ...], d: Array) -> LayerFactors:
        """See `AbstractForm`."""
        return weight_factors(self.layer, operands, d)

    def contract(
        self,
        one: LayerFactors,
        two: LayerFactors,
        metric: EntryMetric,
        outputs: Outputs,
        precision: Precision,
    ) -> Array:
        """See `AbstractForm`."""
        use, dtype = self.layer.use, metric.values.dtype
        assert isinstance(use, AbstractEntryUse)
        (a1, d1), (a2, d2) = one.group(0), two.group(0)
        a1, d1, a2, d2 = (side[..., 0].astype(dtype) for side in (a1, d1, a2, d2))
        if outputs == "full":
            return _full(use, precision, metric, a1, d1, a2, d2)
        theta = _diagonal(use, metric, a1, d1, a2, d2)
        return jnp.mean(theta, axis=-1) if outputs == "trace" else theta


def _diagonal(
    use: AbstractEntryUse, metric: EntryMetric, a1: Array, d1: Array, a2: Array, d2: Array
) -> Array:
    """`Theta[n,m,k,k]`, `[N, M, K]`, some samples n at a time."""
    right, d2 = a2.T, d2.transpose(1, 2, 0)  # [J, M] and [K, I, M]

    @jax.checkpoint
    def block(rows: tuple[Array, Array]) -> Array:
        a, d = rows
        u = _u(use, metric, a, right)  # [n, I, M]
        return jnp.einsum("nki,nim,kim->nmk", d, u, d2)

    return map_blocks(block, (a1, d1), len(a1), _samples(a1, a2))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _full(
    use: AbstractEntryUse,
    precision: Precision,
    metric: EntryMetric,
    a1: Array,
    d1: Array,
    a2: Array,
    d2: Array,
) -> Array:
    """`Theta[n,m,k,l] = sum_i d1[n,k,i] u[n,m,i] d2[m,l,i]`, one matrix product for each n."""
    return _theta_and_u(use, precision, metric, a1, d1, a2, d2)[0]


def _theta_and_u(
    use: AbstractEntryUse,
    precision: Precision,
    metric: EntryMetric,
    a1: Array,
    d1: Array,
    a2: Array,
    d2: Array,
) -> tuple[Array, Array | None]:
    """`Theta`, and `u[n,i,m]` where it is small enough to be kept for the gradient."""
    right, columns = a2.T, d2.transpose(2, 1, 0)  # [J, M] and [I, L, M]
    keeps = len(a1) * right.shape[1] * len(columns) * right.dtype.itemsize <= _MOST_KEPT

    def block(rows: tuple[Array, Array]) -> tuple[Array, Array | None]:
        a, d = rows
        u = _u(use, metric, a, right)
        one = lambda row: row[1] @ _flat(row[0][:, None, :] * columns)
        return jax.lax.map(one, (u, d)), u if keeps else None  # [n, K, L M]

    with at_precision(precision):
        theta, u = map_blocks(block, (a1, d1), len(a1), _samples(a1, a2))
    theta = theta.reshape(*d1.shape[:2], d2.shape[1], len(d2))
    return theta.transpose(0, 3, 1, 2), u


def _forward(
    use: AbstractEntryUse, precision: Precision, metric: EntryMetric, *factors: Array
) -> tuple[Array, Any]:
    a1, d1, a2, d2 = factors
    theta, u = _theta_and_u(use, precision, metric, a1, d1, a2, d2)
    return theta, (metric, factors, u)


def _backward(
    use: AbstractEntryUse, precision: Precision, residuals: Any, g: Array
) -> tuple[Any, ...]:
    """The cotangents of all factors, with u made again if it is large; g = dL/dTheta.

    dL/dd1[n,k,i] = sum_lm g[n,m,k,l] (u[n,m,i] d2[m,l,i])
    y[i,l,m]      = sum_k d1[n,k,i] g[n,m,k,l]
    dL/dd2[m,l,i] = sum_n u[n,m,i] y[i,l,m]
    dL/du[n,m,i]  = sum_l d2[m,l,i] y[i,l,m]
    v[j,(n,m)]    = sum_i c[i,j] dL/du[n,m,i]
    dL/da1[n,j]   = sum_m v[j,n,m] a2[m,j],  dL/da2[m,j] = sum_n v[j,n,m] a1[n,j]
    """
    metric, (a1, d1, a2, d2), known = residuals
    right, columns = a2.T, d2.transpose(2, 1, 0)  # [J, M] and [I, L, M]
    g = g.transpose(0, 2, 3, 1).reshape(*d1.shape[:2], -1)  # [N, K, L M]

    def one(d2_bar: Array, row: tuple[Array, ...]) -> tuple[Array, tuple[Array, Array]]:
        u, d, g = row
        y = (d.T @ g).reshape(columns.shape)
        d1_bar = g @ _flat(u[:, None, :] * columns).T
        return d2_bar + u[:, None, :] * y, (d1_bar, jnp.sum(columns * y, axis=1))

    def block(bars: tuple[Array, Array], rows: tuple[Array, ...]) -> tuple[Any, Any]:
        (a2_bar, d2_bar), (a, d, g, u) = bars, rows
        u = _u(use, metric, a, right) if u is None else u
        d2_bar, (d1_bar, u_bar) = jax.lax.scan(one, d2_bar, (u, d, g))
        v = u_bar.transpose(1, 0, 2).reshape(u.shape[1], -1)  # [I, n M]
        v = use.product(metric.index, metric.values, v, transposed=True)
        v = v.reshape(len(v), len(a), -1)  # [J, n, M]
        a1_bar = jnp.einsum("jnm,jm->nj", v, right)
        a2_bar = a2_bar + jnp.sum(v * a.T[:, :, None], axis=1)
        return (a2_bar, d2_bar), (a1_bar, d1_bar)

    zeros = (jnp.zeros_like(right), jnp.zeros_like(columns))
    with at_precision(precision):
        rows, size = (a1, d1, g, known), _samples(a1, a2)
        bars, (a1_bar, d1_bar) = scan_blocks(block, zeros, rows, len(a1), size)
    return None, a1_bar, d1_bar, bars[0].T, bars[1].transpose(2, 1, 0)


_full.defvjp(_forward, _backward)


def _u(use: AbstractEntryUse, metric: EntryMetric, a: Array, right: Array) -> Array:
    """`u[n,i,m]` of some samples n and all m, from `a[n, J]` and `right[J, M]`."""
    pairs = a.T[:, :, None] * right[:, None, :]
    u = use.product(metric.index, metric.values, _flat(pairs), transposed=False)
    u = u.reshape(len(u), len(a), right.shape[1]) + metric.offset[:, None, None]
    return u.transpose(1, 0, 2)


def _flat(array: Array) -> Array:
    """The columns of the first axis side by side."""
    return array.reshape(len(array), array.size // max(len(array), 1))


def _samples(a1: Array, a2: Array) -> int:
    """Samples of the first batch to take at a time."""
    return max(1, min(len(a1), _PAIRS // max(len(a2), 1)))
