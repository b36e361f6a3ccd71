"""The masked NTK products: one folder an operation, one file an implementation."""

from ._blocks import block_size as block_size, map_blocks as map_blocks
from ._gather import GatheredMetric as GatheredMetric, gather_rows as gather_rows
from .masked_ntk import (
    masked_ntk_diagonal_reference as masked_ntk_diagonal_reference,
    masked_ntk_reference as masked_ntk_reference,
)
from .masked_tangent_ntk import masked_tangent_ntk_reference as masked_tangent_ntk_reference
