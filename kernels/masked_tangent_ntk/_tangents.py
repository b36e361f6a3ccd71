"""Per-sample tangents of a layer applied at many positions, and their gradient, as XLA products."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from .._precision import Precision, at_precision


def tangents(
    a: Float[Array, "n j s"], d: Float[Array, "n k i s"], precision: Precision
) -> Float[Array, "n*k i*j"]:
    """T[n,k,i,j] = sum_s d[n,k,i,s] a[n,j,s], one row for every sample and output.

    In float32, or in bfloat16 where the products that follow are.
    """
    with at_precision(precision):
        t = jnp.einsum("nkis,njs->nkij", d, a, preferred_element_type=jnp.float32)
    t = t.reshape(t.shape[0] * t.shape[1], -1)
    return t.astype(jnp.bfloat16) if precision == "bfloat16" else t


def pull_back(
    a: Float[Array, "n j s"],
    d: Float[Array, "n k i s"],
    t_bar: Float[Array, "n*k i*j"],
    precision: Precision,
) -> tuple[Float[Array, "n j s"], Float[Array, "n k i s"]]:
    """Cotangents of `a` and `d` in float32, from that of `T`."""
    t_bar = t_bar.reshape(*d.shape[:3], a.shape[1])
    a, d = a.astype(jnp.float32), d.astype(jnp.float32)
    with at_precision(precision):
        return jnp.einsum("nkij,nkis->njs", t_bar, d), jnp.einsum("nkij,njs->nkis", t_bar, a)
