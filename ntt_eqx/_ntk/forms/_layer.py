"""What the forms of a layer share: a whole metric, or a gathered one."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array

from ...kernels import GatheredMetric
from .._layers import Layer
from .._metric import DenseMetric, dense_metric
from ._form import AbstractForm, Kept


class AbstractLayerForm(AbstractForm[Kept]):
    """A form for the weight and the bias of a linear layer.

    Attributes:
        layer: the layer.
    """

    layer: eqx.AbstractVar[Layer]

    @property
    def parameters(self) -> tuple[int, ...]:
        """The layer's weight, and its bias."""
        bias = self.layer.bias
        return (self.layer.weight,) if bias is None else (self.layer.weight, bias)


class AbstractWholeForm(AbstractLayerForm[Kept]):
    """A form with no metric, or with one for every weight.

    Attributes:
        masked: whether it has a metric; without one, `c = 1` everywhere.
    """

    masked: eqx.AbstractVar[bool]

    def metric(
        self, weights: Sequence[Array | None], index: Sequence[Any], dtype: Any
    ) -> DenseMetric | None:
        """See `AbstractForm`."""
        return dense_metric(self.layer, weights, dtype) if self.masked else None

    def count(self, metric: DenseMetric | None) -> int | None:
        """See `AbstractForm`."""
        if metric is None:
            return None
        weights = metric.values[..., : self.layer.inputs]
        return int(np.count_nonzero(jax.device_get(weights)))


class AbstractGatheredForm(AbstractLayerForm[Kept]):
    """A form with a metric at the entries that a mask keeps, whose indices are known.

    Attributes:
        chunks: number of chunks of the gathered metric, and entries of each, padding included.
    """

    chunks: eqx.AbstractVar[tuple[int, int]]

    def count(self, metric: GatheredMetric) -> int | None:
        """See `AbstractForm`."""
        return int(np.count_nonzero(jax.device_get(metric.values)))
