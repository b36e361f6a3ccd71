"""`SparseLinear` and `SparseConv`: layers that store kept weights alone."""

import itertools
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from .._kept import AbstractKeptLayer
from ._index import AbstractIndex
from ._products import product
from ._shared_index import index_of
from ._sorted_index import SortedIndex


class SparseLinear(AbstractKeptLayer):
    """An `eqx.nn.Linear` that stores the kept entries of its weight alone.

    Attributes:
        values: the kept entries, row by row.
        bias: `[out_features]`, or `None`.
        index: where the entries are.
        settings: the layer that this one stands for, without its arrays.
    """

    values: Float[Array, " kept"]
    bias: Array | None
    index: AbstractIndex
    settings: eqx.nn.Linear

    def __init__(self, layer: eqx.nn.Linear, mask: Bool[np.ndarray, "out in"] | SortedIndex):
        """Keep the entries of `layer.weight` where `mask` is `True`.

        **Arguments:**

        - `layer`: the layer whose entries are kept.
        - `mask`: a NumPy array of the weight's shape, because shapes depend on it; or the index of
            a mask that may change.
        """
        if isinstance(mask, SortedIndex):
            self.values, self.index = mask.gather(layer.weight), mask
        else:
            self.values, self.index = layer.weight[mask], index_of(mask)
        self.bias = layer.bias
        self.settings = _without_arrays(layer)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """`(out_features, in_features)`."""
        return self.index.shape

    def mask(self) -> Bool[Array, "out in"]:
        """The mask of the weight."""
        return self.index.mask()

    def dense(self) -> eqx.nn.Linear:
        """The `eqx.nn.Linear` with zeros where no entry is kept."""
        return with_arrays(self.settings, self.index.scatter(self.values), self.bias)

    def __call__(self, x: Float[Array, "*in"], *, key: PRNGKeyArray | None = None) -> Array:
        """What the `eqx.nn.Linear` returns for `x` of shape `[in_features]`; `key` is ignored."""
        del key
        scalar = self.settings.in_features == "scalar"
        if jnp.shape(x) != (() if scalar else self.index.shape[1:]):
            raise ValueError(
                f"SparseLinear: the input must have shape {self.index.shape[1:]}, got "
                f"{jnp.shape(x)}; use jax.vmap for several."
            )
        y = _apply(self.values, jnp.reshape(x, (1,)) if scalar else x, self.index)
        y = y if self.bias is None else y + self.bias
        return jnp.squeeze(y, 0) if self.settings.out_features == "scalar" else y


class KeptMatrix(AbstractKeptLayer):
    """The weight of an `eqx.nn.Linear`, of which the kept entries alone are stored.

    The layer stays what it is, so that a model which asks for its class gets the same answer. A
    model that does anything else with the weight than to multiply by it gets an error.

    Attributes:
        values: the kept entries, row by row.
        index: where the entries are.
    """

    values: Float[Array, " kept"]
    index: AbstractIndex

    def __init__(self, values: Float[Array, " kept"], index: AbstractIndex):
        """Store the entries and their places."""
        self.values, self.index = values, index

    @property
    def bias(self) -> None:
        """None: the layer has it."""
        return None

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """`(out_features, in_features)`."""
        return self.index.shape

    def mask(self) -> Bool[Array, "out in"]:
        """The mask of the weight."""
        return self.index.mask()

    def dense(self) -> Array:
        """The weight with zeros where no entry is kept."""
        return self.index.scatter(self.values)

    def __matmul__(self, x: Float[Array, "in ..."]) -> Array:
        """The weight times `x` of shape `[in_features]` or `[in_features, columns]`."""
        if not 1 <= jnp.ndim(x) <= 2 or jnp.shape(x)[0] != self.index.shape[1]:
            raise ValueError(f"matmul: {self.index.shape} and {jnp.shape(x)} do not fit.")
        return _apply(self.values, x, self.index)


