"""Neural Tangent Transfer and exact masked neural tangent kernels for Equinox models."""

from typing import TYPE_CHECKING as _TYPE_CHECKING, Any as _Any

from . import (
    _scores as scores,
    data as data,
    kernels as kernels,
)
from ._compact import (
    Compacted as Compacted,
    CompactedArray as CompactedArray,
    EffectiveLayer as EffectiveLayer,
    EffectiveSparsity as EffectiveSparsity,
    compact as compact,
    coupled_channels as coupled_channels,
    effective_sparsity as effective_sparsity,
    few_channels as few_channels,
)
from ._distribute import distribute as distribute
from ._errors import DivergenceError as DivergenceError
from ._fit import Progress as Progress, fit as fit
from ._kernel_methods import (
    Eigenpairs as Eigenpairs,
    FeatureRidge as FeatureRidge,
    KernelComparison as KernelComparison,
    KernelGP as KernelGP,
    KernelObserver as KernelObserver,
    KernelRidge as KernelRidge,
    LayerCost as LayerCost,
    LinearizedModel as LinearizedModel,
    LossModel as LossModel,
    MSEPath as MSEPath,
    SpectralDensity as SpectralDensity,
    compare_kernels as compare_kernels,
    fit_kernel_gp as fit_kernel_gp,
    fit_kernel_ridge as fit_kernel_ridge,
    fit_kernel_ridge_cg as fit_kernel_ridge_cg,
    fit_kernel_ridge_features as fit_kernel_ridge_features,
    fit_kernel_ridge_nystrom as fit_kernel_ridge_nystrom,
    gradient_products as gradient_products,
    kernel_alignment as kernel_alignment,
    kernel_eigenvalues as kernel_eigenvalues,
    kernel_matrix as kernel_matrix,
    layer_costs as layer_costs,
    linearize as linearize,
    loss_model as loss_model,
    loss_path as loss_path,
    mse_path as mse_path,
    projected_gradients as projected_gradients,
    random_features as random_features,
    spectral_density as spectral_density,
    top_eigenpairs as top_eigenpairs,
)
from ._masks import (
    NM as NM,
    AbstractLayerPattern as AbstractLayerPattern,
    AbstractPattern as AbstractPattern,
    Block as Block,
    Channels as Channels,
    ConstantFanIn as ConstantFanIn,
    CoupledChannels as CoupledChannels,
    FewChannels as FewChannels,
    GradualDensity as GradualDensity,
    InLayout as InLayout,
    LayerCollapseWarning as LayerCollapseWarning,
    Sparsity as Sparsity,
    Unstructured as Unstructured,
    allocate as allocate,
    check_collapse as check_collapse,
    invert_scores as invert_scores,
    make_mask as make_mask,
    reinitialise as reinitialise,
    shuffle_mask as shuffle_mask,
)
from ._ntk import (
    AbstractLinearUse as AbstractLinearUse,
    AbstractNTKOperator as AbstractNTKOperator,
    Explanation as Explanation,
    NTKOperator as NTKOperator,
    ParameterCost as ParameterCost,
    StreamedNTKOperator as StreamedNTKOperator,
    explain as explain,
    ntk as ntk,
    ntk_and_outputs as ntk_and_outputs,
    ntk_operator as ntk_operator,
    ntk_tiles as ntk_tiles,
    ntk_to_zarr as ntk_to_zarr,
    register_linear_use as register_linear_use,
    sketch_directions as sketch_directions,
    streamed_ntk_operator as streamed_ntk_operator,
    weight_layouts as weight_layouts,
)
from ._observe import AbstractObserver as AbstractObserver, JSONLines as JSONLines
from ._prunable import (
    LeftOutWarning as LeftOutWarning,
    Prunable as Prunable,
    prunable_weights as prunable_weights,
)
from ._recipe import Recipe as Recipe
from ._refreshes import (
    AbstractPeriodicRefresh as AbstractPeriodicRefresh,
    AbstractRefresh as AbstractRefresh,
    AbstractRefreshView as AbstractRefreshView,
    MagnitudeRefresh as MagnitudeRefresh,
    NoRefresh as NoRefresh,
    RigLRefresh as RigLRefresh,
    RoundDensity as RoundDensity,
    RoundRefresh as RoundRefresh,
    ScoreRefresh as ScoreRefresh,
    SETRefresh as SETRefresh,
)
from ._scores import prune as prune
from ._sparse import (
    SparseModel as SparseModel,
    apply_mask as apply_mask,
    describe_prunable as describe_prunable,
    sparsify as sparsify,
)
from ._sparse_layers import (
    SparseConv as SparseConv,
    SparseLinear as SparseLinear,
    masked_layers as masked_layers,
    sparse_layers as sparse_layers,
)
from ._stateful import (
    StatefulModel as StatefulModel,
    forward as forward,
    warm_up as warm_up,
)
from ._step_info import StepInfo as StepInfo
from ._supervised import (
    AbstractObjective as AbstractObjective,
    CrossEntropy as CrossEntropy,
    DynamicSparsity as DynamicSparsity,
    SquaredError as SquaredError,
    TrainConfig as TrainConfig,
    TrainMetrics as TrainMetrics,
    TrainState as TrainState,
    TrainView as TrainView,
    evaluate as evaluate,
    lottery_ticket as lottery_ticket,
    rescale_by_density as rescale_by_density,
    train as train,
    train_init as train_init,
    train_step as train_step,
    train_steps as train_steps,
)
from ._transfer import (
    AbstractDistance as AbstractDistance,
    AbstractProbe as AbstractProbe,
    AbstractTransferLoss as AbstractTransferLoss,
    Alignment as Alignment,
    Diagonal as Diagonal,
    Full as Full,
    KernelMatching as KernelMatching,
    MeanSquare as MeanSquare,
    NeuralTangentTransfer as NeuralTangentTransfer,
    NTTConfig as NTTConfig,
    NTTMetrics as NTTMetrics,
    NTTState as NTTState,
    OutputsAndKernels as OutputsAndKernels,
    PatternWarning as PatternWarning,
    RefreshView as RefreshView,
    Sketch as Sketch,
    Trace as Trace,
    l2_penalty as l2_penalty,
    ntt_evaluate as ntt_evaluate,
    ntt_init as ntt_init,
    ntt_loss as ntt_loss,
    ntt_step as ntt_step,
    outputs_and_kernels as outputs_and_kernels,
    transfer as transfer,
)

if _TYPE_CHECKING:
    from . import (
        experiment as experiment,
        export as export,
        models as models,
    )

__version__ = "0.2.0"


# Clients of all that is above, which are imported when they are first used.
_LATER = ("experiment", "export", "models")


def __getattr__(name: str) -> _Any:
    if name in _LATER:
        from importlib import import_module

        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
