"""The masked NTK product of a layer applied at many positions."""

from .api import (
    masked_tangent_ntk as masked_tangent_ntk,
    masked_tangent_ntk_choice as masked_tangent_ntk_choice,
)
from .reference import masked_tangent_ntk_reference as masked_tangent_ntk_reference
