"""A layer at many positions, from its factors: tangents of a few features at a time."""

from typing import ClassVar

from jaxtyping import Array

from ..._types import Outputs
from ...kernels import BLOCK_BYTES, Precision, masked_tangent_ntk
from .._layers import Layer
from .._metric import DenseMetric
from ._form import Cost, Path, Sizes, cost_of_numbers
from ._kept import LayerFactors, factors
from ._layer import AbstractWholeForm


class StreamedTangentForm(AbstractWholeForm[LayerFactors]):
    """The factors of a layer of one group at many positions, where these are smaller than tangents.

    `T[k,i,j] = sum_s d[k,i,s] a[j,s]` and `Theta = sum_ij c_ij T1 T2`; the contraction computes the
    tangents of a few features i, and discards them. All pairs of outputs only.
    """

    path: ClassVar[Path] = "tangents"
    layer: Layer
    masked: bool

    def cost(self, sizes: Sizes, kept: int = 0) -> Cost:
        """The tangents of all samples, and their products for all pairs."""
        layer, n, m, r = self.layer, sizes.n, sizes.m, sizes.directions
        rows, width, s = layer.features, layer.inputs, layer.positions
        # The cotangents in another order, and tangents of one feature with their weighted copy.
        per_sample = r * rows * s + 2 * r * width
        return cost_of_numbers(
            sizes,
            flops=2 * (n + m) * r * rows * width * s + 2 * n * m * sizes.entries * rows * width,
            layer_flops=2 * rows * width * s,
            stored=s * (r * rows + width + (layer.bias is not None)),
            per_row=per_sample,
            per_column=per_sample,
            # The metric as numbers. Features are taken in blocks of BLOCK_BYTES of tangents.
            once=(rows * width if self.masked else 0)
            + min((n + m) * r * rows * width, BLOCK_BYTES // sizes.itemsize),
        )

    def keep(
        self, metric: DenseMetric | None, operands: tuple[Array, ...], d: Array
    ) -> LayerFactors:
        """See `AbstractForm`."""
        return factors(self.layer, operands, d)

    def contract(
        self,
        one: LayerFactors,
        two: LayerFactors,
        metric: DenseMetric | None,
        outputs: Outputs,
        precision: Precision,
    ) -> Array:
        """See `AbstractForm`."""
        assert outputs == "full" and self.layer.groups == 1  # `plan_layer` keeps tangents otherwise
        c = None if metric is None else metric.values[0]
        return masked_tangent_ntk(*one.group(0), *two.group(0), c, precision=precision)
