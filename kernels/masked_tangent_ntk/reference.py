"""The masked NTK product of a layer applied at many positions, in pure JAX.

A convolution (with its patches as `a`), or a dense layer that `vmap` applies along a sequence, has

    T[n,k,i,j]     = sum_s d[n,k,i,s] a[n,j,s]
    Theta[n,m,k,l] = sum_ij c[i,j] T1[n,k,i,j] T2[m,l,i,j]
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .._blocks import block_size, scan_blocks
from .._precision import accumulator_dtype


def masked_tangent_ntk_reference(
    a1: Float[Array, "n j s"],
    d1: Float[Array, "n k i s"],
    a2: Float[Array, "m j s"],
    d2: Float[Array, "m l i s"],
    mask: Bool[Array, "i j"] | Float[Array, "i j"] | None = None,
) -> Float[Array, "n m k l"]:
    """`Theta` for every pair of samples and outputs, accumulated in at least float32.

    The per-sample tangents `T` are made for some output features i at a time, which stay in cache;
    the gradient makes them again instead of keeping them.

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
    def block(theta, rows):
        d1, d2, *c = rows
        return theta + _weighted(_tangents(a1, d1), *c) @ _tangents(a2, d2).T, None

    n, k, m, l = *d1.shape[:2], *d2.shape[:2]
    rows, size = _rows(a1, d1, a2, d2, c)
    theta, _ = scan_blocks(block, jnp.zeros((n * k, m * l), a1.dtype), rows, d1.shape[2], size)
    return theta.reshape(n, k, m, l).transpose(0, 2, 1, 3)


def _masked_forward(a1, d1, a2, d2, c):
    return _masked(a1, d1, a2, d2, c), (a1, d1, a2, d2, c)


def _masked_backward(residuals, g):
    """The cotangents of both factors of both sides, with the tangents made again.

    With g = dL/dTheta:  dL/dT1[n,k,i,j] = c[i,j] sum_ml g[n,m,k,l] T2[m,l,i,j], and on each side
    dL/dd[n,k,i,s] = sum_j dL/dT a[n,j,s],  dL/da[n,j,s] = sum_ki dL/dT d[n,k,i,s].
    """
    a1, d1, a2, d2, c = residuals
    n, k, m, l = *d1.shape[:2], *d2.shape[:2]
    g = g.transpose(0, 2, 1, 3).reshape(n * k, m * l)

    def side(a, d, t_bar):
        d = d.transpose(1, 2, 0, 3)
        t_bar = t_bar.reshape(*d.shape[:3], a.shape[1])
        d_bar = jnp.einsum("nkij,njs->nkis", t_bar, a)
        return jnp.einsum("nkij,nkis->njs", t_bar, d), d_bar.transpose(2, 0, 1, 3)

    def block(sums, rows):
        d1, d2, *c = rows
        a1_bar, d1_bar = side(a1, d1, _weighted(g @ _tangents(a2, d2), *c))
        a2_bar, d2_bar = side(a2, d2, _weighted(g.T @ _tangents(a1, d1), *c))
        return (sums[0] + a1_bar, sums[1] + a2_bar), (d1_bar, d2_bar)

    rows, size = _rows(a1, d1, a2, d2, c)
    zeros = (jnp.zeros_like(a1), jnp.zeros_like(a2))
    (a1_bar, a2_bar), (d1_bar, d2_bar) = scan_blocks(block, zeros, rows, d1.shape[2], size)
    return a1_bar, d1_bar.transpose(1, 2, 0, 3), a2_bar, d2_bar.transpose(1, 2, 0, 3), None


_masked.defvjp(_masked_forward, _masked_backward)


def _rows(a1, d1, a2, d2, c):
    """What is needed of each output feature i, and how many of them make a block."""
    tangents = (d1.shape[0] * d1.shape[1] + d2.shape[0] * d2.shape[1]) * a1.shape[1]
    rows = (d1.transpose(2, 0, 1, 3), d2.transpose(2, 0, 1, 3), *(() if c is None else (c,)))
    return rows, block_size(d1.shape[2], tangents * a1.dtype.itemsize)


def _tangents(a, d):
    """`T[(n,k),(i,j)]` of some rows i: a[n,j,s], d[i,n,k,s].

    It is d that is transposed: transposing the product, as the einsum would, moves more.
    """
    t = jnp.einsum("nkis,njs->nkij", d.transpose(1, 2, 0, 3), a)
    return t.reshape(t.shape[0] * t.shape[1], -1)


def _weighted(t, c=None):
    return t if c is None else t * c.reshape(1, -1)
