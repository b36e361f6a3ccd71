"""Finite-width neural tangent kernels: trace, find the layers, factorise, contract."""

from ._ntk import (
    mask_support as mask_support,
    ntk as ntk,
    outputs_and_ntk as outputs_and_ntk,
    refresh_support as refresh_support,
)
