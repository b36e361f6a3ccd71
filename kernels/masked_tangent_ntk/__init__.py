"""The masked NTK product of a layer applied at many positions."""

from .reference import masked_tangent_ntk_reference as masked_tangent_ntk_reference
