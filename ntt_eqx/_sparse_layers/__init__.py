"""Layers that store kept weights alone: their products, and the way to and from masked layers."""

from . import _linear_use as _linear_use
from ._convert import masked_layers as masked_layers, sparse_layers as sparse_layers
from ._costs import (
    is_large as is_large,
    pays_in_a_transfer as pays_in_a_transfer,
    pays_in_training as pays_in_training,
)
from ._in_steps import (
    KeptEntries as KeptEntries,
    current_entries as current_entries,
    entries_have_room as entries_have_room,
    is_called_alike as is_called_alike,
    kept_entries as kept_entries,
    like_model as like_model,
    off_entries as off_entries,
    on_entries as on_entries,
)
from ._layers import SparseConv as SparseConv, SparseLinear as SparseLinear
from ._moments import Moments as Moments, moments_of as moments_of
