"""Uses of tangent kernels: spectra, regression, linearised training, attribution."""

from ._alignment import (
    kernel_alignment as kernel_alignment,
)
from ._attribution import (
    LossModel as LossModel,
    gradient_products as gradient_products,
    loss_model as loss_model,
    projected_gradients as projected_gradients,
)
from ._diagnostics import (
    KernelComparison as KernelComparison,
    LayerCost as LayerCost,
    compare_kernels as compare_kernels,
    layer_costs as layer_costs,
)
from ._eigenpairs import (
    Eigenpairs as Eigenpairs,
    top_eigenpairs as top_eigenpairs,
)
from ._features import (
    FeatureRidge as FeatureRidge,
    fit_kernel_ridge_features as fit_kernel_ridge_features,
    random_features as random_features,
)
from ._linearize import (
    LinearizedModel as LinearizedModel,
    MSEPath as MSEPath,
    linearize as linearize,
    loss_path as loss_path,
    mse_path as mse_path,
)
from ._observer import (
    KernelObserver as KernelObserver,
)
from ._regression import (
    KernelGP as KernelGP,
    KernelRidge as KernelRidge,
    fit_kernel_gp as fit_kernel_gp,
    fit_kernel_ridge as fit_kernel_ridge,
    kernel_eigenvalues as kernel_eigenvalues,
    kernel_matrix as kernel_matrix,
)
from ._solve import (
    fit_kernel_ridge_cg as fit_kernel_ridge_cg,
    fit_kernel_ridge_nystrom as fit_kernel_ridge_nystrom,
)
from ._spectrum import (
    SpectralDensity as SpectralDensity,
    spectral_density as spectral_density,
)
