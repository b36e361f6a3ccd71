"""The sums over outputs of the masked NTK product, with u[n,m,i] given, in pure JAX."""

import jax
import jax.numpy as jnp

from .._blocks import block_size, map_rows, on_cpu, scan_blocks


def theta(u, d1, d2):
    """Theta[n,m,k,l] = sum_i d1[n,k,i] u[n,m,i] d2[m,l,i].

    The columns (m, l) side by side, one matrix product per n.
    """

    def one(row):
        u, d = row
        columns = (u[:, None, :] * d2).reshape(-1, d2.shape[-1])
        return (d @ columns.T).reshape(d.shape[0], *d2.shape[:2]).transpose(1, 0, 2)

    return over_samples(one, (u, d1), d2)


def cotangents(g, u, d1, d2):
    """Those of d1, d2 and u, a few n at a time: few intermediates of size M L I are alive.

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


def over_samples(one, rows, d2):
    """`one` for each sample n of the first side, joined; it makes something of the size of `d2`.

    On a CPU one at a time, whose intermediates stay in cache; elsewhere as many as the memory of a
    block holds, by batched products.
    """
    count = len(rows[0])
    size = 1 if on_cpu() else block_size(count, d2.size * d2.dtype.itemsize)
    return map_rows(one, rows, count, size)
