"""The sums over outputs of the masked NTK product, on Hopper GPUs (Pallas, Mosaic GPU).

With u[n,m,i] given, g = dL/dTheta, and P[n,m,k,i] = sum_l g[n,m,k,l] d2[m,l,i]:

    Theta[n,m,k,l] = sum_i d1[n,k,i] u[n,m,i] d2[m,l,i]      (`theta`)
    dL/du[n,m,i]   = sum_k d1[n,k,i] P[n,m,k,i]              (`cotangents`)
    dL/dd1[n,k,i]  = sum_m u[n,m,i] P[n,m,k,i]               (the same)

What has N M K I entries, `d1 u` and `P`, never leaves the registers: it is 10 times the size of u
for 10 outputs, and writing and reading it is what XLA's form of these sums spends its time on.

A block is one warpgroup with 64 samples n. In `theta` it has one sample m and one output k, and
goes over tiles of i: `d1 u` is the left operand of `wgmma`, in registers, and `d2` the right one.
The two gradients are one kernel: a block has one tile of the result, and adds to it, over k or over
m, `P` times `d1` or `u`. A block writes what no other does: the same bits in every run.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .._mosaic_gpu import (
    BLOCKS,
    ROWS,
    Multiply,
    by_second,
    in_parts,
    kernel,
    layout,
    narrow_layout,
    right_operand,
)
from .._padding import ceil_to, pad_to
from .._precision import PIECES, Precision
from ..manual_axes import result_type

TILE_I = 64
# Of `theta`, features a tile: few, so that a multiprocessor has room for five blocks. Measured on
# an H100 (8192 x 512, N = M = 256): 0.35 ms; 0.56 with 64 of them and two samples m a block.
THETA_I = 32
STAGES = 2  # tiles in flight


def theta(u, d1, d2, *, precision: Precision, interpret=None) -> jax.Array:
    """`Theta[n, m, k, l]` in float32.

    **Arguments:**

    - `u`: `[N, M, I]`, in float32.
    - `d1`, `d2`: `[N, K, I]` and `[M, L, I]`.
    """
    (n_size, k_size, _), (m_size, l_size, _) = d1.shape, d2.shape
    tile_l = _tile_l(l_size)
    us = by_second(pad_to(u, (ROWS, 1, THETA_I)))
    d1s = by_second(pad_to(d1, (ROWS, 1, THETA_I)))
    d2 = pad_to(d2, (1, tile_l, THETA_I))
    d2s = right_operand(d2.reshape(-1, d2.shape[2]), precision)  # [(m, l), i]
    l_tiles, n_tiles = d2.shape[1] // tile_l, len(d1s) // k_size // ROWS
    multiply = Multiply(PIECES[precision], interpret is not None)

    def masked_ntk_theta(us, d1s, d2s, out, staged):
        n, m, k, l = (lax.axis_index(axis) for axis in "nmkl")  # noqa: E741

        def step(indices, d1_tile, u_tile, *d2_tiles_and_total):
            del indices
            *d2_tiles, total = d2_tiles_and_total
            left = d1_tile[...].astype(jnp.float32) * u_tile[...]
            product = multiply(left, d2_tiles, tile_l, transpose=True)
            plgpu.commit_smem()  # reads are over before the copy engine writes here again
            return total + product

        staged[...] = plgpu.emit_pipeline(
            step,
            grid=(us.shape[1] // THETA_I,),
            in_specs=[
                _rows_of(lambda i: (k * n_tiles + n, i), d1s.dtype, THETA_I),
                _rows_of(lambda i: (m * n_tiles + n, i), us.dtype, THETA_I),
                *[
                    plgpu.BlockSpec(
                        (tile_l, THETA_I),
                        lambda i: (m * l_tiles + l, i),
                        transforms=layout(THETA_I, jnp.bfloat16),
                    )
                    for _ in d2s
                ],
            ],
            max_concurrent_steps=STAGES,
            init_carry=jnp.zeros((ROWS, tile_l), jnp.float32),
        )(d1s, us, *d2s)
        plgpu.commit_smem()
        rows = pl.ds(((m * k_size + k) * n_tiles + n) * ROWS, ROWS)
        plgpu.copy_smem_to_gmem(staged, out.at[rows, pl.ds(l * tile_l, tile_l)])
        plgpu.wait_smem_to_gmem(0)

    rows = m_size * k_size * n_tiles * ROWS
    out = kernel(
        masked_ntk_theta,
        out_type=result_type((us, d1s, *d2s), (rows, l_tiles * tile_l), jnp.float32),
        grid=dict(n=n_tiles, m=m_size, k=k_size, l=l_tiles),
        scratch=dict(staged=plgpu.SMEM((ROWS, tile_l), jnp.float32)),
        interpret=interpret,
    )(us, d1s, d2s)
    out = out.reshape(m_size, k_size, n_tiles * ROWS, -1).transpose(2, 0, 1, 3)
    return out[:n_size, :, :, :l_size]


def cotangents(
    g, u, d1, d2, *, sides: tuple[bool, bool], precision: Precision, interpret=None
) -> tuple[jax.Array | None, jax.Array | None, jax.Array]:
    """Those of `d1`, of `d2`, and of `u`, in float32; `None` of a side not asked for.

    **Arguments:**

    - `g`: the cotangent of `Theta`, `[N, M, K, L]`.
    - `u`, `d1`, `d2`: those of `theta`.
    - `sides`: whether the cotangents of `d1` and of `d2` are asked for.
    """
    options: dict[str, Any] = dict(precision=precision, interpret=interpret)
    d1_bar = _weighted(g, u, d2, over_k=False, **options) if sides[0] else None
    exchanged = (g.transpose(1, 0, 3, 2), u.swapaxes(0, 1), d1)
    d2_bar = _weighted(*exchanged, over_k=False, **options) if sides[1] else None
    return d1_bar, d2_bar, _weighted(g, d1, d2, over_k=True, **options)


def _weighted(g, weights, d2, *, over_k: bool, precision: Precision, interpret) -> jax.Array:
    """`sum_s w[n,s,i] P[n,m,k,i]`: over s = k for every m, or over s = m for every k."""
    (n_size, m_size, k_size, l_size), i_size = g.shape, d2.shape[2]
    tile_l = _tile_l(l_size)
    ws = by_second(pad_to(weights, (ROWS, 1, TILE_I)))
    g = pad_to(g.astype(jnp.float32), (ROWS, 1, 1, tile_l))
    gs = g.transpose(1, 2, 0, 3).reshape(-1, g.shape[3])  # [(m, k, n), l]
    d2 = pad_to(d2, (1, tile_l, TILE_I))
    d2s = right_operand(d2.reshape(-1, d2.shape[2]), precision)  # [(m, l), i]
    n_tiles, l_tiles, i_tiles = len(g) // ROWS, d2.shape[1] // tile_l, d2.shape[2] // TILE_I
    results, terms = (m_size, k_size) if over_k else (k_size, m_size)
    parts, steps = in_parts(terms, n_tiles * results * i_tiles, BLOCKS)
    multiply = Multiply(PIECES[precision], interpret is not None)

    def masked_ntk_weighted(gs, ws, d2s, out, sums):
        n, r, i, part = (lax.axis_index(axis) for axis in ("n", "r", "i", "part"))
        sums[...] = jnp.zeros((ROWS, TILE_I), jnp.float32)
        first = part * steps

        def step(indices, g_tile, w_tile, *d2_tiles):
            del indices
            p = multiply(g_tile[...], d2_tiles, TILE_I, transpose=False)
            sums[...] += w_tile[...].astype(jnp.float32) * p
            plgpu.commit_smem()

        def pair(s):  # the samples m and outputs k of one term
            return (r, first + s) if over_k else (first + s, r)

        def g_tile(s, l):  # noqa: E741
            m, k = pair(s)
            return (m * k_size + k) * n_tiles + n, l

        plgpu.emit_pipeline(
            step,
            grid=(jnp.minimum(steps, terms - first), l_tiles),
            in_specs=[
                plgpu.BlockSpec((ROWS, tile_l), g_tile, transforms=layout(tile_l, jnp.float32)),
                _rows_of(lambda s, l: ((first + s) * n_tiles + n, i), ws.dtype),
                *[
                    plgpu.BlockSpec(
                        (tile_l, TILE_I),
                        lambda s, l: (pair(s)[0] * l_tiles + l, i),
                        transforms=narrow_layout(tile_l, TILE_I, jnp.bfloat16),
                    )
                    for _ in d2s
                ],
            ],
            max_concurrent_steps=STAGES,
        )(gs, ws, *d2s)
        plgpu.commit_smem()
        rows = pl.ds(((part * results + r) * n_tiles + n) * ROWS, ROWS)
        plgpu.copy_smem_to_gmem(sums, out.at[rows, pl.ds(i * TILE_I, TILE_I)])
        plgpu.wait_smem_to_gmem(0)

    out = kernel(
        masked_ntk_weighted,
        out_type=result_type(
            (gs, ws, *d2s), (parts * results * n_tiles * ROWS, i_tiles * TILE_I), jnp.float32
        ),
        grid=dict(n=n_tiles, r=results, i=i_tiles, part=parts),
        scratch=dict(
            sums=plgpu.SMEM((ROWS, TILE_I), jnp.float32, transforms=layout(TILE_I, jnp.float32))
        ),
        interpret=interpret,
    )(gs, ws, d2s)
    out = out.reshape(parts, results, n_tiles * ROWS, -1).sum(0).transpose(1, 0, 2)
    return out[:n_size, :, :i_size]


def _rows_of(index_map, dtype, columns: int = TILE_I) -> plgpu.BlockSpec:
    return plgpu.BlockSpec((ROWS, columns), index_map, transforms=layout(columns, dtype))


def _tile_l(outputs: int) -> int:
    """Outputs l a tile: a multiple of 16, at most 32."""
    return min(32, ceil_to(outputs, 16))
