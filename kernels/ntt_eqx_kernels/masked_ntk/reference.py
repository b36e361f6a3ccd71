"""The masked NTK product of a dense layer in pure JAX: the product on CPU, the measure elsewhere.

In the symbols of `kernels/README.md`, with per-sample cotangents `d[n,k,i] = df_k(x_n)/dy_i` and
activations `a[n,j]` of a layer `y = W a`, and a metric `c[i,j]` (a mask, or any weights >= 0):

    u[n,m,i]       = sum_j c[i,j] a1[n,j] a2[m,j]
    Theta[n,m,k,l] = sum_i d1[n,k,i] u[n,m,i] d2[m,l,i]
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .._blocks import block_size, map_blocks, scan_blocks
from .._gather import GatheredMetric, gathered_u, gathered_u_backward
from .._precision import accumulator_dtype
from .outputs import cotangents, over_samples, theta


def masked_ntk_reference(
    a1: Float[Array, "n j"],
    d1: Float[Array, "n k i"],
    a2: Float[Array, "m j"],
    d2: Float[Array, "m l i"],
    mask: Bool[Array, "i j"] | Float[Array, "i j"] | GatheredMetric | None = None,
) -> Float[Array, "n m k l"]:
    """`Theta` for every pair of samples and outputs, accumulated in at least float32.

    Beside arguments and result it keeps `u` of some samples n at a time, and nothing of size
    N M J; the gradient makes `u` again. A `GatheredMetric` makes the work for `u` proportional to
    its non-zeros.

    **Arguments:**

    - `a1`, `a2`: activations `[N, J]` and `[M, J]` that come into the layer.
    - `d1`, `d2`: cotangents `[N, K, I]` and `[M, L, I]` that flow back to its output.
    - `mask`: the metric c `[I, J]`: a mask, weights >= 0, or `None` for 1 everywhere.

    **Returns:**

    `[N, M, K, L]`, float64 for float64 factors and float32 otherwise.
    """
    dtype = accumulator_dtype(a1.dtype)
    a1, d1, a2, d2 = (x.astype(dtype) for x in (a1, d1, a2, d2))
    if mask is None:
        return _ambient(a1, d1, a2, d2)
    c = mask if isinstance(mask, GatheredMetric) else mask.astype(dtype)
    return _masked(a1, d1, a2, d2, c)


def masked_ntk_diagonal_reference(
    a1: Float[Array, "n j"],
    d1: Float[Array, "n k i"],
    a2: Float[Array, "m j"],
    d2: Float[Array, "m k i"],
    mask: Bool[Array, "i j"] | Float[Array, "i j"] | GatheredMetric | None = None,
) -> Float[Array, "n m k"]:
    """`Theta[n,m,k,k]`, at the cost of K instead of K^2 pairs of outputs.

    **Arguments:**

    - `a1`, `d1`, `a2`, `d2`, `mask`: those of `masked_ntk_reference`, with L = K.

    **Returns:**

    `[N, M, K]`.
    """
    dtype = accumulator_dtype(a1.dtype)
    a1, d1, a2, d2 = (x.astype(dtype) for x in (a1, d1, a2, d2))
    if mask is None:
        return jnp.einsum("nki,mki->nmk", d1, d2) * (a1 @ a2.T)[:, :, None]
    c = mask if isinstance(mask, GatheredMetric) else mask.astype(dtype)

    @jax.checkpoint
    def one(row):
        u, d = row
        return jnp.einsum("mi,ki,mki->mk", u, d, d2)

    return over_samples(one, (jax.checkpoint(_u)(a1, a2, c), d1), d2)


def _ambient(a1, d1, a2, d2):
    """C = 1: the sums over i and j separate, Theta = (d1 . d2) (a1 . a2)."""
    return jnp.einsum("nki,mli->nmkl", d1, d2) * (a1 @ a2.T)[:, :, None, None]


@jax.custom_vjp
def _masked(a1, d1, a2, d2, c):
    return theta(_u(a1, a2, c), d1, d2)


def _masked_forward(a1, d1, a2, d2, c):
    return _masked(a1, d1, a2, d2, c), (a1, d1, a2, d2, c)


def _masked_backward(residuals, g):
    """The cotangents of both factors of both sides, with u made again."""
    a1, d1, a2, d2, c = residuals
    d1_bar, d2_bar, u_bar = cotangents(g, _u(a1, a2, c), d1, d2)
    a1_bar, a2_bar = _u_backward(u_bar, a1, a2, c)
    return a1_bar, d1_bar, a2_bar, d2_bar, None


_masked.defvjp(_masked_forward, _masked_backward)


def _u(a1, a2, c):
    if isinstance(c, GatheredMetric):
        return gathered_u(a1, a2, c)
    block = lambda a: jnp.einsum("nmj,ij->nmi", a[:, None, :] * a2[None, :, :], c)
    return map_blocks(block, a1, len(a1), block_size(len(a1), a2.size * a2.dtype.itemsize))


def _u_backward(u_bar, a1, a2, c):
    """With v[n,m,j] = sum_i dL/du[n,m,i] c[i,j]: dL/da1 = sum_m v a2, dL/da2 = sum_n v a1."""
    if isinstance(c, GatheredMetric):
        return gathered_u_backward(u_bar, a1, a2, c)

    def block(a2_bar, rows):
        u_bar, a = rows
        v = jnp.einsum("nmi,ij->nmj", u_bar, c)
        return a2_bar + jnp.einsum("nmj,nj->mj", v, a), jnp.einsum("nmj,mj->nj", v, a2)

    size = block_size(len(a1), a2.size * a2.dtype.itemsize)
    a2_bar, a1_bar = scan_blocks(block, jnp.zeros_like(a2), (u_bar, a1), len(a1), size)
    return a1_bar, a2_bar
