"""The forms in which a parameter can enter the kernel, their costs, and the choice between them."""

import dataclasses
import math
from typing import Literal, TypeAlias

from ..kernels import BLOCK_BYTES, gathered_shape
from ._costs import Costs
from ._layers import Layer

Form: TypeAlias = Literal["factors", "tangents"]
Path: TypeAlias = Literal[
    "factors", "gathered factors", "tangents", "gathered tangents", "jacobian", "unused"
]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes that determine the cost of a kernel.

    Attributes:
        n: samples of the first batch.
        m: samples of the second.
        directions: output directions R a sample; K where none are given.
        all_pairs: whether all R^2 pairs of them are wanted, or only those of k = l.
        itemsize: bytes of a number.
    """

    n: int
    m: int
    directions: int
    all_pairs: bool
    itemsize: int

    @property
    def entries(self) -> int:
        """Entries of the kernel of a pair of samples."""
        return self.directions**2 if self.all_pairs else self.directions


@dataclasses.dataclass(frozen=True)
class Cost:
    """Operations and bytes for one parameter's share of the kernel.

    Attributes:
        flops: floating-point operations of the contraction. The passes that make the factors are
            not counted, because all parameters share them.
        layer_flops: operations to evaluate the layer for one sample; 0 if there is no layer.
        stored: bytes of the factors (or tangents) of one sample.
        per_row: temporary bytes of the contraction for each sample of the first batch.
        per_column: the same for the second.
        per_pair: the same for each pair of samples, without the result.
        once: temporary bytes that do not depend on the number of samples.
    """

    flops: int
    layer_flops: int
    stored: int
    per_row: int
    per_column: int
    per_pair: int
    once: int


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """How a layer enters the kernel.

    Attributes:
        layer: the layer.
        form: whether its factors are kept, or its tangents.
        masked: whether it has a metric; without one, `c = 1` everywhere.
        gathered: number of chunks of the gathered metric and entries of each chunk, padding
            included; `None` if the metric is a whole array.
    """

    layer: Layer
    form: Form
    masked: bool
    gathered: tuple[int, int] | None

    @property
    def path(self) -> Path:
        """The form's name."""
        if self.layer.positions == 1:
            return "factors" if self.gathered is None else "gathered factors"
        return "tangents" if self.gathered is None else "gathered tangents"

    def cost(self, sizes: Sizes, kept: int) -> Cost:
        """The cost if the metric has `kept` non-zeros."""
        layer, n, m, r = self.layer, sizes.n, sizes.m, sizes.directions
        rows, width, s = layer.groups * layer.features, layer.inputs, layer.positions
        biases = 0 if layer.bias is None else rows
        pairs, numbers = n * m * sizes.entries, sizes.itemsize
        chunks, width_of_chunk = self.gathered or (0, 0)
        gathered, once = chunks * width_of_chunk, 0
        stored = s * (r * rows + layer.groups * (width + (layer.bias is not None)))
        per_row, per_column, per_pair = 0, 0, 2 * sizes.entries
        if self.form == "tangents":
            entries = (rows * width if self.gathered is None else gathered) + biases
            flops = 2 * (n + m) * r * entries * s + 2 * pairs * entries
            stored, per_row = r * entries, r * entries if self.masked else 0
        elif s > 1:
            flops = 2 * (n + m) * r * rows * width * s + 2 * pairs * rows * width
            # Tangents of some features at a time, and the cotangents in another order.
            per_row = per_column = r * rows * s + 2 * r * width
        elif not self.masked:
            flops = 2 * n * m * (width + sizes.entries * rows)
            per_pair += 1
        else:
            work = rows * width if self.gathered is None else kept
            flops = 2 * n * m * (work + sizes.entries * rows)
            per_pair += 2 * rows  # u[n, m, i] and one more array of its size
            per_column = r * rows  # u d2, for one sample of the first batch at a time
            if self.gathered is not None:
                per_row, per_column = gathered, gathered + per_column
                per_pair += chunks  # a small product for each
            else:
                per_column += width
        if self.masked:
            once = rows * width if self.gathered is None else 2 * gathered
        if self.form == "factors" and self.gathered is None and (self.masked or s > 1):
            # The product takes blocks of rows (one position) or of features (many positions).
            whole = n * m * width if s == 1 else (n + m) * r * rows * width
            once += min(whole, BLOCK_BYTES // numbers)
        scaled = (numbers * amount for amount in (stored, per_row, per_column, per_pair, once))
        return Cost(flops, 2 * rows * width * s, *scaled)


def plan_layer(
    layer: Layer, masked: bool, nonzeros: int | None, sizes: Sizes, costs: Costs
) -> LayerPlan:
    """The cheapest form of a layer.

    **Arguments:**

    - `masked`: whether its weight or its bias has a metric.
    - `nonzeros`: capacity for non-zeros of the weight's metric; `None` if they are unknown.
    """
    gathered = None if nonzeros is None else _gathered(layer, nonzeros, sizes, costs)
    return LayerPlan(layer, _form(layer, gathered, sizes), masked, gathered)


def jacobian_cost(count: int, sizes: Sizes) -> Cost:
    """The cost of the explicit Jacobian of a parameter with `count` entries."""
    stored = sizes.directions * count * sizes.itemsize
    flops = 2 * sizes.n * sizes.m * sizes.entries * count
    return Cost(flops, 0, stored, stored, 0, 2 * sizes.entries * sizes.itemsize, 0)


def _gathered(layer: Layer, nonzeros: int, sizes: Sizes, costs: Costs) -> tuple[int, int] | None:
    """Number and width of the chunks of a gathered metric; `None` if gathering is not faster."""
    rows = layer.groups * layer.features
    if not layer.keeps_order or rows == 0:
        return None
    chunks, width = gathered_shape(nonzeros, rows)
    if layer.positions == 1:
        whole = 2 * sizes.n * sizes.m * rows * layer.inputs
        return (chunks, width) if layer.groups == 1 and whole >= costs.gathering_flops else None
    worth = costs.gathered_entry * chunks * width < rows * layer.inputs
    return (chunks, width) if worth else None


def _form(layer: Layer, gathered: tuple[int, int] | None, sizes: Sizes) -> Form:
    """Keep factors or tangents: at many positions, whichever is smaller."""
    if layer.positions == 1:
        return "factors"
    rows, width = layer.groups * layer.features, layer.inputs + (layer.bias is not None)
    if layer.groups > 1 or not sizes.all_pairs or gathered is not None:
        return "tangents"
    factors = layer.positions * (sizes.directions * rows + layer.groups * width)
    return "tangents" if sizes.directions * rows * width <= factors else "factors"


def parameter_count(shape: tuple[int, ...], is_complex: bool) -> int:
    """Number of real entries of a parameter."""
    return math.prod(shape) * (2 if is_complex else 1)
