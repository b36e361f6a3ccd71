"""u of a whole mask, and what its cotangent makes of the activations, on Hopper GPUs (Mosaic GPU).

    u[n,m,i]    = sum_j c[i,j] a1[n,j] a2[m,j]               (`u`)
    a1_bar[n,j] = sum_m a2[m,j] sum_i u_bar[n,m,i] c[i,j]    (`pulled`)

A block is one warpgroup with 64 samples `n`; several blocks share a multiprocessor, so that one
computes while another waits. In `u` a block has a few samples `m` and one tile of `i`. For each
`m` the rows of one matrix are the 64 `n`: `a1 a2`, which has N M J entries, is formed in registers
and is the left operand of `wgmma`, the tile of `c` the right one, over tiles of `j` that the copy
engine (TMA) loads ahead. In `pulled` a block has one tile of `j` and goes over `i` and over samples
`m`: `u_bar` is the left operand, and the tile of `c` stays in shared memory for all `m`. A block
writes what no other does; nothing is added atomically.

Numbers in float32 precision are sums of three bfloat16 ones (`kernels._precision`). The right
operand `c` is small and is split once, before the kernel; a 0/1 mask is exact in one piece. Every
array is padded with zeros to whole tiles, in both operands of each product.
"""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from .._dispatch import target_device
from .._mosaic_gpu import (
    ACC,
    BLOCKS,
    RESERVED_BYTES,
    ROWS,
    SHARED_BYTES,
    Multiply,
    across_rows,
    by_second,
    in_parts,
    kernel,
    layout,
    narrow_layout,
    right_operand,
)
from .._padding import pad_to
from .._precision import PIECES, Precision
from ..manual_axes import result_type


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile sizes.

    `m` samples of the second side, `i` output features and `j` input features a tile; `a1_j` input
    features a tile in the gradient of the activations. `stages` tiles of `j` are in flight, and
    sums over `m` are cut into parts while there are fewer than `blocks` blocks.
    """

    m: int = 2
    i: int = 64
    j: int = 64
    a1_j: int = 128
    stages: int = 2
    blocks: int = BLOCKS

    def __post_init__(self):
        for name, unit in dict(m=1, i=64, j=64, a1_j=64, stages=1, blocks=1).items():
            size = getattr(self, name)
            if size <= 0 or size % unit:
                raise ValueError(f"Config: {name}={size} must be a positive multiple of {unit}.")
        if self.m * self.i > 128:
            raise ValueError(
                f"Config: m * i = {self.m * self.i} must be at most 128: sums and products of u "
                "take half a register each, of the 255 that a thread has."
            )
        if self.a1_j > 256:
            raise ValueError(f"Config: a1_j={self.a1_j} is above the 256 columns of one wgmma.")

    def shared_bytes(self, itemsize: int, pieces: int) -> int:
        """What the larger of the kernels keeps in shared memory.

        By the size of an entry of the activations and the number of bfloat16 pieces of `c`.
        """
        tiles = self.j * ((ROWS + self.m) * itemsize + 2 * self.i * pieces)
        u = self.stages * tiles + 4 * self.m * ROWS * self.i
        pulled = 4 * ROWS * self.a1_j + 2 * pieces * self.i * self.a1_j
        pulled += self.stages * (4 * ROWS * self.i + self.a1_j * itemsize)
        return max(u, pulled)

    def fits(self, itemsize: int, pieces: int) -> bool:
        """Whether a multiprocessor has the shared memory for it."""
        return self.shared_bytes(itemsize, pieces) <= SHARED_BYTES - RESERVED_BYTES


# Tile sizes measured best, by the kind of the device; the rest have the default. None is measured
# yet: `benchmarks/tune_kernels.py` finds them.
TUNED: dict[str, Config] = {}


def config_for(
    sizes: tuple[int, int, int], dtype: DTypeLike, precision: Precision, *, binary: bool
) -> Config:
    """The tiles for `sizes = (N, M, I)`: those of the device, cut down to the sizes and to memory.

    A `binary` c, a 0/1 mask, is exact in one piece.
    """
    n, m, i = sizes
    t = TUNED.get(target_device().kind, Config())
    t = dataclasses.replace(t, m=min(t.m, m))
    while not t.fits(jnp.dtype(dtype).itemsize, 1 if binary else PIECES[precision]):
        if t.m == 1:
            raise ValueError(f"{t} does not fit the {SHARED_BYTES} bytes of shared memory.")
        t = dataclasses.replace(t, m=t.m // 2)
    while t.m > 1 and -(-n // ROWS) * -(-m // t.m) * -(-i // t.i) < t.blocks:
        t = dataclasses.replace(t, m=t.m // 2)  # small batches: rather more blocks
    return t


def u(a1, a2, c, *, precision: Precision, config: Config | None = None, interpret=None):
    """`u[n, m, i]` in float32."""
    n_size, m_size, i_size = len(a1), len(a2), len(c)
    t = config or _config(a1, a2, c, precision)
    a1, a2 = pad_to(a1, (ROWS, t.j)), pad_to(a2, (t.m, t.j))
    cs = right_operand(pad_to(c, (t.i, t.j)), precision)
    n_tiles, m_tiles, i_tiles = len(a1) // ROWS, len(a2) // t.m, len(cs[0]) // t.i
    multiply = Multiply(PIECES[precision], interpret is not None)

    def masked_ntk_u(a1, a2, cs, out, staged):
        n, m, i = (lax.axis_index(axis) for axis in "nmi")

        def step(indices, a1_tile, a2_tile, *c_tiles_and_totals):
            del indices
            *c_tiles, totals = c_tiles_and_totals
            a = a1_tile[...].astype(jnp.float32)

            def compute(*sums):
                for q in range(t.m):
                    outer = a * across_rows(a2_tile, q, (ROWS, t.j))
                    multiply.add(sums[q], outer, c_tiles, transpose=True)
                return tuple(acc[...] for acc in sums)

            sums = pl.run_scoped(compute, *[ACC((ROWS, t.i), jnp.float32)] * t.m)
            plgpu.commit_smem()  # reads are over before the copy engine writes here again
            return tuple(total + x for total, x in zip(totals, sums, strict=True))

        totals = plgpu.emit_pipeline(
            step,
            grid=(a1.shape[1] // t.j,),
            in_specs=[
                plgpu.BlockSpec((ROWS, t.j), lambda j: (n, j), transforms=layout(t.j, a1.dtype)),
                plgpu.BlockSpec((t.m, t.j), lambda j: (m, j)),
                *[
                    plgpu.BlockSpec(
                        (t.i, t.j), lambda j: (i, j), transforms=layout(t.j, jnp.bfloat16)
                    )
                    for _ in cs
                ],
            ],
            max_concurrent_steps=t.stages,
            init_carry=(jnp.zeros((ROWS, t.i), jnp.float32),) * t.m,
        )(a1, a2, *cs)
        for q in range(t.m):
            staged[q] = totals[q]
        plgpu.commit_smem()
        for q in range(t.m):
            rows = pl.ds(((m * t.m + q) * n_tiles + n) * ROWS, ROWS)
            plgpu.copy_smem_to_gmem(staged.at[q], out.at[rows, pl.ds(i * t.i, t.i)])
        plgpu.wait_smem_to_gmem(0)

    out = kernel(
        masked_ntk_u,
        out_type=result_type(
            (a1, a2, *cs), (len(a2) * len(a1), i_tiles * t.i), jnp.float32
        ),  # [(m, n), i]
        grid=dict(n=n_tiles, m=m_tiles, i=i_tiles),
        scratch=dict(
            staged=plgpu.SMEM((t.m, ROWS, t.i), jnp.float32, transforms=layout(t.i, jnp.float32))
        ),
        interpret=interpret,
    )(a1, a2, cs)
    out = out.reshape(len(a2), len(a1), -1).transpose(1, 0, 2)
    return out[:n_size, :m_size, :i_size]


def pulled(u_bar, a2, c, *, precision: Precision, config: Config | None = None, interpret=None):
    """`a1_bar[n, j]` in float32, from `u_bar[n, m, i]`; that of `a2` with the sides exchanged."""
    (n_size, m_size, _), j_size = u_bar.shape, a2.shape[1]
    t = config or _config(u_bar, a2, c, precision)
    u_bar, a2 = pad_to(u_bar, (ROWS, 1, t.i)), pad_to(a2, (1, t.a1_j))
    cs = right_operand(pad_to(c, (t.i, t.a1_j)), precision)
    rows = by_second(u_bar)  # [(m, n), i]
    n_tiles, i_tiles, j_tiles = (
        size // tile
        for size, tile in ((len(u_bar), ROWS), (rows.shape[1], t.i), (a2.shape[1], t.a1_j))
    )
    parts, steps = in_parts(m_size, n_tiles * j_tiles, t.blocks)
    multiply = Multiply(PIECES[precision], interpret is not None)

    def masked_ntk_pulled(rows, a2, cs, out, sums, c_tiles, barrier):
        n, j, part = (lax.axis_index(axis) for axis in ("n", "j", "part"))
        sums[...] = jnp.zeros((ROWS, t.a1_j), jnp.float32)
        first, columns = part * steps, pl.ds(j * t.a1_j, t.a1_j)

        def each_tile(i, _):
            for q, piece in enumerate(cs):
                source = piece.at[pl.ds(i * t.i, t.i), columns]
                plgpu.copy_gmem_to_smem(source, c_tiles.at[q], barrier)
            plgpu.barrier_wait(barrier)
            pieces = [c_tiles.at[q] for q in range(len(cs))]

            def step(indices, u_tile, a2_tile):
                del indices
                v = multiply(u_tile[...], pieces, t.a1_j, transpose=False)
                sums[...] += v * across_rows(a2_tile, 0, (ROWS, t.a1_j))
                plgpu.commit_smem()

            plgpu.emit_pipeline(
                step,
                grid=(jnp.minimum(steps, m_size - first),),
                in_specs=[
                    plgpu.BlockSpec(
                        (ROWS, t.i),
                        lambda m: ((first + m) * n_tiles + n, i),
                        transforms=layout(t.i, jnp.float32),
                    ),
                    plgpu.BlockSpec((1, t.a1_j), lambda m: (first + m, j)),
                ],
                max_concurrent_steps=t.stages,
            )(rows, a2)
            return None

        lax.fori_loop(0, i_tiles, each_tile, None)
        plgpu.commit_smem()
        target = out.at[pl.ds((part * n_tiles + n) * ROWS, ROWS), columns]
        plgpu.copy_smem_to_gmem(sums, target)
        plgpu.wait_smem_to_gmem(0)

    out = kernel(
        masked_ntk_pulled,
        out_type=result_type((rows, a2, *cs), (parts * n_tiles * ROWS, a2.shape[1]), jnp.float32),
        grid=dict(n=n_tiles, j=j_tiles, part=parts),
        scratch=dict(
            sums=plgpu.SMEM((ROWS, t.a1_j), jnp.float32, transforms=layout(t.a1_j, jnp.float32)),
            c_tiles=plgpu.SMEM(
                (len(cs), t.i, t.a1_j), jnp.bfloat16, transforms=narrow_layout(64, 64, jnp.bfloat16)
            ),
            barrier=plgpu.Barrier(num_arrivals=len(cs)),
        ),
        interpret=interpret,
    )(rows, a2, cs)
    return out.reshape(parts, n_tiles * ROWS, -1).sum(0)[:n_size, :j_size]


def _config(first, a2, c, precision: Precision) -> Config:
    return config_for((len(first), len(a2), len(c)), first.dtype, precision, binary=c.dtype == bool)
