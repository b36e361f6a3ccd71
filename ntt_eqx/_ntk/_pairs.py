"""Compute the kernel of two batches block by block, within a memory budget."""

import dataclasses
import math
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ..kernels import Device, known_memory, memory_of
from ..kernels.manual_axes import zeros_of
from .forms import Cost

# A symmetric kernel is cut into at least this many blocks a side, so that only 5 of 8 are computed,
# if the blocks keep this many samples.
_SYMMETRIC_BLOCKS, _SYMMETRIC_ROWS = 4, 32


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How the pairs of samples are cut into blocks.

    Attributes:
        rows: samples of the first batch in a block.
        columns: samples of the second.
        counts: blocks along each side.
        keeps: whether the factors of all samples are stored, or computed again for each block.
        symmetric: whether both batches are the same, so that half of the blocks is enough.
        bytes: expected memory beside inputs and result.
    """

    rows: int
    columns: int
    counts: tuple[int, int]
    keeps: bool
    symmetric: bool
    bytes: int


def default_budget(device: Device) -> int:
    """Bytes for intermediates: a quarter of an accelerator's memory, an eighth of a host's.

    The rest is for the result, the model and other programs. On a CPU at most 256 MiB, because more
    is not faster.
    """
    if device.platform != "cpu":
        return memory_of(device) // 4
    return min(2**28, (_host_memory() or 8 * 2**30) // 8)


def check_fits(
    caller: str,
    lengths: tuple[int, int],
    directions: tuple[int, int],
    outputs: str,
    itemsize: int,
    device: Device,
    instead: str,
) -> None:
    """Raise `ValueError` if a kernel is larger than the device's memory.

    **Arguments:**

    - `lengths`: samples N and M.
    - `directions`: number of outputs or directions of either side.
    - `outputs`: which pairs of outputs.
    - `itemsize`: bytes of a number.
    - `instead`: a remedy for the message.
    """
    memory = _host_memory() if device.platform == "cpu" else known_memory(device)
    r, s = directions
    pairs = {"full": (r, s), "diagonal": (r,), "trace": ()}
    size = lambda name: math.prod((*lengths, *pairs[name])) * itemsize
    if memory is None or size(outputs) <= memory:
        return
    gib = lambda amount: f"{amount / 2**30:,.1f} GiB"
    less = [
        f"outputs={name!r} takes {gib(size(name))}"
        for name in ("diagonal", "trace")
        if size(name) <= memory and size(name) < size(outputs) and r == s
    ]
    raise ValueError(
        f"{caller}: the kernel {[*lengths, *pairs[outputs]]} takes {gib(size(outputs))}, more than "
        f"the {gib(memory)} of {device.kind}. {'; '.join([*less, instead])}."
    )


def _host_memory() -> int | None:
    """Bytes of memory that a process on this machine may use; `None` if unknown."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
    try:
        limit = int(pathlib.Path("/sys/fs/cgroup/memory.max").read_text())
    except (OSError, ValueError):  # no container, or one without a limit
        return memory
    return min(memory, limit)


