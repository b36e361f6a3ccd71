"""Neural Tangent Transfer and exact masked neural tangent kernels for Equinox models."""

from . import (
    _scores as scores,
    data as data,
    export as export,
    kernels as kernels,
    models as models,
)
from ._errors import DivergenceError as DivergenceError
from ._fit import Progress as Progress, fit as fit
from ._kernel_regression import (
    KernelRidge as KernelRidge,
    fit_kernel_ridge as fit_kernel_ridge,
    kernel_eigenvalues as kernel_eigenvalues,
    kernel_matrix as kernel_matrix,
)
from ._masks import (
    NM as NM,
    Block as Block,
    Channels as Channels,
    LayerCollapseWarning as LayerCollapseWarning,
    Pattern as Pattern,
    allocate as allocate,
    check_collapse as check_collapse,
    invert_scores as invert_scores,
    make_mask as make_mask,
    reinitialise as reinitialise,
    shuffle_mask as shuffle_mask,
)
from ._ntk import (
    AbstractLinearUse as AbstractLinearUse,
    Explanation as Explanation,
    ParameterCost as ParameterCost,
    explain as explain,
    ntk as ntk,
    ntk_and_outputs as ntk_and_outputs,
    ntk_tiles as ntk_tiles,
    register_linear_use as register_linear_use,
    sketch_directions as sketch_directions,
)
from ._scores import prune as prune
from ._sparse import (
    SparseModel as SparseModel,
    apply_mask as apply_mask,
    prunable_weights as prunable_weights,
    sparsify as sparsify,
)
from ._supervised import (
    AbstractObjective as AbstractObjective,
    CrossEntropy as CrossEntropy,
    SquaredError as SquaredError,
    TrainConfig as TrainConfig,
    TrainMetrics as TrainMetrics,
    TrainState as TrainState,
    evaluate as evaluate,
    rescale_by_density as rescale_by_density,
    train as train,
    train_init as train_init,
    train_step as train_step,
    train_steps as train_steps,
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
