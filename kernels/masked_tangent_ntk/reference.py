"""The masked NTK product of a layer applied at many positions, in pure JAX.

A convolution (with its patches as `a`), or a dense layer that `vmap` applies along a sequence, has

    T[n,k,i,j]     = sum_s d[n,k,i,s] a[n,j,s]
    Theta[n,m,k,l] = sum_ij c[i,j] T1[n,k,i,j] T2[m,l,i,j]
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .._precision import accumulator_dtype


def masked_tangent_ntk_reference(
    a1: Float[Array, "n j s"],
    d1: Float[Array, "n k i s"],
    a2: Float[Array, "m j s"],
    d2: Float[Array, "m l i s"],
    mask: Bool[Array, "i j"] | Float[Array, "i j"] | None = None,
) -> Float[Array, "n m k l"]:
    """`Theta` for every pair of samples and outputs, accumulated in at least float32.

    The per-sample tangents `T` of both sides exist during the call; the gradient makes them again
    instead of keeping them.

    **Arguments:**

    - `a1`, `a2`: activations `[N, J, S]` and `[M, J, S]` that come into the layer, at S positions.
    - `d1`, `d2`: cotangents `[N, K, I, S]` and `[M, L, I, S]` that flow back to its output.
    - `mask`: the metric c `[I, J]`: a mask, weights >= 0, or `None` for 1 everywhere.

    **Returns:**

    `[N, M, K, L]`, float64 for float64 factors and float32 otherwise.
    """
    dtype = accumulator_dtype(a1.dtype)
    a1, d1, a2, d2 = (x.astype(dtype) for x in (a1, d1, a2, d2))
    c = None if mask is None else mask.astype(dtype)
    return _masked(a1, d1, a2, d2, c)


@jax.custom_vjp
def _masked(a1, d1, a2, d2, c):
    return _gram(_weighted(_tangents(a1, d1), c), _tangents(a2, d2))


def _masked_forward(a1, d1, a2, d2, c):
    return _masked(a1, d1, a2, d2, c), (a1, d1, a2, d2, c)


def _masked_backward(residuals, g):
    """The cotangents of both factors of both sides, with the tangents made again.

    With g = dL/dTheta:  dL/dT1[n,k,i,j] = c[i,j] sum_ml g[n,m,k,l] T2[m,l,i,j], and on each side
    dL/dd[n,k,i,s] = sum_j dL/dT a[n,j,s],  dL/da[n,j,s] = sum_ki dL/dT d[n,k,i,s].
    """
    a1, d1, a2, d2, c = residuals
    t1_bar = _weighted(jnp.einsum("nmkl,mlij->nkij", g, _tangents(a2, d2)), c)
    t2_bar = _weighted(jnp.einsum("nmkl,nkij->mlij", g, _tangents(a1, d1)), c)
    return (*_tangents_backward(a1, d1, t1_bar), *_tangents_backward(a2, d2, t2_bar), None)


_masked.defvjp(_masked_forward, _masked_backward)


def _tangents(a, d):
    return jnp.einsum("nkis,njs->nkij", d, a)


def _tangents_backward(a, d, t_bar):
    return jnp.einsum("nkij,nkis->njs", t_bar, d), jnp.einsum("nkij,njs->nkis", t_bar, a)


def _weighted(t, c):
    return t if c is None else t * c[None, None]


def _gram(t1, t2):
    """One matrix product over all weights: [N K, I J] x [I J, M L]."""
    n, k = t1.shape[:2]
    m, l = t2.shape[:2]
    theta = t1.reshape(n * k, -1) @ t2.reshape(m * l, -1).T
    return theta.reshape(n, k, m, l).transpose(0, 2, 1, 3)
