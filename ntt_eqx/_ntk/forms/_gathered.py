"""A layer at one position, at the entries that its mask keeps."""

from collections.abc import Sequence
from typing import Any, ClassVar

from jaxtyping import Array

from ..._types import Outputs
from ...kernels import GatheredMetric, Precision
from .._layers import Layer
from .._metric import gathered_metric
from ._form import Cost, Path, Sizes, cost_of_numbers
from ._kept import LayerFactors, product_at_one_position, weight_factors
from ._layer import AbstractGatheredForm


class GatheredForm(AbstractGatheredForm[LayerFactors]):
    """The factors of a layer of one group at one position; `u` is computed from kept entries alone.

    Attributes:
        layer: the layer.
        chunks: number of chunks of the gathered metric, and entries of each, padding included.
    """

    path: ClassVar[Path] = "gathered factors"
    layer: Layer
    chunks: tuple[int, int]

    def cost(self, sizes: Sizes, kept: int = 0) -> Cost:
        """As for `DenseForm` with `kept` weights, and with the gathered activations."""
        layer, n, m, r = self.layer, sizes.n, sizes.m, sizes.directions
        rows, width = layer.features, layer.inputs
        chunks, entries = self.chunks[0], self.chunks[0] * self.chunks[1]
        return cost_of_numbers(
            sizes,
            flops=2 * n * m * (kept + sizes.entries * rows),
            layer_flops=2 * rows * width,
            stored=r * rows + width,
            per_row=entries,  # c a1 at every entry
            per_column=entries + r * rows,  # a2 at every entry; u d2, a row at a time
            per_pair=2 * rows + chunks,  # as in `DenseForm`, and a small product for each chunk
            once=2 * entries,  # columns and values
        )

    def metric(
        self, weights: Sequence[Array | None], index: Sequence[Any], dtype: Any
    ) -> GatheredMetric:
        """See `AbstractForm`; equal rows of a mask stay stored once."""
        return gathered_metric(self.layer, weights, index, dtype, shares_rows=True)

    def keep(self, metric: GatheredMetric, operands: tuple[Array, ...], d: Array) -> LayerFactors:
        """See `AbstractForm`."""
        return weight_factors(self.layer, operands, d)

    def contract(
        self,
        one: LayerFactors,
        two: LayerFactors,
        metric: GatheredMetric,
        outputs: Outputs,
        precision: Precision,
    ) -> Array:
        """See `AbstractForm`; also for layers side by side."""
        (a1, d1), (a2, d2) = one.group(0), two.group(0)
        sides = (a1[..., 0], d1[..., 0]), (a2[..., 0], d2[..., 0])
        return product_at_one_position(*sides, metric, outputs, precision)
