"""The masked contraction of per-sample tangents on Hopper GPUs (Pallas, Mosaic GPU).

    T[n,k,i,j]     = sum_s d[n,k,i,s] a[n,j,s]                      (one batched product, by XLA)
    Theta[n,m,k,l] = sum_ij c[i,j] T1[n,k,i,j] T2[m,l,i,j]          (this kernel)

With rows r = (n, k), columns q = (m, l) and parameters p = (i, j), the kernel is the matrix product
`(T1 c) T2^T`. One block is one warpgroup with a tile of rows, of columns and a stretch of p; tiles
of p are loaded ahead by the copy engine (TMA), the left operand of `wgmma` is masked in registers,
so that no masked copy of the tangents is written, and the sums stay in registers. Stretches of p
give partial sums, added outside. Precision is as in `masked_ntk.pallas_gpu`.
"""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from .._dispatch import Device
from .._mosaic_gpu import (
    HOPPER,
    RESERVED_BYTES,
    ROWS,
    SHARED_BYTES,
    Multiply,
    across_rows,
    kernel,
    layout,
    right_operand,
    version_refusal,
)
from .._padding import ceil_to, pad_to
from .._precision import PIECES, Precision
from ..manual_axes import result_type
from ._tangents import pull_back, tangents

WITHOUT_MASK = "it is one matrix product"


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile sizes: `rows` times 64 rows (n, k), `columns` (m, l), `parameters` (i, j).

    `stages` tiles are in flight, and p is cut into stretches until there are `blocks` blocks.
    """

    rows: int = 2
    columns: int = 128
    parameters: int = 64
    stages: int = 2
    blocks: int = 264  # two for each of the 132 multiprocessors of an H100

    def __post_init__(self):
        units = dict(rows=1, columns=64, parameters=64, stages=1, blocks=1)
        for name, unit in units.items():
            size = getattr(self, name)
            if size <= 0 or size % unit:
                raise ValueError(f"Config: {name}={size} must be a positive multiple of {unit}.")
        if self.rows * self.columns > 256:
            raise ValueError(
                f"Config: rows * columns = {self.rows * self.columns} must be at most 256: the "
                "sums take half a register each, of the 255 that a thread has."
            )

    def shared_bytes(self, itemsize: int, pieces: int) -> int:
        """The larger of what the two kernels keep in shared memory."""
        left = self.rows * ROWS * self.parameters * itemsize + 4 * self.parameters
        gram = left + 2 * pieces * self.columns * self.parameters
        product = 4 * ROWS * ROWS + 2 * pieces * ROWS * self.columns
        return max(self.stages * gram, self.stages * product + 4 * ROWS * self.columns)


# Tile sizes measured best, by the kind of the device; the rest have the default. None is measured
# yet: `benchmarks/tune_kernels.py` finds them.
TUNED: dict[str, Config] = {}


def config_for(
    kind: str, rows: int, columns: int, dtype: DTypeLike, precision: Precision
) -> Config:
    """The tuned tiles, cut down to the sizes and to shared memory."""
    t = TUNED.get(kind, Config())
    t = dataclasses.replace(
        t, rows=min(t.rows, -(-rows // ROWS)), columns=min(t.columns, ceil_to(columns, 64))
    )
    itemsize = 2 if precision == "bfloat16" else 4
    while t.shared_bytes(itemsize, PIECES[precision]) > SHARED_BYTES - RESERVED_BYTES:
        if t.stages == 1:
            raise ValueError(f"{t} does not fit the {SHARED_BYTES} bytes of shared memory.")
        t = dataclasses.replace(t, stages=t.stages - 1)
    return t


def refusal(device: Device) -> str | None:
    """Why this kernel cannot run on a device, or `None`."""
    if device.platform != "gpu" or not any(name in device.kind for name in HOPPER):
        return f"needs a Hopper GPU, and the device is {device.kind!r} ({device.platform})"
    return version_refusal()


def forward(a1, d1, a2, d2, c, *, precision: Precision, config: Config, interpret=None):
    """`Theta[n, m, k, l]` in float32."""
    (n, k), (m, l) = d1.shape[:2], d2.shape[:2]  # noqa: E741
    t1, t2 = tangents(a1, d1, precision), tangents(a2, d2, precision)
    theta = _gram(t1, t2, c.reshape(1, -1), precision, config, interpret)
    return theta.reshape(n, k, m, l).transpose(0, 2, 1, 3)


def backward(a1, d1, a2, d2, c, g, *, precision: Precision, config: Config, interpret=None):
    """Cotangents of `a1` and `d1` in float32: dL/dT1 = c g T2, pulled back to the factors."""
    n, m, k, l = g.shape  # noqa: E741
    g = g.transpose(0, 2, 1, 3).reshape(n * k, m * l)
    t2 = tangents(a2, d2, precision)
    t1_bar = _weighted_product(g, t2, c.reshape(1, -1), precision, config, interpret)
    return pull_back(a1, d1, t1_bar, precision)


def _gram(t1, t2, c, precision, t: Config, interpret):
    rows, columns = len(t1), len(t2)
    tile = t.rows * ROWS
    r_tiles, q_tiles = -(-rows // tile), -(-columns // t.columns)
    p_tiles = -(-t1.shape[1] // t.parameters)
    stretches = min(p_tiles, max(1, t.blocks // (r_tiles * q_tiles)))
    steps = -(-p_tiles // stretches)
    stretches = -(-p_tiles // steps)
    stretch = steps * t.parameters
    t1, t2 = pad_to(t1, (tile, stretch)), pad_to(t2, (t.columns, stretch))
    c = pad_to(c.astype(jnp.float32), (1, stretch))
    t2s = right_operand(t2, precision)
    multiply = Multiply(PIECES[precision], interpret is not None)

    def body(t1, t2s, c, theta, staged):
        r, q, p0 = lax.axis_index("r"), lax.axis_index("q"), lax.axis_index("p")

        def compute(*sums):
            def step(indices, t1_tile, c_tile, *t2_tiles):
                del indices
                weights = across_rows(c_tile, 0, (ROWS, t.parameters))
                for index, acc in enumerate(sums):
                    x = t1_tile[pl.ds(index * ROWS, ROWS)].astype(jnp.float32) * weights
                    multiply.add(acc, x, t2_tiles, transpose=True)
                plgpu.wgmma_wait(0)
                plgpu.commit_smem()  # reads are over before the copy engine writes here again

            plgpu.emit_pipeline(
                step,
                grid=(steps,),
                in_specs=[
                    plgpu.BlockSpec(
                        (tile, t.parameters),
                        lambda p: (r, p0 * steps + p),
                        transforms=layout(t.parameters, t1.dtype),
                    ),
                    plgpu.BlockSpec((1, t.parameters), lambda p: (0, p0 * steps + p)),
                    *[
                        plgpu.BlockSpec(
                            (t.columns, t.parameters),
                            lambda p: (q, p0 * steps + p),
                            transforms=layout(t.parameters, jnp.bfloat16),
                        )
                        for _ in t2s
                    ],
                ],
                max_concurrent_steps=t.stages,
            )(t1, c, *t2s)
            return tuple(acc[...] for acc in sums)

        sums = pl.run_scoped(compute, *[plgpu.ACC((ROWS, t.columns), jnp.float32)] * t.rows)
        for index, total in enumerate(sums):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            staged[...] = total
            plgpu.commit_smem()
            first = ((p0 * r_tiles + r) * t.rows + index) * ROWS
            target = theta.at[pl.ds(first, ROWS), pl.ds(q * t.columns, t.columns)]
            plgpu.copy_smem_to_gmem(staged, target)
        plgpu.wait_smem_to_gmem(0)

    out = kernel(
        body,
        out_type=result_type(
            (t1, *t2s, c), (stretches * r_tiles * tile, q_tiles * t.columns), jnp.float32
        ),
        grid=dict(r=r_tiles, q=q_tiles, p=stretches),
        scratch=dict(
            staged=plgpu.SMEM(
                (ROWS, t.columns), jnp.float32, transforms=layout(t.columns, jnp.float32)
            )
        ),
        interpret=interpret,
    )(t1, t2s, c)
    return out.reshape(stretches, r_tiles * tile, -1).sum(0)[:rows, :columns]


def _weighted_product(g, t2, c, precision, t: Config, interpret):
    """c[p] sum_q g[r,q] T2[q,p]: one block has 64 rows and `t.columns` parameters."""
    rows, parameters = len(g), t2.shape[1]
    g = pad_to(g.astype(jnp.float32), (ROWS, ROWS))
    t2s = right_operand(pad_to(t2, (ROWS, t.columns)), precision)
    c = pad_to(c.astype(jnp.float32), (1, t.columns))
    multiply = Multiply(PIECES[precision], interpret is not None)

    def body(g, t2s, c, out, staged, weights, barrier):
        r, p = lax.axis_index("r"), lax.axis_index("p")
        columns = pl.ds(p * t.columns, t.columns)
        plgpu.copy_gmem_to_smem(c.at[:, columns], weights, barrier)

        def compute(acc):
            def step(indices, g_tile, *t2_tiles):
                del indices
                multiply.add(acc, g_tile[...], t2_tiles, transpose=False)
                plgpu.wgmma_wait(0)
                plgpu.commit_smem()

            plgpu.emit_pipeline(
                step,
                grid=(g.shape[1] // ROWS,),
                in_specs=[
                    plgpu.BlockSpec(
                        (ROWS, ROWS), lambda q: (r, q), transforms=layout(ROWS, jnp.float32)
                    ),
                    *[
                        plgpu.BlockSpec(
                            (ROWS, t.columns),
                            lambda q: (q, p),
                            transforms=layout(t.columns, jnp.bfloat16),
                        )
                        for _ in t2s
                    ],
                ],
                max_concurrent_steps=t.stages,
            )(g, *t2s)
            return acc[...]

        total = pl.run_scoped(compute, plgpu.ACC((ROWS, t.columns), jnp.float32))
        plgpu.barrier_wait(barrier)
        staged[...] = total * across_rows(weights, 0, (ROWS, t.columns))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(staged, out.at[pl.ds(r * ROWS, ROWS), columns])
        plgpu.wait_smem_to_gmem(0)

    out = kernel(
        body,
        out_type=result_type((g, *t2s, c), (len(g), c.shape[1]), jnp.float32),
        grid=dict(r=len(g) // ROWS, p=c.shape[1] // t.columns),
        scratch=dict(
            staged=plgpu.SMEM(
                (ROWS, t.columns), jnp.float32, transforms=layout(t.columns, jnp.float32)
            ),
            weights=plgpu.SMEM((1, t.columns), jnp.float32),
            barrier=plgpu.Barrier(),
        ),
        interpret=interpret,
    )(g, t2s, c)
    return out[:rows, :parameters]
