"""The masked NTK product of a dense layer in pure JAX: the product on CPU, the measure elsewhere.

In the symbols of `kernels/README.md`, with per-sample cotangents `d[n,k,i] = df_k(x_n)/dy_i` and
activations `a[n,j]` of a layer `y = W a`, and a metric `c[i,j]` (a mask, or any weights >= 0):

    u[n,m,i]       = sum_j c[i,j] a1[n,j] a2[m,j]
    Theta[n,m,k,l] = sum_i d1[n,k,i] u[n,m,i] d2[m,l,i]
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .._blocks import block_size, map_blocks, on_cpu, scan_blocks
from .._gather import GatheredMetric, gathered_u, gathered_u_backward
from .._precision import accumulator_dtype


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

    return _over_samples(one, (jax.checkpoint(_u)(a1, a2, c), d1), d2)


def _ambient(a1, d1, a2, d2):
    """C = 1: the sums over i and j separate, Theta = (d1 . d2) (a1 . a2)."""
    return jnp.einsum("nki,mli->nmkl", d1, d2) * (a1 @ a2.T)[:, :, None, None]


@jax.custom_vjp
def _masked(a1, d1, a2, d2, c):
    return epilogue(_u(a1, a2, c), d1, d2)


def _masked_forward(a1, d1, a2, d2, c):
    return _masked(a1, d1, a2, d2, c), (a1, d1, a2, d2, c)


def _masked_backward(residuals, g):
    """The cotangents of both factors of both sides, with u made again."""
    a1, d1, a2, d2, c = residuals
    d1_bar, d2_bar, u_bar = epilogue_backward(g, _u(a1, a2, c), d1, d2)
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


def epilogue(u, d1, d2):
    """Theta[n,m,k,l] from u: the columns (m, l) side by side, one matrix product per n."""

    def one(row):
        u, d = row
        columns = (u[:, None, :] * d2).reshape(-1, d2.shape[-1])
        return (d @ columns.T).reshape(d.shape[0], *d2.shape[:2]).transpose(1, 0, 2)

    return _over_samples(one, (u, d1), d2)


def epilogue_backward(g, u, d1, d2):
    """A few n at a time, so that few intermediates of size M L I are alive.

    With g = dL/dTheta:

    dL/dd1[n,k,i] = sum_ml g[n,m,k,l] (u[n,m,i] d2[m,l,i])
    y[m,l,i]      = sum_k g[n,m,k,l] d1[n,k,i]
    dL/dd2[m,l,i] = sum_n u[n,m,i] y[m,l,i]
    dL/du[n,m,i]  = sum_l d2[m,l,i] y[m,l,i]
    """

    def one(row):
        u, d, g = row
        columns = (u[:, None, :] * d2).reshape(-1, d2.shape[-1])
        g = g.transpose(1, 0, 2).reshape(d.shape[0], -1)
        y = (g.T @ d).reshape(d2.shape)
        return u[:, None, :] * y, (g @ columns, jnp.sum(d2 * y, axis=1))

    def add_one(d2_bar, row):
        share, found = one(row)
        return d2_bar + share, found

    def add_block(d2_bar, rows):
        shares, found = jax.vmap(one)(rows)
        return d2_bar + jnp.sum(shares, axis=0), found

    rows, zeros = (u, d1, g), jnp.zeros_like(d2)
    if on_cpu():
        d2_bar, (d1_bar, u_bar) = jax.lax.scan(add_one, zeros, rows)
    else:
        size = block_size(len(u), 3 * d2.size * d2.dtype.itemsize)
        d2_bar, (d1_bar, u_bar) = scan_blocks(add_block, zeros, rows, len(u), size)
    return d1_bar, d2_bar, u_bar


def _over_samples(one, rows, d2):
    """`one` for each sample n of the first side, joined; it makes something of the size of `d2`.

    On a CPU one at a time, whose intermediates stay in cache; elsewhere as many as the memory of a
    block holds, by batched products.
    """
    count = len(rows[0])
    if on_cpu():
        return jax.lax.map(one, rows)
    size = block_size(count, d2.size * d2.dtype.itemsize)
    return map_blocks(jax.vmap(one), rows, count, size)
