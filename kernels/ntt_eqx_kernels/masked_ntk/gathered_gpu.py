"""The masked NTK product over a mask's gathered non-zeros, on Hopper GPUs (Pallas, Mosaic GPU).

With G[e, n] = a[n, j_e] for the entries e = (i, j_e) of the mask:

    u[n,m,i]    = sum_{e of row i} c[e] G1[e,n] G2[e,m]            (`u`)
    E[e,n]      = sum_m u_bar[n,m,i] G2[e,m]                       (`pulled`)
    a1_bar[n,j] = sum_{e of column j} c[e] E[e,n]                  (`gathered.py`)

so that the work is 2 N M for each non-zero, instead of 2 N M I J. The entries of a row are cut into
chunks (`kernels._gather`), and a chunk belongs to one row. XLA gathers G, cut into bfloat16 pieces
(`kernels._precision`); both operands of every `wgmma` come from shared memory, so that registers
hold the sums alone.

`u`: a block has one row i and one tile of pairs, and goes over the chunks of the row, whose number
it reads from memory. `pulled`: a block has one chunk and one tile of samples, and goes over the
other side's. No block writes where another does, and nothing is added atomically: both give the
same bits in every run. The sums over equal columns are XLA's scatter, which on a GPU adds
atomically unless `XLA_FLAGS=--xla_gpu_deterministic_ops=true` is set.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .._gather import GatheredMetric, entries_of, row_starts
from .._mosaic_gpu import (
    ACC,
    RESERVED_BYTES,
    SHARED_BYTES,
    kernel,
    layout,
    right_operand,
)
from .._padding import ceil_to, pad_to
from .._precision import PIECES, Precision, products
from ..manual_axes import result_type


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile sizes: `n` samples of the first side, `m` of the second; `stages` tiles in flight."""

    n: int = 64
    m: int = 128
    stages: int = 4

    def __post_init__(self):
        for name, unit in dict(n=64, m=64, stages=1).items():
            size = getattr(self, name)
            if size <= 0 or size % unit:
                raise ValueError(f"Config: {name}={size} must be a positive multiple of {unit}.")
        if self.n * self.m > 64 * 128:
            raise ValueError(
                f"Config: n * m = {self.n * self.m} must be at most 8192: sums and products take "
                "two registers for each 128 of them, of the 255 that a thread has."
            )

    def shared_bytes(self, width: int, pieces: int) -> int:
        """What the larger of the kernels keeps in shared memory, for chunks of `width` entries."""
        chunk = 2 * pieces * width * (self.n + self.m) * self.stages + 4 * self.n * self.m
        pulled = 2 * pieces * 64 * (64 + self.m) * self.stages + 4 * 64 * self.m
        return max(chunk, pulled)


def config_for(m: int, width: int, precision: Precision) -> Config:
    """The tiles for M samples of the second side, cut down to the sizes and to shared memory."""
    t = Config(m=min(128, ceil_to(m, 64)))
    while t.shared_bytes(width, PIECES[precision]) > SHARED_BYTES - RESERVED_BYTES:
        if t.stages > 2:
            t = dataclasses.replace(t, stages=t.stages - 1)
        else:
            raise ValueError(f"{t} does not fit the {SHARED_BYTES} bytes of shared memory.")
    return t


def u(
    a1: jax.Array, a2: jax.Array, c: GatheredMetric, *, precision: Precision, interpret=None
) -> jax.Array:
    """`u[i, n, m] = sum_e c[e] a1[n, j_e] a2[m, j_e]`, without the offset, in float32."""
    width, n_size, m_size = c.columns.shape[1], len(a1), len(a2)
    t = config_for(m_size, width, precision)
    g1, g2 = entries_of(a1, c), entries_of(a2, c)  # [chunks, width, samples]
    g1 = (g1.astype(jnp.float32) * c.values[:, :, None]).swapaxes(1, 2)
    g1, g2 = pad_to(g1, (1, t.n, 1)), pad_to(g2, (1, 1, t.m))
    n_tiles, m_tiles = g1.shape[1] // t.n, g2.shape[2] // t.m
    lefts = right_operand(g1.reshape(-1, width), precision)  # [(chunk, n), e]
    rights = right_operand(g2.reshape(-1, g2.shape[2]), precision)  # [(chunk, e), m]
    starts = row_starts(c)
    add = _adding(len(lefts), len(rights))

    def masked_ntk_gathered_u(starts, lefts, rights, out, staged):
        i, n, m = lax.axis_index("i"), lax.axis_index("n"), lax.axis_index("m")
        first, last = starts[i], starts[i + 1]

        staged[...] = jnp.zeros((t.n, t.m), jnp.float32)

        @pl.when(last > first)
        def _():
            staged[...] = plgpu.emit_pipeline(
                add,
                grid=(last - first,),
                in_specs=[
                    *[
                        plgpu.BlockSpec(
                            (t.n, width),
                            lambda s: ((first + s) * n_tiles + n, 0),
                            transforms=layout(width, jnp.bfloat16),
                        )
                        for _ in lefts
                    ],
                    *[
                        plgpu.BlockSpec(
                            (width, t.m),
                            lambda s: (first + s, m),
                            transforms=layout(width, jnp.bfloat16),  # one for both
                        )
                        for _ in rights
                    ],
                ],
                max_concurrent_steps=t.stages,
                init_carry=jnp.zeros((t.n, t.m), jnp.float32),
            )(*lefts, *rights)

        plgpu.commit_smem()
        rows = pl.ds((i * n_tiles + n) * t.n, t.n)
        plgpu.copy_smem_to_gmem(staged, out.at[rows, pl.ds(m * t.m, t.m)])
        plgpu.wait_smem_to_gmem(0)

    out = kernel(
        masked_ntk_gathered_u,
        out_type=result_type(
            (starts, *lefts, *rights),
            (c.stored * n_tiles * t.n, m_tiles * t.m),
            jnp.float32,
        ),
        grid=dict(i=c.stored, n=n_tiles, m=m_tiles),
        scratch=dict(
            staged=plgpu.SMEM((t.n, t.m), jnp.float32, transforms=layout(t.m, jnp.float32))
        ),
        interpret=interpret,
    )(starts, lefts, rights)
    return out.reshape(c.stored, -1, m_tiles * t.m)[:, :n_size, :m_size]


