"""The masked contraction of per-sample tangents on TPU (Pallas, Mosaic TPU).

    T[n,k,i,j]     = sum_s d[n,k,i,s] a[n,j,s]                      (one batched product, by XLA)
    Theta[n,m,k,l] = sum_ij c[i,j] T1[n,k,i,j] T2[m,l,i,j]          (this kernel)

With rows r = (n, k), columns q = (m, l) and parameters p = (i, j), the kernel is the matrix product
`(T1 c) T2^T` whose left operand is masked on its way into the matrix unit, so that no masked copy
of the tangents is written. Sums over p stay in VMEM. Arrays are padded with zeros to whole tiles.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .._dispatch import Device
from .._padding import ceil_to, pad_to
from .._precision import Precision
from ..manual_axes import result_type
from ._tangents import pull_back, tangents

VMEM_BYTES = 12 * 2**20  # of the 16 MiB that every TPU since v2 gives a kernel by default

WITHOUT_MASK = "it is one matrix product"


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile sizes: rows (n, k) and columns (m, l) of Theta, and parameters (i, j).

    Multiples of 128, the lanes of a register.
    """

    rows: int = 256
    columns: int = 256
    parameters: int = 512

    def __post_init__(self):
        for name, size in dataclasses.asdict(self).items():
            if size <= 0 or size % 128:
                raise ValueError(f"Config: {name}={size} must be a positive multiple of 128.")
        if self.vmem_bytes() > VMEM_BYTES:
            raise ValueError(
                f"Config: the tiles take {self.vmem_bytes()} bytes of VMEM, above {VMEM_BYTES}."
            )

    def vmem_bytes(self) -> int:
        """What the kernel keeps in VMEM, 4 bytes an entry; blocks that move count twice."""
        r, q, p = self.rows, self.columns, self.parameters
        return 4 * (2 * (r * p + q * p + 8 * p + r * q) + r * p)


# Tile sizes measured best, by the kind of the device; the rest have the default. None is measured
# yet: `benchmarks/tune_kernels.py` finds them.
TUNED: dict[str, Config] = {}


def config_for(kind: str, rows: int, columns: int, parameters: int) -> Config:
    """The tuned tiles, cut down to the sizes."""
    base = TUNED.get(kind, Config())
    return Config(
        rows=min(base.rows, ceil_to(rows, 128)),
        columns=min(base.columns, ceil_to(columns, 128)),
        parameters=min(base.parameters, ceil_to(parameters, 128)),
    )


def refusal(device: Device) -> str | None:
    """Why this kernel cannot run on a device, or `None`."""
    if device.platform != "tpu":
        return f"needs a TPU, and the device is {device.kind!r} ({device.platform})"
    return None


def forward(a1, d1, a2, d2, c, *, precision: Precision, config: Config, interpret=False):
    """`Theta[n, m, k, l]` in float32."""
    (n, k), (m, l) = d1.shape[:2], d2.shape[:2]  # noqa: E741
    t1, t2 = tangents(a1, d1, precision), tangents(a2, d2, precision)
    theta = _gram(t1, t2, c.reshape(1, -1), precision, config, interpret)
    return theta.reshape(n, k, m, l).transpose(0, 2, 1, 3)


def backward(a1, d1, a2, d2, c, g, *, precision: Precision, config: Config, interpret=False):
    """Cotangents of `a1` and `d1` in float32: dL/dT1 = c g T2, pulled back to the factors."""
    n, m, k, l = g.shape  # noqa: E741
    g = g.transpose(0, 2, 1, 3).reshape(n * k, m * l)
    t2 = tangents(a2, d2, precision)
    t1_bar = _weighted_product(g, t2, c.reshape(1, -1), precision, config, interpret)
    return pull_back(a1, d1, t1_bar, precision)


def _gram(t1, t2, c, precision, t: Config, interpret):
    rows, columns = len(t1), len(t2)
    t1, t2 = pad_to(t1, (t.rows, t.parameters)), pad_to(t2, (t.columns, t.parameters))
    c = pad_to(c.astype(jnp.float32), (1, t.parameters))
    out = pl.pallas_call(
        functools.partial(_gram_kernel, precision),
        grid=(len(t1) // t.rows, len(t2) // t.columns, t1.shape[1] // t.parameters),
        in_specs=[
            pl.BlockSpec((t.rows, t.parameters), lambda r, q, p: (r, p)),
            pl.BlockSpec((t.columns, t.parameters), lambda r, q, p: (q, p)),
            pl.BlockSpec((1, t.parameters), lambda r, q, p: (0, p)),
        ],
        out_specs=pl.BlockSpec((t.rows, t.columns), lambda r, q, p: (r, q)),
        out_shape=result_type((t1, t2, c), (len(t1), len(t2)), jnp.float32),
        compiler_params=_SEMANTICS,
        interpret=interpret,
    )(t1, t2, c)
    return out[:rows, :columns]


def _gram_kernel(precision, t1, t2, c, theta):
    @pl.when(pl.program_id(2) == 0)
    def _():
        theta[...] = jnp.zeros_like(theta)

    theta[...] += _dot(_wide(t1) * c[...], _wide(t2), (1, 1), precision)


def _weighted_product(g, t2, c, precision, t: Config, interpret):
    """c[p] sum_q g[r,q] T2[q,p]."""
    rows, parameters = len(g), t2.shape[1]
    g = pad_to(g.astype(jnp.float32), (t.rows, t.columns))
    t2 = pad_to(t2, (t.columns, t.parameters))
    c = pad_to(c.astype(jnp.float32), (1, t.parameters))
    out = pl.pallas_call(
        functools.partial(_weighted_kernel, precision),
        grid=(len(g) // t.rows, t2.shape[1] // t.parameters, len(t2) // t.columns),
        in_specs=[
            pl.BlockSpec((t.rows, t.columns), lambda r, p, q: (r, q)),
            pl.BlockSpec((t.columns, t.parameters), lambda r, p, q: (q, p)),
            pl.BlockSpec((1, t.parameters), lambda r, p, q: (0, p)),
        ],
        out_specs=pl.BlockSpec((t.rows, t.parameters), lambda r, p, q: (r, p)),
        out_shape=result_type((g, t2, c), (len(g), t2.shape[1]), jnp.float32),
        compiler_params=_SEMANTICS,
        interpret=interpret,
    )(g, t2, c)
    return out[:rows, :parameters]


def _weighted_kernel(precision, g, t2, c, out):
    @pl.when(pl.program_id(2) == 0)
    def _():
        out[...] = jnp.zeros_like(out)

    out[...] += _dot(g[...], _wide(t2), (1, 0), precision) * c[...]


def _wide(ref):
    return ref[...].astype(jnp.float32)


def _dot(x, y, axes: tuple[int, int], precision: Precision):
    if precision == "bfloat16":
        x, y = x.astype(jnp.bfloat16), y.astype(jnp.bfloat16)
    return jax.lax.dot_general(
        x,
        y,
        (((axes[0],), (axes[1],)), ((), ())),
        precision=None if precision == "bfloat16" else jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


_SEMANTICS = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))
