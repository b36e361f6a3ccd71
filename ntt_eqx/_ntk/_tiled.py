"""Run a plan for two batches: on one device, or in tiles, one for each device of a mesh."""

import functools
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array

from .._distribute import Layout, everywhere
from ._contract import contract
from ._execute import Factors, evaluate, factorise
from ._pairs import Blocks, kernel_in_blocks
from ._plan import Operands, Plan

Found: TypeAlias = tuple[Any, Array, Array]
"""A kernel (or its terms by name), and the outputs for both batches."""


def on_many(
    layout: Layout,
    plan: Plan,
    operands: Operands,
    blocks: Blocks,
    x1: Array,
    x2: Array,
    sides: Sequence[Any],
    budget: int | None,
    *,
    one_pass: bool,
) -> Found:
    """What `on_one` returns, computed in tiles, one for each device of a mesh.

    **Arguments:**

    - `layout`: the devices.
    - `plan`, `blocks`: for one of the tiles.
    - The others are those of `on_one`.
    """
    exchange = exchanges(layout, plan, blocks)
    rows, columns = layout.rows, layout.columns
    specs = (rows + columns, columns + rows) if exchange else (rows, columns)
    spec1, spec2 = map(PartitionSpec, specs)

    def tile(held: list[Array], operands: Operands, x1: Array, x2: Array, sides: Any) -> Found:
        mine = plan.with_constants(held)  # shard_map cannot close over arrays
        if not exchange:
            return on_one(mine, operands, blocks, x1, x2, sides, budget, one_pass=one_pass)
        first, second = _factors(mine, operands, x1, x2, sides, budget, one_pass)
        both = (_gathered(first, columns), _gathered(second, rows))
        lengths = (plan.sizes.n, plan.sizes.m)
        join = functools.partial(contract, mine, operands)
        return kernel_in_blocks(blocks, lengths, None, join, both), first.outputs, second.outputs

    whole = PartitionSpec()
    theta, f1, f2 = jax.shard_map(
        tile,
        mesh=layout.here,
        in_specs=(whole, whole, spec1, spec2, whole),
        out_specs=(PartitionSpec(rows, columns), spec1, spec2),
        axis_names=set(layout.axes),
        check_vma=False,
    )(plan.constants, operands, padded(x1, layout), padded(x2, layout), sides)
    theta = jax.tree.map(lambda term: term[: len(x1), : len(x2)], theta)
    return theta, f1[: len(x1)], f2[: len(x2)]


def tile_lengths(layout: Layout | None, n: int, m: int) -> tuple[int, int]:
    """Samples of either side of one tile."""
    if layout is None:
        return n, m
    (p, q), d = layout.tiles, layout.devices
    up = lambda length: -(-length // d) * d
    return up(n) // p, up(m) // q


def exchanges(layout: Layout, plan: Plan, blocks: Blocks) -> bool:
    """Whether devices send each other factors, instead of each computing all of its tile's."""
    if not blocks.keeps:
        return False
    if layout.exchange is not None:
        return layout.exchange
    # The factors of one sample take one forward pass of F operations and R pullbacks of about F
    # each: (1 + R) F. To compute them on one more device counts as 7 (1 + R) F operations, to
    # send their phi bytes there as 3 phi bytes: both numbers include the gradient of the kernel.
    forward = sum(cost.layer_flops for cost in plan.costs_of_all)
    made = 7 * (1 + plan.sizes.directions) * forward
    return made > 3 * plan.stored * plan.spec.costs.flops_per_sent_byte


def on_one(
    plan: Plan,
    operands: Operands,
    blocks: Blocks,
    x1: Array,
    x2: Array,
    sides: Sequence[Any],
    budget: int | None,
    *,
    one_pass: bool,
) -> Found:
    """The kernel between two batches, `[N, M, ...]`, and the outputs for both, on one device.

    **Arguments:**

    - `sides`: the output directions of either batch; `None` takes all outputs.
    - `budget`: bytes of the intermediates of a block of samples; see `factorise`.
    - `one_pass`: whether to concatenate both batches for one pass, where possible.
    """
    join = functools.partial(contract, plan, operands)
    lengths = (len(x1), len(x2))
    if blocks.keeps:
        second = None if blocks.symmetric else x2
        both = _factors(plan, operands, x1, second, sides, budget, one_pass)
        f1, f2 = (side.outputs for side in both)
        return kernel_in_blocks(blocks, lengths, None, join, both), f1, f2

    def make(side: int, start: Array, size: int) -> Factors:
        x = jax.lax.dynamic_slice_in_dim((x1, x2)[side], start, size)
        return factorise(plan, operands, x, sides[side], budget)

    f1 = evaluate(plan, operands, x1, budget)
    f2 = f1 if blocks.symmetric else evaluate(plan, operands, x2, budget)
    return kernel_in_blocks(blocks, lengths, make, join, None), f1, f2


def _factors(
    plan: Plan,
    operands: Operands,
    x1: Array,
    x2: Array | None,
    sides: Sequence[Any],
    budget: int | None,
    one_pass: bool,
) -> tuple[Factors, Factors]:
    """The factors of both batches; `None` is `x1` again."""
    if x2 is None:
        first = factorise(plan, operands, x1, sides[0], budget)
        return first, first
    if one_pass and sides[0] is None:
        both = factorise(plan, operands, jnp.concatenate([x1, x2]), None, budget)
        cut = lambda part: jax.tree.map(lambda leaf: leaf[part], both)
        return cut(slice(None, len(x1))), cut(slice(len(x1), None))
    first = factorise(plan, operands, x1, sides[0], budget)
    return first, factorise(plan, operands, x2, sides[1], budget)


def _gathered(factors: Factors, axes: tuple[str, ...]) -> Factors:
    """Collect the factors of all devices along these axes of the mesh."""
    if not axes:
        return factors
    return jax.tree.map(lambda leaf: jax.lax.all_gather(leaf, axes, tiled=True), factors)


def padded(x: Array, layout: Layout, *, zeros: bool = False) -> Array:
    """Repeat the last sample, or zeros, until the number of devices divides that of samples."""
    missing = -len(x) % layout.devices
    if not missing:
        return x
    x = everywhere(x, layout)  # few bytes; XLA cuts no padding that is spread
    last = jnp.zeros_like(x[-1:]) if zeros else x[-1:]
    filled = jnp.concatenate([x, jnp.broadcast_to(last, (missing, *x.shape[1:]))])
    return everywhere(filled, layout)
