"""Removal of what cannot matter in a sparse network, worked out on its traced program."""

from ._compact import (
    Compacted as Compacted,
    CompactedArray as CompactedArray,
    compact as compact,
)
from ._coupled import coupled_channels as coupled_channels, few_channels as few_channels
from ._effective import (
    EffectiveLayer as EffectiveLayer,
    EffectiveSparsity as EffectiveSparsity,
    effective_sparsity as effective_sparsity,
)
