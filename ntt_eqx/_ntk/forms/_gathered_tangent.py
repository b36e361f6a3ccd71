"""A layer at many positions, from its tangents at the entries that its mask keeps."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array

from ..._types import Outputs
from ...kernels import GatheredMetric, Precision, gathered_tangents
from .._layers import Layer
from .._metric import gathered_metric
from ._form import Cost, Path, Sizes, cost_of_numbers
from ._kept import Tangents, factors, gram
from ._layer import AbstractGatheredForm


class GatheredTangentForm(AbstractGatheredForm[Tangents]):
    """The derivative of every sample by the kept weights alone, and by the bias.

    Attributes:
        layer: the layer.
        chunks: number of chunks of the gathered metric, and entries of each, padding included.
    """

    path: ClassVar[Path] = "gathered tangents"
    layer: Layer
    chunks: tuple[int, int]

    def cost(self, sizes: Sizes, kept: int = 0) -> Cost:
        """As for `TangentForm`, with the gathered entries for the weights."""
        layer, n, m, r = self.layer, sizes.n, sizes.m, sizes.directions
        rows, width, s = layer.groups * layer.features, layer.inputs, layer.positions
        gathered = self.chunks[0] * self.chunks[1]
        entries = gathered + (0 if layer.bias is None else rows)
        return cost_of_numbers(
            sizes,
            flops=2 * (n + m) * r * entries * s + 2 * n * m * sizes.entries * entries,
            layer_flops=2 * rows * width * s,
            stored=r * entries,
            per_row=r * entries,  # c T1
            once=2 * gathered,  # columns and values
        )

    def metric(
        self, weights: Sequence[Array | None], index: Sequence[Any], dtype: Any
    ) -> GatheredMetric:
        """See `AbstractForm`; tangents differ between rows, so every row is stored."""
        return gathered_metric(self.layer, weights, index, dtype, shares_rows=False)

    def keep(self, metric: GatheredMetric, operands: tuple[Array, ...], d: Array) -> Tangents:
        """See `AbstractForm`."""
        layer = self.layer
        a, d = factors(layer, operands, d).wide()
        flat = d.reshape(len(d), -1, layer.positions)
        seen = a[:, : layer.inputs].reshape(-1, layer.positions)
        t = [gathered_tangents(seen, flat, _in_group(layer, metric))]
        if layer.bias is not None:
            t.append(jnp.sum(flat, axis=2))
        return Tangents(jnp.concatenate(t, axis=1))

    def contract(
        self,
        one: Tangents,
        two: Tangents,
        metric: GatheredMetric,
        outputs: Outputs,
        precision: Precision,
    ) -> Array:
        """See `AbstractForm`."""
        c = metric.values.reshape(-1)
        if self.layer.bias is not None:
            c = jnp.concatenate([c, metric.offset])
        return gram(one, two, c, outputs)


def _in_group(layer: Layer, metric: GatheredMetric) -> GatheredMetric:
    """The metric with columns that index the input features of all groups together."""
    if layer.groups == 1:
        return metric
    first = metric.rows // layer.features * layer.inputs
    columns = jnp.minimum(metric.columns + first[:, None], layer.groups * layer.inputs - 1)
    return dataclasses.replace(metric, columns=columns)
