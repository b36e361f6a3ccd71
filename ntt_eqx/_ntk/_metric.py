"""The metric `c_p` of the kernel's sum over parameters, brought into the form each layer wants."""

import math
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Int

from ..kernels import GatheredMetric, gather_rows
from ._layers import Layer


class DenseMetric(eqx.Module):
    """A layer's metric in full.

    Attributes:
        values: `[G, I, J]`, with one more column for the bias where the layer has one.
    """

    values: Array


class SelectedMetric(eqx.Module):
    """A layer's metric where it is not zero, for tangents that are kept at these entries alone.

    Attributes:
        indices: flat indices into `[G, I, J]`, the bias's column included.
        values: the metric there.
    """

    indices: Int[Array, " entries"]
    values: Array


LayerMetric = DenseMetric | SelectedMetric | GatheredMetric | None


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
    if weight is not None and indices is not None and layer.keeps_order:
        if layer.positions > 1:
            return _selected(layer, weight, bias, indices, dtype)
        if layer.groups == 1:
            offset = jnp.zeros(layer.features, dtype)
            if layer.bias is not None:
                ones = jnp.ones(layer.features, dtype)
                offset = ones if bias is None else layer.bias_metric(bias)[0].astype(dtype)
            return gather_rows(indices, layer.metric(weight)[0], offset)
    return DenseMetric(_dense(layer, weight, bias, dtype))


def _dense(layer: Layer, weight: Array | None, bias: Array | None, dtype: Any) -> Array:
    shape = (layer.groups, layer.features, layer.inputs)
    columns = jnp.ones(shape, bool) if weight is None else layer.metric(weight)
    if layer.bias is None:
        return columns
    column = jnp.ones(shape[:2], bool) if bias is None else layer.bias_metric(bias)
    if columns.dtype != column.dtype:
        columns, column = columns.astype(dtype), column.astype(dtype)
    return jnp.concatenate([columns, column[..., None]], axis=2)


def _selected(
    layer: Layer, weight: Array, bias: Array | None, indices: Array, dtype: Any
) -> SelectedMetric:
    rows, width = layer.groups * layer.features, layer.inputs
    values = weight.reshape(-1).at[indices].get(mode="fill", fill_value=0).astype(dtype)
    if layer.bias is None:
        return SelectedMetric(indices, values)
    total = rows * (width + 1)
    inside = indices < math.prod(weight.shape)
    indices = jnp.where(inside, indices + indices // width, total)
    column = jnp.arange(rows, dtype=indices.dtype) * (width + 1) + width
    ones = jnp.ones(rows, dtype)
    more = ones if bias is None else layer.bias_metric(bias).reshape(-1).astype(dtype)
    return SelectedMetric(jnp.concatenate([indices, column]), jnp.concatenate([values, more]))
