"""Neural Tangent Transfer and exact masked neural tangent kernels for Equinox models."""

from . import kernels as kernels
from ._ntk import ntk as ntk
from ._sparse import apply_mask as apply_mask
from ._sparse import prunable_weights as prunable_weights
from ._sparse import SparseModel as SparseModel
from ._sparse import sparsify as sparsify

__version__ = "0.1.0"
