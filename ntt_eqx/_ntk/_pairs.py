"""Take the kernel of two batches block by block, within a budget of bytes."""

import math
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

# A symmetric kernel is cut into at least this many blocks a side, so that only 5 of 8 are computed,
# if the blocks keep this many samples.
_SYMMETRIC_BLOCKS, _SYMMETRIC_ROWS = 4, 32


def default_budget() -> int:
    """Bytes for intermediates: a quarter of an accelerator's memory; else an eighth, at most 1 GiB.

    What is left is for the result, the model and other programs.
    """
    stats = jax.devices()[0].memory_stats() if jax.default_backend() != "cpu" else None
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"]) // 4
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        memory = 8 * 2**30
    return min(2**30, memory // 8)


def kernel_in_blocks(
    factorise: Callable[[Array, int], Any],
    contract: Callable[[Any, Any], Array],
    x1: Array,
    x2: Array | None,
    pair_bytes: int,
    budget: int,
) -> Array:
    """The kernel between `x1` and `x2`; `None` is `x1` again, at about half of the work.

    **Arguments:**

    - `factorise`: `(samples, side) -> factors`; side 0 is the kernel's rows, 1 its columns.
    - `contract`: `(factors, factors) -> kernel[n, m, ...]`.
    - `pair_bytes`: bytes of intermediates that a pair of samples needs in `contract`.
    - `budget`: bytes that intermediates may take. The result does not count.
    """
    symmetric = x2 is None
    x2 = x1 if x2 is None else x2
    sample_bytes = max(_bytes(jax.eval_shape(lambda x: factorise(x, 0), x1[:1])), 1)
    rows = max(1, math.isqrt(budget // 2 // max(1, pair_bytes)))
    fits = sample_bytes * (len(x1) + len(x2)) <= budget // 2
    if fits:
        first = factorise(x1, 0)
        second = first if symmetric else factorise(x2, 1)
        take = lambda i, side, size: _rows((first, second)[side], i * size, size)
        if symmetric:
            many = len(x1) >= _SYMMETRIC_BLOCKS * _SYMMETRIC_ROWS
            rows = min(rows, -(-len(x1) // _SYMMETRIC_BLOCKS) if many else len(x1))
        if rows >= max(len(x1), len(x2)):
            return contract(first, second)
    else:
        rows = max(1, min(rows, budget // 4 // sample_bytes, max(len(x1), len(x2))))
        take = lambda i, side, size: factorise(_rows((x1, x2)[side], i * size, size), side)

    sizes = (_even(len(x1), rows), _even(len(x2), rows))
    counts = (-(-len(x1) // sizes[0]), -(-len(x2) // sizes[1]))
    pairs = [(i, j) for i in range(counts[0]) for j in range(counts[1]) if i <= j or not symmetric]

    @jax.checkpoint
    def block(pair: Array) -> Array:
        return contract(take(pair[0], 0, sizes[0]), take(pair[1], 1, sizes[1]))

    # A last block that is not full starts earlier (`_rows`): its first rows are there already.
    blocks = jax.lax.map(block, jnp.asarray(pairs, jnp.int32))
    return _assemble(blocks, pairs, counts, (len(x1), len(x2)), symmetric)


def _assemble(
    blocks: Array,
    pairs: list[tuple[int, int]],
    counts: tuple[int, int],
    lengths: tuple[int, int],
    symmetric: bool,
) -> Array:
    """Join `blocks[pair, n, m, ...]` to one kernel; mirror the half that was left out."""
    place = {pair: p for p, pair in enumerate(pairs)}
    size = blocks.shape[1:3]
    keep = [
        [np.arange(c * s, min((c + 1) * s, n)) - min(c * s, n - s) for c in range(count)]
        for count, s, n in zip(counts, size, lengths, strict=True)
    ]
    rows = []
    for i in range(counts[0]):
        row = []
        for j in range(counts[1]):
            if (i, j) in place:
                found = blocks[place[i, j]]
            else:
                assert symmetric
                found = _mirror(blocks[place[j, i]])
            row.append(found[keep[0][i][0] :, keep[1][j][0] :])
        rows.append(jnp.concatenate(row, axis=1))
    return jnp.concatenate(rows, axis=0)


def _mirror(block: Array) -> Array:
    """`Theta[n,m,k,l] -> Theta[m,n,l,k]`; one output axis, or none, stays as it is."""
    order = (1, 0, 3, 2) if block.ndim == 4 else (1, 0, *range(2, block.ndim))
    return block.transpose(order)


def _rows(tree: Any, start: Any, size: int) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, size), tree)


def _even(length: int, rows: int) -> int:
    """Rows per block when `length` is spread evenly over as few blocks as `rows` allows."""
    rows = min(rows, length)
    return -(-length // -(-length // rows))


def _bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
