"""Neural Tangent Transfer and exact masked neural tangent kernels for Equinox models."""

from . import _scores as scores, kernels as kernels
from ._errors import DivergenceError as DivergenceError
from ._masks import (
    LayerCollapseWarning as LayerCollapseWarning,
    check_collapse as check_collapse,
    make_mask as make_mask,
)
from ._ntk import ntk as ntk
from ._sparse import (
    SparseModel as SparseModel,
    apply_mask as apply_mask,
    prunable_weights as prunable_weights,
    sparsify as sparsify,
)
from ._transfer import (
    NTTConfig as NTTConfig,
    NTTMetrics as NTTMetrics,
    NTTState as NTTState,
    ntt_init as ntt_init,
    ntt_loss as ntt_loss,
    ntt_step as ntt_step,
    transfer as transfer,
)

__version__ = "0.1.0"
