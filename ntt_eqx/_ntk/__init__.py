"""Finite-width neural tangent kernels: trace, find the layers, factorise, contract."""

from ._engine import outputs_and_ntk as outputs_and_ntk
from ._explain import (
    Explanation as Explanation,
    ParameterCost as ParameterCost,
    explain as explain,
)
from ._ntk import ntk as ntk
from ._sketch import sketch_directions as sketch_directions
from ._support import mask_support as mask_support, refresh_support as refresh_support
