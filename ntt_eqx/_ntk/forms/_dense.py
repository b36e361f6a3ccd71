"""A layer at one position, with no metric or a whole one."""

from typing import Any, ClassVar

import jax
from jaxtyping import Array

from ..._types import Outputs
from ...kernels import BLOCK_BYTES, Precision
from ...kernels.manual_axes import zeros_of
from .._layers import Layer
from .._metric import DenseMetric
from ._form import Cost, Path, Sizes, cost_of_numbers
from ._kept import LayerFactors, factors, product_at_one_position
from ._layer import AbstractWholeForm

_FEW = 4  # groups that are contracted one by one, without a loop


class DenseForm(AbstractWholeForm[LayerFactors]):
    """The factors of a layer at one position: `Theta = (d1 . d2) (a1 . a2)` for c = 1.

    With a metric, `u[n,m,i] = sum_j c[i,j] a1[n,j] a2[m,j]` and
    `Theta[n,m,k,l] = sum_i d1[n,k,i] u[n,m,i] d2[m,l,i]`. Groups are independent of each other.
    """

    path: ClassVar[Path] = "factors"
    layer: Layer
    masked: bool

    def cost(self, sizes: Sizes, kept: int = 0) -> Cost:
        """Products of all pairs of samples; the metric makes them one for each weight."""
        layer, n, m, r = self.layer, sizes.n, sizes.m, sizes.directions
        rows, width = layer.groups * layer.features, layer.inputs
        stored = r * rows + layer.groups * (width + (layer.bias is not None))
        layer_flops = 2 * rows * width
        if not self.masked:
            return cost_of_numbers(
                sizes,
                flops=2 * n * m * (width + sizes.entries * rows),
                layer_flops=layer_flops,
                stored=stored,
                per_pair=1,  # a1 . a2
            )
        return cost_of_numbers(
            sizes,
            flops=2 * n * m * (rows * width + sizes.entries * rows),
            layer_flops=layer_flops,
            stored=stored,
            per_column=r * rows + width,  # u d2 and c a2, a sample of the first batch at a time
            per_pair=2 * rows,  # u[n,m,i], and its product with d or (in a gradient) its cotangent
            # The metric as numbers. The product takes rows of c in blocks of BLOCK_BYTES, a1 a2 of
            # all pairs at most.
            once=rows * width + min(n * m * width, BLOCK_BYTES // sizes.itemsize),
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

        def of_group(group: Any) -> Array:
            one, two, c = group
            return product_at_one_position(one, two, c, outputs, precision)

        sides = one.at_one_position(), two.at_one_position()
        groups = (*sides, None if metric is None else metric.values)
        first = jax.tree.map(lambda x: x[0], groups)
        if self.layer.groups == 1:
            return of_group(first)
        # One program for all groups, of which a scan over many layers has one for each of these.
        like = jax.eval_shape(of_group, first)
        add = lambda total, group: (total + of_group(group), None)
        few = self.layer.groups <= _FEW
        return jax.lax.scan(add, zeros_of(like, like.shape), groups, unroll=few)[0]
