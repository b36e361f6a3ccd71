"""u of a mask's gathered non-zeros, and what its cotangent makes of the activations, by kernels.

A module of kernels (`gathered_gpu`, `gathered_tpu`) has `u` and `pulled`, in which the rows i of
the mask come first; what is around them is the same on both devices.
"""

from types import ModuleType
from typing import Any

import jax

from .._gather import GatheredMetric, sum_columns
from .._precision import Precision


def u(
    kernels: ModuleType, a1, a2, c: GatheredMetric, *, precision: Precision, interpret: Any
) -> jax.Array:
    """`u[n, m, i]` in float32."""
    found = kernels.u(a1, a2, c, precision=precision, interpret=interpret)
    return c.spread(found.transpose(1, 2, 0)) + c.offset[None, None].astype(found.dtype)


def pulled(
    kernels: ModuleType, u_bar, a2, c: GatheredMetric, *, precision: Precision, interpret: Any
) -> jax.Array:
    """`a1_bar[n, j]` in float32, from `u_bar[n, m, i]`."""
    by_row = c.pool(u_bar).transpose(2, 1, 0)
    entries = kernels.pulled(by_row, a2, c, precision=precision, interpret=interpret)
    return sum_columns(entries[:, :, : len(u_bar)] * c.values[:, :, None], c, a2.shape[1])
