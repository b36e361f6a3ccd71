"""Mosaic TPU: which devices take the kernels, and how they multiply."""

import jax
import jax.numpy as jnp

from ._precision import Precision


def dot(x, y, axes: tuple[int, int], precision: Precision) -> jax.Array:
    """A product in one bfloat16 pass, or in as many as float32 takes (`tf32` too)."""
    if precision == "bfloat16":
        x, y = x.astype(jnp.bfloat16), y.astype(jnp.bfloat16)
    return jax.lax.dot_general(
        x,
        y,
        (((axes[0],), (axes[1],)), ((), ())),
        precision=None if precision == "bfloat16" else jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
