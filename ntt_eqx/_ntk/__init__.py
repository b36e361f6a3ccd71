"""Finite-width neural tangent kernels: trace, find the layers, factorise, contract."""

from ._ntk import ntk as ntk, outputs_and_ntk as outputs_and_ntk
