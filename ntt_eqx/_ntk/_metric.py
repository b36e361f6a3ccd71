"""The metric `c_p` of the kernel's sum over parameters, brought into the form each layer wants."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array

from ..kernels import GatheredMetric, gather_rows, gathered_entries
from ._costs import costs
from ._layers import Layer


class DenseMetric(eqx.Module):
    """A layer's metric in full.

    Attributes:
        values: `[G, I, J]`, with one more column for the bias where the layer has one.
    """

    values: Array


LayerMetric = DenseMetric | GatheredMetric | None


def layer_metric(
    layer: Layer, metric: Sequence[Array | None], support: Sequence[Array | None], dtype: Any
) -> LayerMetric:
    """The metric of one layer; `None` where it is 1 throughout.

    **Arguments:**

    - `metric`: for each parameter of the program its `c`, or `None` for 1.
    - `support`: for each parameter the flat indices of all its non-zero `c` where they are known
      (ascending, filled up with one past the end), else `None`.
    """
    weight = metric[layer.weight]
    bias = None if layer.bias is None else metric[layer.bias]
    if weight is None and bias is None:
        return None
    indices = support[layer.weight]
    if weight is not None and indices is not None and _gathers(layer, len(indices)):
        offset = jnp.zeros(layer.groups * layer.features, dtype)
        if layer.bias is not None:
            ones = jnp.ones_like(offset)
            offset = ones if bias is None else layer.bias_metric(bias).reshape(-1).astype(dtype)
        return gather_rows(indices, layer.metric(weight).reshape(-1, layer.inputs), offset)
    return DenseMetric(_dense(layer, weight, bias, dtype))


def _gathers(layer: Layer, nonzeros: int) -> bool:
    """Whether a layer's non-zeros can be gathered, and are worth it."""
    if layer.positions == 1:
        return layer.keeps_order and layer.groups == 1
    rows = layer.groups * layer.features
    entries = gathered_entries(nonzeros, rows)
    return layer.keeps_order and costs().gathered_entry * entries < rows * layer.inputs


def _dense(layer: Layer, weight: Array | None, bias: Array | None, dtype: Any) -> Array:
    shape = (layer.groups, layer.features, layer.inputs)
    columns = jnp.ones(shape, bool) if weight is None else layer.metric(weight)
    if layer.bias is None:
        return columns
    column = jnp.ones(shape[:2], bool) if bias is None else layer.bias_metric(bias)
    if columns.dtype != column.dtype:
        columns, column = columns.astype(dtype), column.astype(dtype)
    return jnp.concatenate([columns, column[..., None]], axis=2)
