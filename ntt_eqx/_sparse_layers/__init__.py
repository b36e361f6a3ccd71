"""Layers that store kept weights alone: their products, and the way to and from masked layers."""

from . import _linear_use as _linear_use
from ._convert import masked_layers as masked_layers, sparse_layers as sparse_layers
from ._layers import SparseConv as SparseConv, SparseLinear as SparseLinear
