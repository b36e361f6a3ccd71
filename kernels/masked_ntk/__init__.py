"""The masked NTK product of a dense layer."""

from .reference import (
    masked_ntk_diagonal_reference as masked_ntk_diagonal_reference,
    masked_ntk_reference as masked_ntk_reference,
)