def plan_blocks(
    costs: list[Cost],
    stored: int,
    entries: int,
    lengths: tuple[int, int],
    budget: int,
    *,
    symmetric: bool,
    keeps: bool | None = None,
) -> Blocks:
    """The largest blocks within a budget.

    **Arguments:**

    - `costs`: costs of each parameter's share; the shares are computed one after another.
    - `stored`: bytes of the factors of a sample.
    - `entries`: bytes of the kernel of a pair of samples.
    - `lengths`: samples N and M of both batches.
    - `keeps`: whether to store the factors of all samples; by default if they fit half the budget.
    """
    n, m = lengths
    most = lambda name: max((getattr(cost, name) for cost in costs), default=0)
    per_row, per_column, per_pair = most("per_row"), most("per_column"), most("per_pair") + entries
    once = sum(cost.once for cost in costs)
    whole = stored * (n if symmetric else n + m)
    if keeps is None:
        keeps = whole <= (budget - once) // 2
    if keeps:
        left = max(budget - once - whole, budget // 4)  # factors that must be kept may exceed it
    else:
        # Concatenating the samples of a block copies some of its factors.
        made = stored + stored // 2
        left, per_row, per_column = budget - once, per_row + made, per_column + made
    rows, columns = _fitting(n, m, per_row, per_column, per_pair, left)
    if symmetric:
        rows = columns = min(rows, columns)
        if keeps and n >= _SYMMETRIC_BLOCKS * _SYMMETRIC_ROWS:
            rows = columns = min(rows, -(-n // _SYMMETRIC_BLOCKS))
    rows, columns = _even(n, rows), _even(m, columns)
    counts = (-(-n // rows), -(-m // columns))
    used = once + (whole if keeps else 0)
    used += rows * per_row + columns * per_column + rows * columns * per_pair
    return Blocks(rows, columns, counts, keeps, symmetric, used)


def kernel_in_blocks(
    blocks: Blocks,
    lengths: tuple[int, int],
    make: Callable[[int, Array, int], Any] | None,
    contract: Callable[[Any, Any], Any],
    factors: tuple[Any, Any] | None = None,
) -> Any:
    """The kernel between two batches, from a loop that writes block by block into the result.

    A last block that would not be full starts earlier: its first rows are computed twice, to the
    same numbers.

    **Arguments:**

    - `lengths`: samples N and M of both batches.
    - `make`: `(side, start, size) -> factors` of so many samples from `start` on, if they are not
      kept; side 0 is the kernel's rows, 1 its columns.
    - `contract`: `(factors, factors) -> kernel[n, m, ...]`, or a PyTree of such kernels.
    - `factors`: those of both batches, if the blocks keep them.
    """
    if factors is not None and blocks.counts == (1, 1):
        return contract(*factors)
    sizes = (blocks.rows, blocks.columns)
    starts = [
        [min(c * size, length - size) for c in range(count)]
        for size, length, count in zip(sizes, lengths, blocks.counts, strict=True)
    ]

    def side(number: int, start: Array) -> Any:
        if factors is not None:
            return _rows(factors[number], start, sizes[number])
        assert make is not None
        return make(number, start, sizes[number])

    def put(theta: Array, found: Array, *place: Array) -> Array:
        zeros = (np.int32(0),) * (theta.ndim - 2)
        theta = jax.lax.dynamic_update_slice(theta, found, (*place, *zeros))
        if blocks.symmetric:
            theta = jax.lax.dynamic_update_slice(theta, mirrored(found), (*place[::-1], *zeros))
        return theta

    def put_all(theta: Any, found: Any, *place: Array) -> Any:
        return jax.tree.map(lambda whole, block: put(whole, block, *place), theta, found)

    example = jax.eval_shape(lambda: contract(side(0, jnp.int32(0)), side(1, jnp.int32(0))))
    empty = jax.tree.map(lambda like: zeros_of(like, (*lengths, *like.shape[2:])), example)
    if factors is not None or blocks.symmetric:
        block = jax.checkpoint(lambda i, j: contract(side(0, i), side(1, j)))
        pairs = [
            (i, j)
            for p, i in enumerate(starts[0])
            for q, j in enumerate(starts[1])
            if p <= q or not blocks.symmetric
        ]
        one = lambda theta, pair: (put_all(theta, block(*pair), *pair), None)
        return jax.lax.scan(one, empty, tuple(jnp.asarray(pairs, jnp.int32).T))[0]

    @jax.checkpoint
    def row(theta: Any, i: Array) -> tuple[Any, None]:
        mine = side(0, i)
        block = jax.checkpoint(lambda j: contract(mine, side(1, j)))
        one = lambda theta, j: (put_all(theta, block(j), i, j), None)
        return jax.lax.scan(one, theta, jnp.asarray(starts[1], jnp.int32))[0], None

    return jax.lax.scan(row, empty, jnp.asarray(starts[0], jnp.int32))[0]


def _fitting(
    n: int, m: int, per_row: int, per_column: int, per_pair: int, budget: int
) -> tuple[int, int]:
    """The largest block, as square as possible, with r per_row + c per_column + r c per_pair."""
    linear = per_row + per_column
    root = math.isqrt(max(linear**2 + 4 * per_pair * max(budget, 0), 0))
    side = max(1, (root - linear) // max(1, 2 * per_pair))
    rows, columns = min(side, n), min(side, m)
    if columns == m:
        rows = min(n, max(1, (budget - m * per_column) // max(1, per_row + m * per_pair)))
    if rows == n:
        columns = min(m, max(1, (budget - n * per_row) // max(1, per_column + n * per_pair)))
    return rows, columns


def mirrored(block: Any) -> Any:
    """`Theta[n,m,k,l] -> Theta[m,n,l,k]`; one output axis, or none, stays as it is."""
    order = (1, 0, 3, 2) if block.ndim == 4 else (1, 0, *range(2, block.ndim))
    return block.transpose(order)


def _rows(tree: Any, start: Any, size: int) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, size), tree)


def _even(length: int, rows: int) -> int:
    """Rows per block when `length` is spread evenly over as few blocks as `rows` allows."""
    rows = min(rows, length)
    return -(-length // -(-length // rows))
