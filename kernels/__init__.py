"""The masked NTK products: one folder an operation, one file an implementation."""

from ._blocks import block_size as block_size, map_blocks as map_blocks
from ._gather import GatheredMetric as GatheredMetric, gather_rows as gather_rows
from ._dispatch import Choice as Choice
from ._dispatch import record_choices as record_choices
from ._dispatch import use_implementation as use_implementation
from .masked_ntk import masked_ntk as masked_ntk
from .masked_ntk import masked_ntk_choice as masked_ntk_choice
from .masked_ntk import masked_ntk_reference as masked_ntk_reference
from .masked_tangent_ntk import masked_tangent_ntk as masked_tangent_ntk
from .masked_tangent_ntk import masked_tangent_ntk_choice as masked_tangent_ntk_choice
from .masked_tangent_ntk import masked_tangent_ntk_reference as masked_tangent_ntk_reference
