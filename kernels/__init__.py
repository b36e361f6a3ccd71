"""The masked NTK products: one folder an operation, one file an implementation."""

from .masked_ntk import masked_ntk_reference as masked_ntk_reference
from .masked_tangent_ntk import masked_tangent_ntk_reference as masked_tangent_ntk_reference
