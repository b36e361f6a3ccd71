"""Choose the form of a layer."""

from typing import Any

from ...kernels import gathered_shape
from .._costs import Costs
from .._layers import Layer
from ._dense import DenseForm
from ._entries import EntryForm
from ._form import Sizes
from ._gathered import GatheredForm
from ._gathered_tangent import GatheredTangentForm
from ._layer import AbstractLayerForm
from ._streamed import StreamedTangentForm
from ._tangent import TangentForm


def plan_layer(
    layer: Layer, masked: bool, nonzeros: int | None, sizes: Sizes, costs: Costs
) -> AbstractLayerForm[Any]:
    """The cheapest form of a layer.

    **Arguments:**

    - `masked`: whether its weight or its bias has a metric.
    - `nonzeros`: capacity for non-zeros of the weight's metric; `None` if they are unknown.
    """
    if layer.index is not None:  # there is nothing else of this weight
        if layer.positions == 1 and costs.entry_products:
            return EntryForm(layer)
        chunks = layer.places.columns.shape
        chunks = (chunks[0], chunks[1])
    else:
        chunks = None if nonzeros is None else _worth_gathering(layer, nonzeros, sizes, costs)
    if layer.positions == 1:
        if chunks is None:
            return DenseForm(layer, masked)
        return GatheredForm(layer, chunks)
    if chunks is not None:
        return GatheredTangentForm(layer, chunks)
    whole, streamed = TangentForm(layer, masked), StreamedTangentForm(layer, masked)
    if layer.groups > 1 or not sizes.all_pairs:  # which `masked_tangent_ntk` does not serve
        return whole
    # Both take the same operations but for the time at which tangents are computed: store less.
    return min(whole, streamed, key=lambda form: form.cost(sizes).stored)


def _worth_gathering(
    layer: Layer, nonzeros: int, sizes: Sizes, costs: Costs
) -> tuple[int, int] | None:
    """Number and width of the chunks of a gathered metric; `None` if gathering is not faster."""
    rows = layer.groups * layer.features
    if not layer.keeps_order or rows == 0:
        return None
    chunks, width = gathered_shape(nonzeros, rows)
    if layer.positions == 1:
        faster = costs.gather(chunks * width, rows, layer.inputs, sizes.n, sizes.m)
        return (chunks, width) if layer.groups == 1 and faster else None
    worth = costs.gathered_entry * chunks * width < rows * layer.inputs
    return (chunks, width) if worth else None
