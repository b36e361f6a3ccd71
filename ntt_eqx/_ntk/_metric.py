"""Convert the metric `c_p` of the kernel's sum over parameters to the form of each layer."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array

from ..kernels import GatheredMetric, gather_rows
from ._forms import LayerPlan
from ._layers import Layer
from ._support import Checked


class DenseMetric(eqx.Module):
    """A layer's metric as a whole array.

    Attributes:
        values: `[G, I, J]`, with one more column for the bias if the layer has one.
    """

    values: Array


LayerMetric = DenseMetric | GatheredMetric | None


def layer_metric(
    plan: LayerPlan, metric: Sequence[Array | None], support: Sequence[Any], dtype: Any
) -> LayerMetric:
    """The metric of one layer in the form of its plan; `None` if it is 1 everywhere.

    **Arguments:**

    - `metric`: `c` for each parameter of the program, `None` for 1.
    - `support`: for each parameter the indices of its non-zero `c` (`GatheredRows` or `Checked`),
      or `None` if unknown.
    """
    layer = plan.layer
    weight = metric[layer.weight]
    bias = None if layer.bias is None else metric[layer.bias]
    if not plan.masked:
        return None
    if plan.gathered is None:
        return DenseMetric(_dense(layer, weight, bias, dtype))
    known = support[layer.weight]
    assert weight is not None and known is not None
    offset = jnp.zeros(layer.groups * layer.features, dtype)
    if layer.bias is not None:
        ones = jnp.ones_like(offset)
        offset = ones if bias is None else layer.bias_metric(bias).reshape(-1).astype(dtype)
    rows = known.rows if isinstance(known, Checked) else known
    values = layer.metric(weight).reshape(-1, layer.inputs)
    alike = plan.form == "factors" and values.dtype == bool  # a mask's rows, where u is all
    if rows.shape != values.shape or rows.height > 1 and not alike:
        rows = gather_rows(values.astype(bool), rows.room * rows.height)
    found = rows.metric(values, offset)
    if not isinstance(known, Checked):
        return found
    values = jnp.where(known.fits, found.values, jnp.nan)
    return dataclasses.replace(found, values=values.astype(found.values.dtype))


def _dense(layer: Layer, weight: Array | None, bias: Array | None, dtype: Any) -> Array:
    shape = (layer.groups, layer.features, layer.inputs)
    columns = jnp.ones(shape, bool) if weight is None else layer.metric(weight)
    if layer.bias is None:
        return columns
    column = jnp.ones(shape[:2], bool) if bias is None else layer.bias_metric(bias)
    if columns.dtype != column.dtype:
        columns, column = columns.astype(dtype), column.astype(dtype)
    return jnp.concatenate([columns, column[..., None]], axis=2)
