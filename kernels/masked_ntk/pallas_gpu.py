"""The masked NTK product of a dense layer on Hopper GPUs (Pallas, Mosaic GPU).

    u[n,m,i]       = sum_j c[i,j] a1[n,j] a2[m,j]
    Theta[n,m,k,l] = sum_i d1[n,k,i] u[n,m,i] d2[m,l,i]

One block is one warpgroup with 64 samples `n`, a few samples `m` and one tile of `i`; several
blocks share a multiprocessor, so that one computes while another waits. For each `m` the rows of
one matrix are the 64 `n`: `a1 a2` is formed in registers and is the left operand of `wgmma`, the
tile of `c` the right one, over tiles of `j` that the copy engine (TMA) loads ahead. The
accumulators of `u` never leave the registers: for each `k`, `d1 u` is the left operand of a second
`wgmma` whose right operand is `d2`, which yields 64 rows of `Theta`. A block goes over the tiles of
`i` of one stretch and adds to the `Theta` that it alone writes; stretches are added outside.

Numbers in float32 precision are sums of three bfloat16 ones (`kernels._precision`). The right
operands, `c` and `d2`, are small and are split once, before the kernel; a 0/1 mask is exact in one
piece. Every array is padded with zeros to whole tiles, in both operands of each product.
"""

import dataclasses

import jax
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
    narrow_layout,
    right_operand,
    version_refusal,
)
from .._padding import ceil_to, pad_to
from .._precision import PIECES, Precision
from ..manual_axes import result_type

PARTIAL_BYTES = 16 * 2**20

