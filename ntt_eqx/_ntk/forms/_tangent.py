"""A layer at many positions, from its whole tangents."""

from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array

from ..._types import Outputs
from ...kernels import Precision
from .._layers import Layer
from .._metric import DenseMetric
from ._form import Cost, Path, Sizes, cost_of_numbers
from ._kept import Tangents, factors, gram
from ._layer import AbstractWholeForm


class TangentForm(AbstractWholeForm[Tangents]):
    """The derivative `T[k,g,i,j] = sum_s d[k,g,i,s] a[g,j,s]` of every sample by every weight."""

    path: ClassVar[Path] = "tangents"
    layer: Layer
    masked: bool

    def cost(self, sizes: Sizes, kept: int = 0) -> Cost:
        """Tangents of every sample once, then one matrix product over all weights."""
        layer, n, m, r = self.layer, sizes.n, sizes.m, sizes.directions
        rows, width, s = layer.groups * layer.features, layer.inputs, layer.positions
        entries = rows * (width + (layer.bias is not None))
        return cost_of_numbers(
            sizes,
            flops=2 * (n + m) * r * entries * s + 2 * n * m * sizes.entries * entries,
            layer_flops=2 * rows * width * s,
            stored=r * entries,
            per_row=r * entries if self.masked else 0,  # c T1
            once=rows * width if self.masked else 0,
        )

    def keep(self, metric: DenseMetric | None, operands: tuple[Array, ...], d: Array) -> Tangents:
        """See `AbstractForm`."""
        a, d = factors(self.layer, operands, d).wide()
        t = jnp.einsum("kgis,gjs->kgij", d, a)
        return Tangents(t.reshape(len(t), -1))

    def contract(
        self,
        one: Tangents,
        two: Tangents,
        metric: DenseMetric | None,
        outputs: Outputs,
        precision: Precision,
    ) -> Array:
        """See `AbstractForm`."""
        return gram(one, two, None if metric is None else metric.values.reshape(-1), outputs)
