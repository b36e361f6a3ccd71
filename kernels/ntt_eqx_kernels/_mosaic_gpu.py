"""Mosaic GPU: what differs between JAX releases and in interpret mode, and shared memory."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ._chips import JAX_VERSION
from ._precision import PIECES, Precision, products, split, split_in_memory

SHARED_BYTES = 227 * 1024  # of one Hopper multiprocessor, for one block
RESERVED_BYTES = 4 * 1024  # of those, for barriers, alignment and the compiler's own scratch
ROWS = 64  # of one wgmma instruction
BLOCKS = 132  # that a launch should have at least: an H100 has as many multiprocessors

# 0.10.2 has interpret mode in a private module, and its interpreter reads no transposed operand.
_mosaic: Any = plgpu  # the oldest and the newest JAX have other names in it
try:
    InterpretGPUParams: Any = _mosaic.InterpretGPUParams
except AttributeError:
    from jax._src.pallas.mosaic_gpu.interpret import params

    InterpretGPUParams = params.InterpretGPUParams
try:
    _SEMANTICS = _mosaic.LoweringSemantics.Warpgroup
except AttributeError:
    from jax.experimental.mosaic.gpu.core import LoweringSemantics

    _SEMANTICS = LoweringSemantics.Warpgroup
ACC: Any = _mosaic.ACC  # sums of a warpgroup, in registers
_INTERPRETS_TRANSPOSED = JAX_VERSION >= (0, 11)


def kernel(body, *, out_type, grid: dict[str, int], scratch: dict[str, Any], interpret):
    """`plgpu.kernel` of one warpgroup a block."""
    return plgpu.kernel(
        body,
        out_type=out_type,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(lowering_semantics=_SEMANTICS),
        interpret=interpret,
    )


def layout(columns: int, dtype: Any) -> tuple[Any, ...]:
    """The tiling and swizzle of a shared tile whose rows have that many entries."""
    itemsize = jnp.dtype(dtype).itemsize
    width = next(w for w in (128, 64, 32) if columns * itemsize % w == 0)
    return plgpu.TilingTransform((8, width // itemsize)), plgpu.SwizzleTransform(width)


def narrow_layout(rows: int, columns: int, dtype: Any) -> tuple[Any, ...]:
    """Like `layout`, for a right operand read along its rows: the swizzle fits those as well."""
    itemsize = jnp.dtype(dtype).itemsize
    width = next(w for w in (128, 64, 32) if not (columns * itemsize % w or rows * itemsize % w))
    return plgpu.TilingTransform((8, width // itemsize)), plgpu.SwizzleTransform(width)


def across_rows(tile: Any, row: int, shape: tuple[int, int]) -> jax.Array:
    """One row of a shared tile, repeated down a register tile, in float32."""
    return jax.lax.broadcast_in_dim(tile[row].astype(jnp.float32), shape, (1,))


def by_second(x: jax.Array) -> jax.Array:
    """`x[n, s, i]` as rows (s, n): the samples n of one s side by side."""
    return x.transpose(1, 0, 2).reshape(-1, x.shape[2])


def in_parts(terms: int, blocks: int, wanted: int) -> tuple[int, int]:
    """Parts that a sum is cut into where there are fewer blocks than wanted, and terms of each."""
    parts = min(terms, -(-wanted // blocks))
    steps = -(-terms // parts)
    return -(-terms // steps), steps


def right_operand(x: jax.Array, precision: Precision) -> list[jax.Array]:
    """bfloat16 pieces of an operand that `wgmma` reads from shared memory, made by XLA."""
    if x.dtype in (bool, jnp.bfloat16):
        return [x.astype(jnp.bfloat16)]
    return split_in_memory(x.astype(jnp.float32), PIECES[precision])


@dataclasses.dataclass(frozen=True)
class Multiply:
    """`x @ y` on the tensor cores from bfloat16 pieces, `x` in registers, `y` in shared memory.

    Attributes:
        pieces: of the left operand.
        interpreted: the interpreter of Pallas reads left operands from shared memory only, so
            there they take a detour through it.
    """

    pieces: int
    interpreted: bool

    def add(self, acc: Any, x: jax.Array, ys: Sequence[Any], *, transpose: bool) -> None:
        """`acc += x @ sum(ys)`, or `x @ sum(ys).T`, asynchronously."""
        xs = split(x, self.pieces)
        for p, q in products(len(xs), len(ys)):
            self._one(acc, xs[p], ys[q], transpose)

    def __call__(self, x: jax.Array, ys: Sequence[Any], columns: int, *, transpose: bool):
        """`x @ sum(ys)` or its transposed form, in float32."""

        def compute(acc):
            self.add(acc, x, ys, transpose=transpose)
            return acc[...]

        return pl.run_scoped(compute, ACC((x.shape[0], columns), jnp.float32))

    def _one(self, acc, x, y, transpose):
        if not self.interpreted:
            plgpu.wgmma(acc, x, y.transpose((1, 0)) if transpose else y)
            return
        staged = {"left": plgpu.SMEM(x.shape, x.dtype)}
        if transpose and not _INTERPRETS_TRANSPOSED:
            staged["right"] = plgpu.SMEM(y.shape[::-1], y.dtype)

        def compute(left, right=None):
            left[...] = x
            if right is not None:
                right[...] = y[...].T
            elif transpose:
                right = y.transpose((1, 0))
            plgpu.commit_smem()
            plgpu.wgmma(acc, left, y if right is None else right)
            plgpu.wgmma_wait(0)

        pl.run_scoped(compute, **staged)