WITHOUT_MASK = "the sums over i and j separate"


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile sizes.

    `m` samples of the second side, `i` output features and `j` input features a tile; `a1_j` input
    features a tile in the gradient of the activations; `k` outputs of the first side whose
    gradients are summed in shared memory together; `l` outputs of the second side. `stages` tiles
    of `j` are in flight, and `i` is cut into stretches while there are fewer than `blocks` blocks.
    """

    m: int = 4
    i: int = 64
    j: int = 64
    a1_j: int = 128
    k: int = 8
    l: int = 16  # noqa: E741
    stages: int = 2
    blocks: int = 132  # as many as an H100 has multiprocessors

    def __post_init__(self):
        for name, unit in dict(m=1, i=64, j=64, a1_j=64, k=1, l=16, stages=1, blocks=1).items():
            size = getattr(self, name)
            if size <= 0 or size % unit:
                raise ValueError(f"Config: {name}={size} must be a positive multiple of {unit}.")
        if self.m * self.i > 256:
            raise ValueError(
                f"Config: m * i = {self.m * self.i} must be at most 256: the sums of u take half a "
                "register each, of the 255 that a thread has."
            )
        for name, size in (("i", self.i), ("a1_j", self.a1_j), ("l", self.l)):
            if size > 256:
                raise ValueError(f"Config: {name}={size} is above the 256 columns of one wgmma.")

    def shared_bytes(self, itemsize: int, c_pieces: int, d_pieces: int) -> tuple[int, int, int]:
        """What the kernels of the product, of `d1` and of `a1` keep in shared memory.

        By the size of an entry of the factors and the number of bfloat16 pieces of `c` and `d2`.
        """
        d1_tile = ROWS * self.i * itemsize
        d2_tile = 2 * self.l * self.i * d_pieces
        g_tile = 4 * ROWS * self.l
        contraction = self.stages * self.j * ((ROWS + self.m) * itemsize + 2 * self.i * c_pieces)
        epilogue = 2 * (d1_tile + self.m * d2_tile)
        theta = max(contraction, epilogue) + self.m * g_tile
        d1 = 4 * self.k * ROWS * self.i + max(contraction, 2 * (g_tile + d2_tile))
        a1 = self.k * d1_tile + 4 * ROWS * self.a1_j + 2 * c_pieces * self.i * self.a1_j
        a1 += 2 * (self.k * g_tile + d2_tile + self.a1_j * itemsize)
        return theta, d1, a1


# Tile sizes measured best, by the kind of the device; the rest have the default. None is measured
# yet: `benchmarks/tune_kernels.py` finds them.
TUNED: dict[str, Config] = {}


def config_for(
    kind: str,
    shape: tuple[int, int, int, int, int, int],
    dtype: DTypeLike,
    precision: Precision,
    *,
    binary: bool,
) -> Config:
    """The tiles for `shape = (N, M, K, L, I, J)`: the tuned ones, cut down to sizes and memory."""
    _, m, k, l, i, _ = shape  # noqa: E741
    t = TUNED.get(kind, Config())
    # The pieces of float32 operands take registers, too: with 4 samples m ptxas spills and
    # serialises the products (`benchmarks/compile_for.py`), with 2 it does neither.
    most = t.m if precision == "bfloat16" else min(t.m, 2)
    t = dataclasses.replace(t, m=min(most, m), k=min(t.k, k), l=min(max(t.l, 64), ceil_to(l, 16)))
    pieces = PIECES[precision]

    def fit(config):
        sizes = config.shared_bytes(jnp.dtype(dtype).itemsize, 1 if binary else pieces, pieces)
        return [size <= SHARED_BYTES - RESERVED_BYTES for size in sizes]

    while not all(fit(t)):
        theta, _, _ = fit(t)
        if not theta and t.m > 1:
            t = dataclasses.replace(t, m=t.m // 2)
        elif t.k > 1:
            t = dataclasses.replace(t, k=t.k - 1)
        elif t.l > 16:
            t = dataclasses.replace(t, l=t.l - 16)
        else:
            raise ValueError(f"{t} does not fit the {SHARED_BYTES} bytes of shared memory.")
    while t.m > 1 and -(-shape[0] // ROWS) * -(-m // t.m) * (i // t.i) < t.blocks:
        t = dataclasses.replace(t, m=t.m // 2)  # small batches: rather more blocks
    chunks = -(-k // t.k)  # as even as can be
    return dataclasses.replace(t, k=-(-k // chunks))


def refusal(device: Device) -> str | None:
    """Why this kernel cannot run on a device, or `None`."""
    if device.platform != "gpu" or not any(name in device.kind for name in HOPPER):
        return f"needs a Hopper GPU, and the device is {device.kind!r} ({device.platform})"
    return version_refusal()


def forward(a1, d1, a2, d2, c, *, precision: Precision, config: Config, interpret=None):
    """`Theta[n, m, k, l]` in float32."""
    (n_size, k_size, i_size), (m_size, l_size, _) = d1.shape, d2.shape
    t = config
    steps, parts = _stretches(t, n_size, m_size, k_size, l_size, i_size)
    i_unit = parts * steps * t.i
    a1, a2 = pad_to(a1, (ROWS, t.j)), pad_to(a2, (t.m, t.j))
    d1, d2 = pad_to(d1, (ROWS, 1, i_unit)), pad_to(d2, (t.m, t.l, i_unit))
    cs = right_operand(pad_to(c, (i_unit, t.j)), precision)
    d2s = right_operand(d2.reshape(-1, i_unit), precision)
    n_tiles, m_tiles, l_tiles = len(a1) // ROWS, len(a2) // t.m, d2.shape[1] // t.l
    d1 = d1.transpose(1, 0, 2).reshape(-1, i_unit)  # [(k, n), i]
    multiply = Multiply(PIECES[precision], interpret is not None)

    def body(a1, d1, a2, d2s, cs, theta, staged, barrier):
        n, m, part = lax.axis_index("n"), lax.axis_index("m"), lax.axis_index("i")

        # d2 is [(m, l), i] and Theta [(part, m, k, n), l]; their rows are found by tile.
        def d2_tile(q, i):
            return lambda l, k: ((m * t.m + q) * l_tiles + l, i)

        def theta_tile(q, l, k):  # noqa: E741
            tile = ((part * m_tiles * t.m + m * t.m + q) * k_size + k) * n_tiles + n
            return theta.at[pl.ds(tile * ROWS, ROWS), pl.ds(l * t.l, t.l)]

        def one_tile(i, *, first: bool):
            u = _contract(t, multiply, a1, a2, cs, n, m, i)

            def step(indices, d1_tile, *d2_tiles):
                l, k = indices  # noqa: E741
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the stage is free again
                if not first:  # what the earlier tiles of i summed to
                    for q in range(t.m):
                        plgpu.copy_gmem_to_smem(theta_tile(q, l, k), staged.at[q], barrier)
                d = d1_tile[...].astype(jnp.float32)
                rows = [
                    multiply(d * u[q], d2_tiles[q :: t.m], t.l, transpose=True) for q in range(t.m)
                ]
                if not first:
                    plgpu.barrier_wait(barrier)
                for q in range(t.m):
                    staged[q] = rows[q] if first else staged[q] + rows[q]
                plgpu.commit_smem()
                for q in range(t.m):
                    plgpu.copy_smem_to_gmem(staged.at[q], theta_tile(q, l, k))

            d2_specs = [
                plgpu.BlockSpec((t.l, t.i), d2_tile(q, i), transforms=layout(t.i, jnp.bfloat16))
                for _ in d2s
                for q in range(t.m)
            ]
            d1_spec = plgpu.BlockSpec(
                (ROWS, t.i), lambda l, k: (k * n_tiles + n, i), transforms=layout(t.i, d1.dtype)
            )
            plgpu.emit_pipeline(
                step, grid=(l_tiles, k_size), in_specs=[d1_spec, *d2_specs], max_concurrent_steps=2
            )(d1, *(piece for piece in d2s for _ in range(t.m)))
            plgpu.wait_smem_to_gmem(0)

        one_tile(part * steps, first=True)
        if steps > 1:
            later = lambda step, _: one_tile(part * steps + step, first=False)
            lax.fori_loop(1, steps, later, None)

    rows = parts * len(a2) * k_size * len(a1)
    out = kernel(
        body,
        out_type=result_type((a1, d1, a2, *d2s, *cs), (rows, l_tiles * t.l), jnp.float32),
        grid=dict(n=n_tiles, m=m_tiles, i=parts),
        scratch=dict(
            staged=plgpu.SMEM((t.m, ROWS, t.l), jnp.float32),
            barrier=plgpu.Barrier(num_arrivals=t.m),
        ),
        interpret=interpret,
    )(a1, d1, a2, d2s, cs)
    out = out.reshape(parts, len(a2), k_size, len(a1), -1).sum(0)
    return out.transpose(2, 0, 1, 3)[:n_size, :m_size, :, :l_size]


def backward(a1, d1, a2, d2, c, g, *, precision: Precision, config: Config, interpret=None):
    """Cotangents of `a1` and `d1` in float32, from that of `Theta`.

    With P[n,m,k,i] = sum_l g[n,m,k,l] d2[m,l,i], and u made again:

        dL/dd1[n,k,i] = sum_m u P             dL/du[n,m,i] = sum_k d1 P
        dL/da1[n,j]   = sum_m a2[m,j] sum_i dL/du c[i,j]
    """
    (n, j), k, i = a1.shape, d1.shape[1], d1.shape[2]
    t = config
    d1, d2 = pad_to(d1, (ROWS, t.k, t.i)), pad_to(d2, (t.m, t.l, t.i))
    g = _cotangent(pad_to(g, (ROWS, t.m, t.k, t.l)))
    d2s = right_operand(d2.reshape(-1, d2.shape[2]), precision)
    arguments = dict(t=t, precision=precision, interpret=interpret)
    d1_bar = _d1_bar(a1, a2, d2s, c, g, d1.shape, **arguments)
    a1_bar = _a1_bar(d1, a2, d2s, c, g, (len(d1), j), **arguments)
    return a1_bar[:n, :j], d1_bar[:n, :k, :i]


def _d1_bar(a1, a2, d2s, c, g, shape, *, t: Config, precision, interpret):
    """One block has one tile of (n, k, i) and goes over all m; the sums stay in shared memory."""
    a1, a2 = pad_to(a1, (ROWS, t.j)), pad_to(a2, (t.m, t.j))
    cs = right_operand(pad_to(c, (t.i, t.j)), precision)
    n_tiles, m_tiles = len(a1) // ROWS, len(a2) // t.m
    k_tiles, i_tiles, l_tiles = shape[1] // t.k, shape[2] // t.i, g.shape[1] // t.l
    multiply = Multiply(PIECES[precision], interpret is not None)

    def body(a1, a2, d2s, cs, g, d1_bar, sums):
        n, k0, i = lax.axis_index("n"), lax.axis_index("k"), lax.axis_index("i")
        for k in range(t.k):
            sums[k] = jnp.zeros((ROWS, t.i), jnp.float32)

        def each_m(m, _):
            u = _contract(t, multiply, a1, a2, cs, n, m, i)
            for q in range(t.m):

                def step(indices, g_tile, *d2_tiles, u=u[q]):
                    p = multiply(g_tile[...], d2_tiles, t.i, transpose=False)
                    sums[indices[0]] += u * p
                    plgpu.commit_smem()

                plgpu.emit_pipeline(
                    step,
                    grid=(t.k, l_tiles),
                    in_specs=[
                        plgpu.BlockSpec(
                            (ROWS, t.l),
                            lambda k, l, q=q: (_g_row(m * t.m + q, n, k0 * t.k + k), l),
                            transforms=layout(t.l, jnp.float32),
                        ),
                        *[
                            plgpu.BlockSpec(
                                (t.l, t.i),
                                lambda k, l, q=q: ((m * t.m + q) * l_tiles + l, i),
                                transforms=narrow_layout(t.l, t.i, jnp.bfloat16),
                            )
                            for _ in d2s
                        ],
                    ],
                    max_concurrent_steps=2,
                )(g, *d2s)
            return None

        lax.fori_loop(0, m_tiles, each_m, None)
        plgpu.commit_smem()
        for k in range(t.k):
            rows = pl.ds(((k0 * t.k + k) * n_tiles + n) * ROWS, ROWS)
            plgpu.copy_smem_to_gmem(sums.at[k], d1_bar.at[rows, pl.ds(i * t.i, t.i)])
        plgpu.wait_smem_to_gmem(0)

    def _g_row(m, n, k):
        return (m * n_tiles + n) * (k_tiles * t.k) + k

    out = kernel(
        body,
        out_type=result_type((a1, a2, *d2s, *cs, g), (shape[1] * shape[0], shape[2]), jnp.float32),
        grid=dict(n=n_tiles, k=k_tiles, i=i_tiles),
        scratch=dict(
            sums=plgpu.SMEM((t.k, ROWS, t.i), jnp.float32, transforms=layout(t.i, jnp.float32))
        ),
        interpret=interpret,
    )(a1, a2, d2s, cs, g)
    return out.reshape(shape[1], shape[0], shape[2]).transpose(1, 0, 2)


def _a1_bar(d1, a2, d2s, c, g, shape, *, t: Config, precision, interpret):
    """One block has one tile of (n, j) and goes over all i, k and m.

    dL/du is made again for every tile of j: K L I multiplications a pair, beside I a1_j.
    """
    a2 = pad_to(a2, (t.m, t.a1_j))
    cs = right_operand(pad_to(c, (t.i, t.a1_j)), precision)
    m, n_tiles, j_tiles = len(a2), shape[0] // ROWS, a2.shape[1] // t.a1_j
    k_tiles, i_tiles, l_tiles = d1.shape[1] // t.k, d1.shape[2] // t.i, g.shape[1] // t.l
    multiply = Multiply(PIECES[precision], interpret is not None)

    def body(d1, a2, d2s, cs, g, a1_bar, sums, d1_tile, c_tiles, barrier):
        n, j = lax.axis_index("n"), lax.axis_index("j")
        sums[...] = jnp.zeros((ROWS, t.a1_j), jnp.float32)

        def each_tile(index, _):
            i, k0 = lax.div(index, k_tiles), lax.rem(index, k_tiles)
            columns = pl.ds(i * t.i, t.i)
            for k in range(t.k):
                rows = pl.ds(((k0 * t.k + k) * n_tiles + n) * ROWS, ROWS)
                plgpu.copy_gmem_to_smem(d1.at[rows, columns], d1_tile.at[k], barrier)
            for q, piece in enumerate(cs):
                plgpu.copy_gmem_to_smem(
                    piece.at[columns, pl.ds(j * t.a1_j, t.a1_j)], c_tiles.at[q], barrier
                )
            plgpu.barrier_wait(barrier)

            def step(indices, g_tile, a2_tile, *d2_tiles):
                del indices
                u_bar = jnp.zeros((ROWS, t.i), jnp.float32)
                for k in range(t.k):
                    x = g_tile[pl.ds(k * ROWS, ROWS)]
                    p = multiply(x, d2_tiles, t.i, transpose=False)
                    u_bar += d1_tile[k].astype(jnp.float32) * p
                pieces = [c_tiles.at[q] for q in range(len(cs))]
                v = multiply(u_bar, pieces, t.a1_j, transpose=False)
                sums[...] += v * across_rows(a2_tile, 0, (ROWS, t.a1_j))
                plgpu.commit_smem()

            plgpu.emit_pipeline(
                step,
                grid=(m, l_tiles),
                in_specs=[
                    plgpu.BlockSpec(
                        (t.k * ROWS, t.l),
                        lambda m, l: ((m * n_tiles + n) * k_tiles + k0, l),
                        transforms=layout(t.l, jnp.float32),
                    ),
                    plgpu.BlockSpec((1, t.a1_j), lambda m, l: (m, j)),
                    *[
                        plgpu.BlockSpec(
                            (t.l, t.i),
                            lambda m, l: (m * l_tiles + l, i),
                            transforms=narrow_layout(t.l, t.i, jnp.bfloat16),
                        )
                        for _ in d2s
                    ],
                ],
                max_concurrent_steps=2,
            )(g, a2, *d2s)
            return None

        lax.fori_loop(0, i_tiles * k_tiles, each_tile, None)
        plgpu.commit_smem()
        target = a1_bar.at[pl.ds(n * ROWS, ROWS), pl.ds(j * t.a1_j, t.a1_j)]
        plgpu.copy_smem_to_gmem(sums, target)
        plgpu.wait_smem_to_gmem(0)

    flat = d1.transpose(1, 0, 2).reshape(-1, d1.shape[2])  # [(k, n), i]
    out = kernel(
        body,
        out_type=result_type((flat, a2, *d2s, *cs, g), (shape[0], a2.shape[1]), jnp.float32),
        grid=dict(n=n_tiles, j=j_tiles),
        scratch=dict(
            sums=plgpu.SMEM((ROWS, t.a1_j), jnp.float32, transforms=layout(t.a1_j, jnp.float32)),
            d1_tile=plgpu.SMEM((t.k, ROWS, t.i), d1.dtype, transforms=layout(t.i, d1.dtype)),
            c_tiles=plgpu.SMEM(
                (len(cs), t.i, t.a1_j), jnp.bfloat16, transforms=narrow_layout(64, 64, jnp.bfloat16)
            ),
            barrier=plgpu.Barrier(num_arrivals=t.k + len(cs)),
        ),
        interpret=interpret,
    )(flat, a2, d2s, cs, g)
    return out


def _stretches(t: Config, n: int, m: int, k: int, l: int, i: int) -> tuple[int, int]:  # noqa: E741
    """Tiles of i that one block goes over, and the number of stretches of i that gives.

    More stretches keep more of the GPU busy, and each gives a partial Theta; together these stay
    below `PARTIAL_BYTES`, or half the size of u if that is more.
    """
    tiles = -(-i // t.i)
    blocks = -(-n // ROWS) * -(-m // t.m)
    outputs = k * ceil_to(l, t.l)
    allowed = max(1, PARTIAL_BYTES // (4 * n * m * outputs), i // (2 * outputs))
    parts = min(tiles, -(-t.blocks // blocks), allowed)
    steps = -(-tiles // parts)
    return steps, -(-tiles // steps)


def _contract(t: Config, multiply: Multiply, a1, a2, cs, n, m, i) -> list[jax.Array]:
    """u[n, i] for each of the t.m samples m of one tile, in registers."""

    def compute(*sums):
        def step(indices, a1_tile, a2_tile, *c_tiles):
            del indices
            a = a1_tile[...].astype(jnp.float32)
            for q in range(t.m):
                outer = a * across_rows(a2_tile, q, (ROWS, t.j))
                multiply.add(sums[q], outer, c_tiles, transpose=True)
            plgpu.wgmma_wait(0)
            plgpu.commit_smem()  # reads are over before the copy engine writes here again

        plgpu.emit_pipeline(
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
        )(a1, a2, *cs)
        return tuple(acc[...] for acc in sums)

    return list(pl.run_scoped(compute, *[plgpu.ACC((ROWS, t.i), jnp.float32)] * t.m))


def _cotangent(g):
    """`g[n, m, k, l]` as rows (m, n tile, k, n): all k of one tile side by side."""
    n, m, k, l = g.shape  # noqa: E741
    tiles = g.astype(jnp.float32).reshape(n // ROWS, ROWS, m, k, l)
    return tiles.transpose(2, 0, 3, 1, 4).reshape(-1, l)
