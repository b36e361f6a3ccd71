"""The masked NTK product of a dense layer on TPU (Pallas, Mosaic TPU).

    u[n,m,i]       = sum_j c[i,j] a1[n,j] a2[m,j]
    Theta[n,m,k,l] = sum_i d1[n,k,i] u[n,m,i] d2[m,l,i]

A grid point holds `TN x TM` pairs of samples, `TI` output and `TJ` input features. The pairs are
the rows of one matrix, `m` outermost; `a1 a2` is formed in registers, multiplied with the tile of
`c`, and summed over `j` in VMEM; at the last `j` the tile of `u` is contracted into `Theta`.
Outputs `k` and `l` are tiled too when there are many. Every array is padded with zeros to whole
tiles, in both operands of each product, so no remainder needs a mask inside.
"""

import dataclasses
import functools

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from .._mosaic_tpu import dot
from .._padding import ceil_to, pad_to
from .._precision import Precision
from ..manual_axes import result_type

VMEM_BYTES = 12 * 2**20  # of the 16 MiB that every TPU since v2 gives a kernel by default


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile sizes: samples of each side, outputs of each side, output and input features.

    `n` and `m` are multiples of 16 (a bfloat16 tile has 16 rows), `k` and `l` of 8, `i` and `j`
    of 128 (the lanes of a register).
    """

    n: int = 16
    m: int = 16
    k: int = 16
    l: int = 16  # noqa: E741
    i: int = 256
    j: int = 512

    def __post_init__(self):
        for name, unit in dict(n=16, m=16, k=8, l=8, i=128, j=128).items():
            size = getattr(self, name)
            if size <= 0 or size % unit:
                raise ValueError(f"Config: {name}={size} must be a positive multiple of {unit}.")
        if self.vmem_bytes() > VMEM_BYTES:
            raise ValueError(
                f"Config: the tiles take {self.vmem_bytes()} bytes of VMEM, above {VMEM_BYTES}."
            )

    def vmem_bytes(self) -> int:
        """The largest of what the three kernels keep in VMEM, 4 bytes an entry.

        Blocks that move count twice (one is loaded while the other is used); minor axes count in
        full registers of 128 lanes.
        """
        lanes = ceil_to(self.l, 128)
        pairs = self.n * self.m
        a = self.j * (self.n + self.m)
        d = self.i * (self.n * self.k + self.m * self.l)
        g = self.m * self.n * self.k * lanes
        c = self.i * self.j
        theta = self.m * self.l * self.n * self.k
        forward = 2 * (a + d + c + theta) + pairs * (self.i + self.j) + self.n * self.k * self.i
        cotangents = 2 * (a + d + c + g) + 3 * self.n * self.k * self.i
        backward = cotangents + pairs * (self.i + self.j) + 2 * self.n * self.j
        return 4 * max(forward, backward)


# Tile sizes measured best, by the kind of the device; the rest have the default. None is measured
# yet: `benchmarks/tune_kernels.py` finds them.
TUNED: dict[str, Config] = {}


def config_for(kind: str, shape: tuple[int, int, int, int, int, int]) -> Config:
    """The tiles for `shape = (N, M, K, L, I, J)`: the tuned ones, cut down to the sizes."""
    _, _, outputs1, outputs2, features, inputs = shape
    base = TUNED.get(kind, Config())
    return Config(
        n=base.n,
        m=base.m,
        k=min(base.k, ceil_to(outputs1, 8)),
        l=min(base.l, ceil_to(outputs2, 8)),
        i=min(base.i, ceil_to(features, 128)),
        j=min(base.j, ceil_to(inputs, 128)),
    )


def forward(a1, d1, a2, d2, c, *, precision: Precision, config: Config, interpret=False):
    """`Theta[n, m, k, l]` in float32."""
    (n, k, _), (m, l, _) = d1.shape, d2.shape  # noqa: E741
    t = config
    a1, a2, c = pad_to(a1, (t.n, t.j)), pad_to(a2, (t.m, t.j)), _widenable(c, (t.i, t.j))
    d1, d2 = _rows(d1, t.n, t.k, t.i), _columns(d2, t.m, t.l, t.i)
    grid = (len(a1) // t.n, len(a2) // t.m, len(d1), len(d2), c.shape[0] // t.i, c.shape[1] // t.j)
    out = _call(
        functools.partial(_forward_kernel, t, precision),
        grid=grid,
        in_specs=[
            pl.BlockSpec((t.n, t.j), lambda n, m, k, l, i, j: (n, j)),
            pl.BlockSpec((None, t.n * t.k, t.i), lambda n, m, k, l, i, j: (k, n, i)),
            pl.BlockSpec((t.m, t.j), lambda n, m, k, l, i, j: (m, j)),
            pl.BlockSpec((None, t.m, t.l, t.i), lambda n, m, k, l, i, j: (l, m, 0, i)),
            pl.BlockSpec((t.i, t.j), lambda n, m, k, l, i, j: (i, j)),
        ],
        out_spec=pl.BlockSpec(
            (None, None, t.m, t.l, t.n * t.k), lambda n, m, k, l, i, j: (k, l, m, 0, n)
        ),
        out_shape=(len(d1), len(d2), len(a2), t.l, len(a1) * t.k),
        scratch=[pltpu.VMEM((t.m * t.n, t.i), jnp.float32)],
        parallel=4,
        interpret=interpret,
    )(a1, d1, a2, d2, c)
    # [k tile, l tile, m, l, n * k] -> [n, m, k, l]
    out = out.reshape(*out.shape[:4], -1, t.k).transpose(4, 2, 0, 5, 1, 3)
    return out.reshape(*out.shape[:2], out.shape[2] * t.k, -1)[:n, :m, :k, :l]


def backward(a1, d1, a2, d2, c, g, *, precision: Precision, config: Config, interpret=False):
    """Cotangents of `a1` and `d1` in float32, from that of `Theta`.

    With P[n,m,k,i] = sum_l g[n,m,k,l] d2[m,l,i], and u made again:

        dL/dd1[n,k,i] = sum_m u P             dL/du[n,m,i] = sum_k d1 P
        dL/da1[n,j]   = sum_m a2[m,j] sum_i dL/du c[i,j]
    """
    (n, j), k, i = a1.shape, d1.shape[1], d1.shape[2]
    t = config
    a1, a2, c = pad_to(a1, (t.n, t.j)), pad_to(a2, (t.m, t.j)), _widenable(c, (t.i, t.j))
    d1, d2, g = _rows(d1, t.n, t.k, t.i), _columns(d2, t.m, t.l, t.i), _cotangent(g, t)
    n_tiles, m_tiles, k_tiles, l_tiles = len(a1) // t.n, len(a2) // t.m, len(d1), len(d2)
    i_tiles, j_tiles = c.shape[0] // t.i, c.shape[1] // t.j
    d1_bar = _call(
        functools.partial(_d1_kernel, t, precision),
        grid=(n_tiles, k_tiles, i_tiles, l_tiles, m_tiles, j_tiles),
        in_specs=[
            pl.BlockSpec((t.n, t.j), lambda n, k, i, l, m, j: (n, j)),
            pl.BlockSpec((t.m, t.j), lambda n, k, i, l, m, j: (m, j)),
            pl.BlockSpec((None, t.m, t.l, t.i), lambda n, k, i, l, m, j: (l, m, 0, i)),
            pl.BlockSpec((t.i, t.j), lambda n, k, i, l, m, j: (i, j)),
            pl.BlockSpec(
                (None, None, t.m, t.n * t.k, t.l), lambda n, k, i, l, m, j: (k, l, m, n, 0)
            ),
        ],
        out_spec=pl.BlockSpec((None, t.n * t.k, t.i), lambda n, k, i, l, m, j: (k, n, i)),
        out_shape=d1.shape,
        scratch=[pltpu.VMEM((t.m * t.n, t.i), jnp.float32)],
        parallel=3,
        interpret=interpret,
    )(a1, a2, d2, c, g)
    a1_bar = _call(
        functools.partial(_a1_kernel, t, precision),
        grid=(n_tiles, j_tiles, m_tiles, k_tiles, l_tiles, i_tiles),
        in_specs=[
            pl.BlockSpec((None, t.n * t.k, t.i), lambda n, j, m, k, l, i: (k, n, i)),
            pl.BlockSpec((t.m, t.j), lambda n, j, m, k, l, i: (m, j)),
            pl.BlockSpec((None, t.m, t.l, t.i), lambda n, j, m, k, l, i: (l, m, 0, i)),
            pl.BlockSpec((t.i, t.j), lambda n, j, m, k, l, i: (i, j)),
            pl.BlockSpec(
                (None, None, t.m, t.n * t.k, t.l), lambda n, j, m, k, l, i: (k, l, m, n, 0)
            ),
        ],
        out_spec=pl.BlockSpec((t.n, t.j), lambda n, j, m, k, l, i: (n, j)),
        out_shape=a1.shape,
        scratch=[pltpu.VMEM((t.m * t.n, t.i), jnp.float32)],
        parallel=2,
        interpret=interpret,
    )(d1, a2, d2, c, g)
    d1_bar = d1_bar.reshape(k_tiles, -1, t.k, d1.shape[2]).transpose(1, 0, 2, 3)
    return a1_bar[:n, :j], d1_bar.reshape(len(a1), -1, d1.shape[2])[:n, :k, :i]


def _forward_kernel(t: Config, precision, a1, d1, a2, d2, c, theta, u):
    i, j = pl.program_id(4), pl.program_id(5)

    @pl.when((i == 0) & (j == 0))
    def _():
        theta[...] = jnp.zeros_like(theta)

    _accumulate_u(t, precision, a1, a2, c, u, j)

    @pl.when(j == pl.num_programs(5) - 1)
    def _():
        d = _wide(d1).reshape(t.n, t.k, t.i)
        for m in range(t.m):
            x = (d * _u_of(t, u, m)[:, None, :]).reshape(t.n * t.k, t.i)
            theta[m] += dot(_wide(d2.at[m]), x, (1, 1), precision)


def _d1_kernel(t: Config, precision, a1, a2, d2, c, g, d1_bar, u):
    l, m_tile, j = pl.program_id(3), pl.program_id(4), pl.program_id(5)  # noqa: E741

    @pl.when((l == 0) & (m_tile == 0) & (j == 0))
    def _():
        d1_bar[...] = jnp.zeros_like(d1_bar)

    _accumulate_u(t, precision, a1, a2, c, u, j)

    @pl.when(j == pl.num_programs(5) - 1)
    def _():
        for m in range(t.m):
            p = dot(_wide(g.at[m]), _wide(d2.at[m]), (1, 0), precision)
            p = p.reshape(t.n, t.k, t.i) * _u_of(t, u, m)[:, None, :]
            d1_bar[...] += p.reshape(t.n * t.k, t.i)


def _a1_kernel(t: Config, precision, d1, a2, d2, c, g, a1_bar, u_bar):
    steps = [pl.program_id(axis) for axis in (2, 3, 4, 5)]

    @pl.when(sum(steps) == 0)
    def _():
        a1_bar[...] = jnp.zeros_like(a1_bar)

    d = _wide(d1).reshape(t.n, t.k, t.i)
    for m in range(t.m):
        p = dot(_wide(g.at[m]), _wide(d2.at[m]), (1, 0), precision).reshape(t.n, t.k, t.i)
        u_bar[m * t.n : (m + 1) * t.n] = jnp.sum(d * p, axis=1)
    v = dot(u_bar[...], _wide(c), (1, 0), precision).reshape(t.m, t.n, t.j)
    a1_bar[...] += jnp.sum(v * _wide(a2)[:, None, :], axis=0)


def _accumulate_u(t: Config, precision, a1, a2, c, u, j):
    """u[(m, n), i] += sum_j a1[n,j] a2[m,j] c[i,j] over one tile of j."""

    @pl.when(j == 0)
    def _():
        u[...] = jnp.zeros_like(u)

    outer = (_wide(a2)[:, None, :] * _wide(a1)[None, :, :]).reshape(t.m * t.n, t.j)
    u[...] += dot(outer, _wide(c), (1, 1), precision)


def _u_of(t: Config, u, m: int):
    return u[m * t.n : (m + 1) * t.n]


def _wide(ref):
    return ref[...].astype(jnp.float32)


def _widenable(c, tiles: tuple[int, int]):
    """A mask travels as int8 and becomes a float in VMEM; a metric travels as float32."""
    return pad_to(c.astype(jnp.int8 if c.dtype == bool else jnp.float32), tiles)


def _rows(d, t_n: int, t_k: int, t_i: int) -> Float[Array, "k_tile n_k i"]:
    """`d[n, k, i]` with the rows (n, k) of one tile of k together."""
    d = pad_to(d, (t_n, t_k, t_i))
    n, k, i = d.shape
    return d.reshape(n, k // t_k, t_k, i).transpose(1, 0, 2, 3).reshape(k // t_k, n * t_k, i)


def _columns(d, t_m: int, t_l: int, t_i: int) -> Float[Array, "l_tile m l i"]:
    d = pad_to(d, (t_m, t_l, t_i))
    m, l, i = d.shape  # noqa: E741
    return d.reshape(m, l // t_l, t_l, i).transpose(1, 0, 2, 3)


def _cotangent(g, t: Config) -> Float[Array, "k_tile l_tile m n_k l"]:
    g = pad_to(g, (t.n, t.m, t.k, t.l))
    n, m, k, l = g.shape  # noqa: E741
    g = g.reshape(n, m, k // t.k, t.k, l // t.l, t.l).transpose(2, 4, 1, 0, 3, 5)
    return g.reshape(k // t.k, l // t.l, m, n * t.k, t.l)


def _call(kernel, *, grid, in_specs, out_spec, out_shape, scratch, parallel: int, interpret):
    def call(*args):
        return pl.pallas_call(
            kernel,
            grid=grid,
            in_specs=in_specs,
            out_specs=out_spec,
            out_shape=result_type(args, out_shape, jnp.float32),
            scratch_shapes=scratch,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel",) * parallel + ("arbitrary",) * (6 - parallel)
            ),
            interpret=interpret,
        )(*args)

    return call
