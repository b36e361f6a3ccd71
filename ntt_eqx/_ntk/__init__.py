"""Finite-width neural tangent kernels: program, layers, plan, factors, contraction."""

from ._explain import (
    Explanation as Explanation,
    ParameterCost as ParameterCost,
    explain as explain,
)
from ._kernel import outputs_and_ntk as outputs_and_ntk
from ._layouts import weight_layouts as weight_layouts
from ._linear import (
    AbstractLinearUse as AbstractLinearUse,
    register_linear_use as register_linear_use,
)
from ._ntk import ntk as ntk, ntk_and_outputs as ntk_and_outputs
from ._operator import (
    AbstractNTKOperator as AbstractNTKOperator,
    NTKOperator as NTKOperator,
    ntk_operator as ntk_operator,
    projected as projected,
)
from ._sketch import sketch_directions as sketch_directions
from ._store import ntk_to_zarr as ntk_to_zarr
from ._streamed import (
    StreamedNTKOperator as StreamedNTKOperator,
    streamed_ntk_operator as streamed_ntk_operator,
)
from ._support import (
    check_support as check_support,
    fits_support as fits_support,
    found_support as found_support,
    is_support as is_support,
    mask_support as mask_support,
    refresh_support as refresh_support,
)
from ._tiles import ntk_tiles as ntk_tiles
