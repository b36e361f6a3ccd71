"""The masked NTK product over a mask's gathered non-zeros, on TPUs (Pallas, Mosaic TPU).

The two products of `gathered_gpu.py`, whose symbols these are. A grid point has one chunk of the
entries of one row i: `u` adds its share to the block of row i, which stays in VMEM while the chunks
of the row pass, side by side as they are; `pulled` sums over tiles of the other side's samples. The
rows of the chunks are known ahead of the blocks (scalar prefetch). Nothing is added in another
order in another run.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .._gather import GatheredMetric, entries_of
from .._mosaic_tpu import dot
from .._padding import ceil_to, pad_to
from .._precision import Precision
from ..manual_axes import result_type

TILE = 256  # samples of either side at most: u of a tile takes 256 KiB of VMEM


def u(
    a1: jax.Array, a2: jax.Array, c: GatheredMetric, *, precision: Precision, interpret=False
) -> jax.Array:
    """`u[i, n, m] = sum_e c[e] a1[n, j_e] a2[m, j_e]`, without the offset, in float32."""
    (chunks, width), (n_size, m_size) = c.columns.shape, (len(a1), len(a2))
    n, m = _tile(n_size), _tile(m_size)
    g1 = entries_of(a1, c).astype(jnp.float32) * c.values[:, :, None]
    g1, g2 = pad_to(g1, (1, 1, n)), pad_to(entries_of(a2, c).astype(jnp.float32), (1, 1, m))
    rows = c.rows.astype(jnp.int32)  # those that are not in use have a row of their own, the last
    out = _call(
        functools.partial(_u_kernel, precision),
        grid=(g1.shape[2] // n, g2.shape[2] // m, chunks),
        in_specs=[
            pl.BlockSpec((None, width, n), lambda n, m, c, rows: (c, 0, n)),
            pl.BlockSpec((None, width, m), lambda n, m, c, rows: (c, 0, m)),
        ],
        out_spec=pl.BlockSpec((None, n, m), lambda n, m, c, rows: (rows[c], n, m)),
        out_shape=(c.stored + 1, g1.shape[2], g2.shape[2]),
        interpret=interpret,
    )(rows, g1, g2)
    # A row without entries has no chunk: what is in memory there was never written.
    written = jnp.zeros(c.stored + 1, bool).at[rows].set(True)
    return jnp.where(written[:, None, None], out, 0.0)[:-1, :n_size, :m_size]


def pulled(
    u_bar: jax.Array, other: jax.Array, c: GatheredMetric, *, precision: Precision, interpret=False
) -> jax.Array:
    """`E[chunk, e, n] = sum_m other[m, j_e] u_bar[i, m, n]`, with n up to whole tiles."""
    chunks, width = c.columns.shape
    m, n = _tile(u_bar.shape[1]), _tile(u_bar.shape[2])
    u_bar = pad_to(u_bar, (1, m, n))
    g = pad_to(entries_of(other, c).astype(jnp.float32), (1, 1, m))
    owners = c.owners.astype(jnp.int32)
    return _call(
        functools.partial(_pulled_kernel, precision),
        grid=(chunks, u_bar.shape[2] // n, u_bar.shape[1] // m),
        in_specs=[
            pl.BlockSpec((None, width, m), lambda c, n, m, rows: (c, 0, m)),
            pl.BlockSpec((None, m, n), lambda c, n, m, rows: (rows[c], m, n)),
        ],
        out_spec=pl.BlockSpec((None, width, n), lambda c, n, m, rows: (c, 0, n)),
        out_shape=(chunks, width, u_bar.shape[2]),
        interpret=interpret,
    )(owners, g, u_bar)


def _u_kernel(precision, rows, g1, g2, out):
    chunk = pl.program_id(2)

    @pl.when((chunk == 0) | (rows[chunk] != rows[jnp.maximum(chunk - 1, 0)]))
    def _():
        out[...] = jnp.zeros_like(out)

    out[...] += dot(g1[...], g2[...], (0, 0), precision)


def _pulled_kernel(precision, rows, g, u_bar, out):
    del rows

    @pl.when(pl.program_id(2) == 0)
    def _():
        out[...] = jnp.zeros_like(out)

    out[...] += dot(g[...], u_bar[...], (1, 0), precision)


def _tile(samples: int) -> int:
    return min(TILE, ceil_to(samples, 128))


def _call(kernel, *, grid, in_specs, out_spec, out_shape, interpret):
    def call(rows, *args):
        return pl.pallas_call(
            kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1, grid=grid, in_specs=in_specs, out_specs=out_spec
            ),
            out_shape=result_type((rows, *args), out_shape, jnp.float32),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary")
            ),
            interpret=interpret,
        )(rows, *args)

    return call
