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
from ._mask_index import (
    MaskIndex as MaskIndex,
    has_room as has_room,
    index_concrete as index_concrete,
    index_masks as index_masks,
    is_index as is_index,
    stored as stored,
)
from ._ntk import ntk as ntk, ntk_and_outputs as ntk_and_outputs
from ._operator import (
    AbstractNTKOperator as AbstractNTKOperator,
    NTKOperator as NTKOperator,
    along as along,
    drawn_direction as drawn_direction,
    ntk_operator as ntk_operator,
)
from ._sketch import sketch_directions as sketch_directions
from ._spec import KernelSpec as KernelSpec, kernel_spec as kernel_spec
from ._store import ntk_to_zarr as ntk_to_zarr
from ._streamed import (
    StreamedNTKOperator as StreamedNTKOperator,
    streamed_ntk_operator as streamed_ntk_operator,
)
from ._tiles import ntk_tiles as ntk_tiles
