"""The masked NTK product over a mask's gathered non-zeros, from a kernel's two ragged products.

A module of kernels (`gathered_gpu`, `gathered_tpu`) has `u` and `pulled`; the sums over outputs
around them are XLA's. Both sides' gradients share `u` and its cotangent.
"""

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from .._gather import GatheredMetric, sum_columns
from .._precision import Precision, at_precision
from .reference import epilogue, epilogue_backward


def forward(
    kernels: ModuleType, a1, d1, a2, d2, c: GatheredMetric, *, precision: Precision, interpret: Any
) -> jax.Array:
    """`Theta[n, m, k, l]` in float32."""
    u = _u(kernels, a1, a2, c, precision, interpret)
    with at_precision(precision):
        return epilogue(u, d1.astype(jnp.float32), d2.astype(jnp.float32))


def backward(
    kernels: ModuleType,
    a1,
    d1,
    a2,
    d2,
    c: GatheredMetric,
    g,
    sides: tuple[bool, bool],
    *,
    precision: Precision,
    interpret: Any,
) -> list[jax.Array | None]:
    """Cotangents of `a1`, `d1`, `a2` and `d2`, from that of `Theta`; `None` of a side not asked."""
    u = _u(kernels, a1, a2, c, precision, interpret)
    with at_precision(precision):
        d1_bar, d2_bar, u_bar = epilogue_backward(
            g, u, d1.astype(jnp.float32), d2.astype(jnp.float32)
        )

    def one(u_bar, other, columns, samples):
        entries = kernels.pulled(u_bar, other, c, precision=precision, interpret=interpret)
        return sum_columns(entries[:, :, :samples] * c.values[:, :, None], c, columns)

    bars: list[jax.Array | None] = [None] * 4
    if sides[0]:
        bars[:2] = one(u_bar.transpose(2, 1, 0), a2, a1.shape[1], len(a1)), d1_bar
    if sides[1]:
        bars[2:] = one(u_bar.transpose(2, 0, 1), a1, a2.shape[1], len(a2)), d2_bar
    return bars


def _u(kernels, a1, a2, c, precision, interpret):
    u = kernels.u(a1, a2, c, precision=precision, interpret=interpret)
    return u.transpose(1, 2, 0) + c.offset[None, None].astype(u.dtype)