class SparseConv(AbstractKeptLayer):
    """An `eqx.nn.Conv` that stores the kept entries of its weight alone.

    It multiplies them by the windows of its input, which are stored for a moment: one number for
    each position, channel and entry of a filter.

    Attributes:
        values: the kept entries, filter by filter.
        bias: `[out_channels, 1, ...]`, or `None`.
        index: where the entries are, in a matrix from the windows of all groups to the filters.
        settings: the layer that this one stands for, without its arrays.
    """

    values: Float[Array, " kept"]
    bias: Array | None
    index: AbstractIndex
    settings: eqx.nn.Conv

    def __init__(self, layer: eqx.nn.Conv, mask: Bool[np.ndarray, "out in *window"]):
        """Keep the entries of `layer.weight` where `mask` is `True`.

        **Arguments:**

        - `layer`: the layer whose entries are kept.
        - `mask`: a NumPy array of the weight's shape, because shapes depend on it.
        """
        self.values = layer.weight[mask]
        self.bias = layer.bias
        self.index = index_of(_by_groups(mask, layer.groups))
        self.settings = _without_arrays(layer)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """`(out_channels, in_channels / groups, *kernel_size)`."""
        conv = self.settings
        return (conv.out_channels, conv.in_channels // conv.groups, *conv.kernel_size)

    def mask(self) -> Bool[Array, "out in *window"]:
        """The mask of the weight."""
        return self._of_groups(self.index.mask())

    def dense(self) -> eqx.nn.Conv:
        """The `eqx.nn.Conv` with zeros where no entry is kept."""
        weight = self._of_groups(self.index.scatter(self.values))
        return with_arrays(self.settings, weight, self.bias)

    def __call__(self, x: Float[Array, "in *space"], *, key: PRNGKeyArray | None = None) -> Array:
        """What the `eqx.nn.Conv` returns for `x` of one sample; `key` is ignored."""
        del key
        conv = self.settings
        if x.ndim != conv.num_spatial_dims + 1 or x.shape[0] != conv.in_channels:
            raise ValueError(
                f"SparseConv: the input must have {conv.in_channels} channels and "
                f"{conv.num_spatial_dims} axes of space, got shape {x.shape}; use jax.vmap for "
                "several."
            )
        windows = _windows(_padded(x, conv), conv)
        y = _apply(self.values, windows, self.index)
        return y if self.bias is None else y + self.bias

    def _of_groups(self, matrix: Array) -> Array:
        """The weight in a matrix that has zeros for the windows of all other groups."""
        groups = self.settings.groups
        out, inner = self.index.shape
        parts = matrix.reshape(groups, out // groups, groups, inner // groups)
        each = jnp.arange(groups)
        return parts[each, :, each].reshape(self.weight_shape)


def _apply(values: Array, x: Array, index: AbstractIndex) -> Array:
    dtype = jnp.result_type(values, x)
    return product(values.astype(dtype), x.astype(dtype), index)


def _without_arrays(layer: Any) -> Any:
    return jax.tree.map(lambda _: None, layer)


def with_arrays(settings: Any, weight: Array, bias: Array | None) -> Any:
    where = lambda layer: (layer.weight, layer.bias)
    return eqx.tree_at(where, settings, (weight, bias), is_leaf=lambda leaf: leaf is None)


def _by_groups(mask: np.ndarray, groups: int) -> np.ndarray:
    """The mask `[O, C / G, *window]` as a matrix `[O, C * window]`, block diagonal by groups."""
    rows = mask.reshape(groups, mask.shape[0] // groups, math.prod(mask.shape[1:]))
    matrix = np.zeros((groups, rows.shape[1], groups, rows.shape[2]), bool)
    each = np.arange(groups)
    matrix[each, :, each] = rows
    return matrix.reshape(mask.shape[0], groups * rows.shape[2])


def _padded(x: Array, conv: eqx.nn.Conv) -> Array:
    """`x` with the padding of a convolution, as `eqx.nn.Conv` adds it."""
    spread = [(k - 1) * d + 1 for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
    if isinstance(conv.padding, str):
        space = lax.padtype_to_pads(x.shape[1:], spread, conv.stride, conv.padding)
    else:
        space = conv.padding
    modes = {"REFLECT": "reflect", "REPLICATE": "edge", "CIRCULAR": "wrap"}
    if conv.padding_mode in modes:
        return jnp.pad(x, [(0, 0), *space], modes[conv.padding_mode])
    # not `jnp.pad`: a negative padding cuts
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *((a, b, 0) for a, b in space)])


def _windows(x: Array, conv: eqx.nn.Conv) -> Array:
    """What each entry of a filter sees: `[C * window, *out]`, one strided slice an entry."""
    sizes = [
        max(0, (n - (k - 1) * d - 1) // s + 1)
        for n, k, d, s in zip(
            x.shape[1:], conv.kernel_size, conv.dilation, conv.stride, strict=True
        )
    ]
    steps = [range(0, k * d, d) for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
    if not all(sizes):
        return jnp.zeros((x.shape[0] * math.prod(conv.kernel_size), *sizes), x.dtype)
    spans = [(n - 1) * s + 1 for n, s in zip(sizes, conv.stride, strict=True)]
    taps = []
    for first in itertools.product(*steps):
        stops = [start + span for start, span in zip(first, spans, strict=True)]
        taps.append(lax.slice(x, (0, *first), (x.shape[0], *stops), (1, *conv.stride)))
    return jnp.stack(taps, axis=1).reshape(x.shape[0] * len(taps), *sizes)
