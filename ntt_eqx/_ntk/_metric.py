"""Convert the metric `c_p` of the kernel's sum over parameters to the forms of a layer."""

import math
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array

from ..kernels import GatheredMetric, gather_rows
from ._layers import Layer
from ._linear import Places
from ._mask_index import MaskIndex


class DenseMetric(eqx.Module):
    """A layer's metric as a whole array.

    Attributes:
        values: `[G, I, J]`, with one more column for the bias if the layer has one.
    """

    values: Array


def dense_metric(layer: Layer, weights: Sequence[Array | None], dtype: Any) -> DenseMetric:
    """The metric of a layer as one array, from `c` for each parameter (`None` for 1)."""
    weight = weights[layer.weight]
    shape = (layer.groups, layer.features, layer.inputs)
    columns = jnp.ones(shape, bool) if weight is None else layer.metric(weight)
    if layer.bias is None:
        return DenseMetric(columns)
    bias = weights[layer.bias]
    column = jnp.ones(shape[:2], bool) if bias is None else layer.bias_metric(bias)
    if columns.dtype != column.dtype:
        columns, column = columns.astype(dtype), column.astype(dtype)
    return DenseMetric(jnp.concatenate([columns, column[..., None]], axis=2))


def gathered_metric(
    layer: Layer,
    weights: Sequence[Array | None],
    index: Sequence[MaskIndex | None],
    dtype: Any,
    *,
    shares_rows: bool,
) -> GatheredMetric:
    """The metric of a layer at the kept entries of its weight, and at its bias.

    **Arguments:**

    - `weights`: `c` for each parameter.
    - `index`: for each parameter that of its mask.
    - `shares_rows`: whether equal rows of a mask may be stored once.
    """
    offset = jnp.zeros(layer.groups * layer.features, dtype)
    if layer.bias is not None:
        bias, ones = weights[layer.bias], jnp.ones_like(offset)
        offset = ones if bias is None else layer.bias_metric(bias).reshape(-1).astype(dtype)
    if layer.index is not None:
        return _metric_of_places(layer, layer.places, weights[layer.weight], offset)
    weight, known = weights[layer.weight], index[layer.weight]
    assert weight is not None and known is not None and known.places is not None
    rows = known.places
    values = layer.metric(weight).reshape(-1, layer.inputs)
    shares_rows = shares_rows and values.dtype == bool  # rows of numbers may differ
    if rows.shape != values.shape or rows.row_block > 1 and not shares_rows:
        rows = gather_rows(values.astype(bool), rows.capacity * rows.row_block)
    # The index is that of this very mask, whose entries need no look-up.
    return rows.metric(None if values.dtype == bool else values, offset)


def _metric_of_places(
    layer: Layer, places: Places, weight: Array | None, offset: Array
) -> GatheredMetric:
    """The metric of a weight that stores some entries alone, from `c` for each of these."""
    dtype, shape = offset.dtype, (layer.features, layer.inputs)
    if weight is None:
        values = places.entries < math.prod(layer.view.shape)
    else:
        stored = layer.view.apply(weight).reshape(-1)
        values = stored.at[places.entries].get(mode="fill", fill_value=0)
    return GatheredMetric(places.rows, places.columns, values.astype(dtype), offset, shape)
