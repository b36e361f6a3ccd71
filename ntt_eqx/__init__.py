"""Neural Tangent Transfer and exact masked neural tangent kernels for Equinox models."""

from . import kernels as kernels
from ._sparse import (
    apply_mask as apply_mask,
    prunable_weights as prunable_weights,
    SparseModel as SparseModel,
    sparsify as sparsify,
)

__version__ = "0.1.0"
