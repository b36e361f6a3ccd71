"""The masked NTK product of a dense layer in pure JAX: the product on CPU, the measure elsewhere.

In the symbols of `kernels/README.md`, with per-sample cotangents `d[n,k,i] = df_k(x_n)/dy_i` and
activations `a[n,j]` of a layer `y = W a`, and a metric `c[i,j]` (a mask, or any weights >= 0):

    u[n,m,i]     = sum_j c[i,j] a1[n,j] a2[m,j]
    Theta[n,m,k,l] = sum_i d1[n,k,i] u[n,m,i] d2[m,l,i]
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .._blocks import block_size, map_blocks, scan_blocks


def masked_ntk_reference(
    a1: Float[Array, "n j"],
    d1: Float[Array, "n k i"],
    a2: Float[Array, "m j"],
    d2: Float[Array, "m l i"],
    mask: Bool[Array, "i j"] | Float[Array, "i j"] | None = None,
) -> Float[Array, "n m k l"]:
    """`Theta` for every pair of samples and outputs, accumulated in at least float32.

    Memory beside the arguments and the result is bounded by a few blocks of
    `kernels._blocks.BLOCK_BYTES`, in the gradient too: nothing of size N M J or N M I is kept.
    """
    dtype = jnp.promote_types(a1.dtype, jnp.float32)
    a1, d1, a2, d2 = (x.astype(dtype) for x in (a1, d1, a2, d2))
    if mask is None:
        return _ambient(a1, d1, a2, d2)
    return _masked(a1, d1, a2, d2, mask.astype(dtype))


def _ambient(a1, d1, a2, d2):
    """C = 1: the sums over i and j separate, Theta = (d1 . d2) (a1 . a2)."""
    return jnp.einsum("nki,mli->nmkl", d1, d2) * (a1 @ a2.T)[:, :, None, None]


@jax.custom_vjp
def _masked(a1, d1, a2, d2, c):
    def block(rows):
        a, d = rows
        return _epilogue(_u(a, a2, c), d, d2)

    return map_blocks(block, (a1, d1), len(a1), _rows_per_block(a1, d1, a2, d2))


def _masked_forward(a1, d1, a2, d2, c):
    return _masked(a1, d1, a2, d2, c), (a1, d1, a2, d2, c)


def _masked_backward(residuals, g):
    """The cotangents of both factors of both sides, with u made again block by block.

    With g = dL/dTheta and P[n,m,k,i] = sum_l g[n,m,k,l] d2[m,l,i]:

    dL/dd1[n,k,i] = sum_m u P                dL/du[n,m,i] = sum_k d1 P
    dL/dd2[m,l,i] = sum_nk g d1 u            v[n,m,j] = sum_i dL/du c[i,j]
    dL/da1[n,j]   = sum_m v a2[m,j]          dL/da2[m,j] = sum_n v a1[n,j]
    """
    a1, d1, a2, d2, c = residuals

    def block(sums, rows):
        a, d, g = rows
        u = _u(a, a2, c)
        p = jnp.einsum("nmkl,mli->mnki", g, d2)
        d1_bar = jnp.einsum("mnki,nmi->nki", p, u)
        u_bar = jnp.einsum("mnki,nki->nmi", p, d)
        v = jnp.einsum("nmi,ij->nmj", u_bar, c)
        a1_bar = jnp.einsum("nmj,mj->nj", v, a2)
        q = jnp.einsum("nki,nmi->mnki", d, u)
        a2_bar = sums[0] + jnp.einsum("nmj,nj->mj", v, a)
        d2_bar = sums[1] + jnp.einsum("nmkl,mnki->mli", g, q)
        return (a2_bar, d2_bar), (a1_bar, d1_bar)

    zeros = (jnp.zeros_like(a2), jnp.zeros_like(d2))
    size = _rows_per_block(a1, d1, a2, d2)
    (a2_bar, d2_bar), (a1_bar, d1_bar) = scan_blocks(block, zeros, (a1, d1, g), len(a1), size)
    return a1_bar, d1_bar, a2_bar, d2_bar, None


_masked.defvjp(_masked_forward, _masked_backward)


def _u(a1, a2, c):
    outer = a1[:, None, :] * a2[None, :, :]
    return jnp.einsum("nmj,ij->nmi", outer, c)


def _epilogue(u, d1, d2):
    """Theta[n,m,k,l] from u: the columns (m, l) side by side, one matrix product per n."""

    def one(row):
        u, d = row
        columns = (u[:, None, :] * d2).reshape(-1, d2.shape[-1])
        return (d @ columns.T).reshape(d.shape[0], *d2.shape[:2]).transpose(1, 0, 2)

    return jax.lax.map(one, (u, d1))


def _rows_per_block(a1, d1, a2, d2):
    pairs = len(a2) * a1.dtype.itemsize
    widest = max(a1.shape[1], d1.shape[1] * d1.shape[2], d2.shape[1] * d2.shape[2])
    return block_size(len(a1), pairs * widest)