def pulled(
    u_bar: jax.Array,
    other: jax.Array,
    c: GatheredMetric,
    *,
    precision: Precision,
    interpret=None,
) -> jax.Array:
    """`E[chunk, e, n] = sum_m other[m, j_e] u_bar[i, m, n]`, with n up to whole tiles."""
    chunks, width = c.columns.shape
    columns = min(128, ceil_to(u_bar.shape[2], 64))
    t = config_for(columns, width, precision)
    u_bar = pad_to(u_bar, (1, 64, t.m))
    rows, m_tiles, n_tiles = ceil_to(width, 64), u_bar.shape[1] // 64, u_bar.shape[2] // t.m
    g = pad_to(entries_of(other, c), (1, rows, 64))  # [chunks, rows of one chunk, m]
    lefts = right_operand(g.reshape(-1, g.shape[2]), precision)
    rights = right_operand(u_bar.reshape(-1, u_bar.shape[2]), precision)  # [(i, m), n]
    owners = c.owners.astype(jnp.int32)
    add = _adding(len(lefts), len(rights))

    def masked_ntk_gathered_pulled(owners, lefts, rights, out, staged):
        chunk, n = lax.axis_index("c"), lax.axis_index("n")
        i = owners[chunk]
        staged[...] = plgpu.emit_pipeline(
            add,
            grid=(m_tiles,),
            in_specs=[
                *[
                    plgpu.BlockSpec(
                        (rows, 64), lambda m: (chunk, m), transforms=layout(64, jnp.bfloat16)
                    )
                    for _ in lefts
                ],
                *[
                    plgpu.BlockSpec(
                        (64, t.m),
                        lambda m: (i * m_tiles + m, n),
                        transforms=layout(t.m, jnp.bfloat16),
                    )
                    for _ in rights
                ],
            ],
            max_concurrent_steps=min(t.stages, m_tiles),
            init_carry=jnp.zeros((rows, t.m), jnp.float32),
        )(*lefts, *rights)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(staged, out.at[pl.ds(chunk * rows, rows), pl.ds(n * t.m, t.m)])
        plgpu.wait_smem_to_gmem(0)

    out = kernel(
        masked_ntk_gathered_pulled,
        out_type=result_type(
            (owners, *lefts, *rights), (chunks * rows, n_tiles * t.m), jnp.float32
        ),
        grid=dict(c=chunks, n=n_tiles),
        scratch=dict(
            staged=plgpu.SMEM((rows, t.m), jnp.float32, transforms=layout(t.m, jnp.float32))
        ),
        interpret=interpret,
    )(owners, lefts, rights)
    return out.reshape(chunks, rows, -1)[:, :width]


def _adding(lefts: int, rights: int) -> Callable[..., Any]:
    """A step that adds one product of tiles in shared memory to a sum in registers.

    The tensor cores cut off what does not fit their sums instead of rounding it, always towards
    zero. So the sums over tiles are ordinary ones, and in a tile the small products come first.
    """
    pairs = products(lefts, rights)[::-1]

    def step(indices, *tiles_and_total):
        del indices
        *tiles, total = tiles_and_total

        def compute(acc):
            for p, q in pairs:
                plgpu.wgmma(acc, tiles[p], tiles[lefts + q])
            return acc[...]

        return total + pl.run_scoped(compute, ACC(total.shape, jnp.float32))

    return step
