"""The masked NTK product of a dense layer."""

from .api import masked_ntk as masked_ntk, masked_ntk_choice as masked_ntk_choice
from .reference import (
    masked_ntk_diagonal_reference as masked_ntk_diagonal_reference,
    masked_ntk_reference as masked_ntk_reference,
)
