"""Work over the first axis of some arrays in blocks of bounded size."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ._dispatch import Device, target_device

# On a CPU one block's intermediates should stay in a core's cache: measured, blocks of 1 to 8 MiB
# are equally fast, and 1.5 to 2.5 times faster than no blocks at all.
BLOCK_BYTES = 4 * 2**20

# On an accelerator every block is several launches, of which each should fill the chip: blocks are
# there to bound memory alone, to this share of it. Counted by the chips' compilers, not measured.
MEMORY_SHARE = 64

# GiB, of devices that are compiled for without being there.
_MEMORY = {
    "NVIDIA A100": 40,
    "NVIDIA H100": 80,
    "NVIDIA H200": 141,
    "TPU v4": 32,
    "TPU v5": 95,
    "TPU v5 lite": 16,
    "TPU v6 lite": 32,
}


def on_cpu() -> bool:
    """Whether a call traced now is meant for a CPU."""
    return target_device().platform == "cpu"


def block_bytes() -> int:
    """Bytes of intermediates that one block may take on the device that a call is meant for."""
    return BLOCK_BYTES if on_cpu() else memory_of(target_device()) // MEMORY_SHARE


def memory_of(device: Device) -> int:
    """The memory of an accelerator, that it has or, where it is not there, that its kind has.

    **Arguments:**

    - `device`: the device computed for.

    **Returns:**

    Bytes; 8 GiB where nothing is known of its kind.
    """
    known = known_memory(device)
    return 8 * 2**30 if known is None else known


def known_memory(device: Device) -> int | None:
    """The memory of an accelerator, where it is known.

    **Arguments:**

    - `device`: the device computed for.

    **Returns:**

    Bytes; `None` where nothing is known of its kind.
    """
    for local in jax.local_devices():
        stats = local.memory_stats() if local.device_kind == device.kind else None
        if stats and "bytes_limit" in stats:
            return int(stats["bytes_limit"])
    known = [kind for kind in _MEMORY if device.kind.startswith(kind)]
    return _MEMORY[max(known, key=len)] * 2**30 if known else None


def block_size(rows: int, bytes_per_row: int, budget: int | None = None) -> int:
    """Rows per block: as many as fit the budget, spread evenly over the blocks.

    Rather fewer, down to half as many, than a last block that is filled up.

    **Arguments:**

    - `rows`: rows in all.
    - `bytes_per_row`: bytes that the work on one row takes.
    - `budget`: bytes that a block may take; by default `block_bytes()`.

    **Returns:**

    From 1 to `rows`.
    """
    budget = block_bytes() if budget is None else budget
    fit = max(1, min(rows, budget // max(1, bytes_per_row)))
    even = -(-rows // -(-rows // fit))
    return next((size for size in range(even, even // 2, -1) if rows % size == 0), even)


def map_blocks(function: Callable[..., Any], arrays: Any, rows: int, size: int) -> Any:
    """`function` over blocks of the leading axis of `arrays`, the results joined on their own.

    **Arguments:**

    - `function`: takes a PyTree like `arrays` with `size` rows (zero rows are added to fill the
      last block) and returns arrays with `size` rows.
    - `arrays`: a PyTree whose leaves all have `rows` rows.
    - `rows`, `size`: rows in all and in a block.

    **Returns:**

    What `function` returns, with `rows` rows.
    """
    if size >= rows:
        return function(arrays)
    out = jax.lax.map(function, _split(arrays, rows, size))
    return _joined(out, rows)


def map_rows(function: Callable[..., Any], arrays: Any, rows: int, size: int) -> Any:
    """`function` of one row, for every row of `arrays`: `size` of them at a time.

    A single row is taken as it is, not as a batch of one: XLA on CPU (JAX 0.10) needs 30 to 70
    times as long for the sum over the second axis of `[1, R, ...]` as for that of `[R, ...]`.

    **Arguments:**

    - `function`: takes a PyTree like `arrays` without the leading axis.
    - `arrays`, `rows`, `size`: as of `map_blocks`.

    **Returns:**

    What `function` returns, with a leading axis of `rows`.
    """
    if min(size, rows) > 1:
        return map_blocks(jax.vmap(function), arrays, rows, size)
    if rows != 1:
        return jax.lax.map(function, arrays)
    out = function(jax.tree.map(lambda x: x[0], arrays))
    return jax.tree.map(lambda x: x[None], out)


def scan_blocks(
    function: Callable[..., tuple[Any, Any]], carry: Any, arrays: Any, rows: int, size: int
) -> tuple[Any, Any]:
    """Like `map_blocks`, with a running sum.

    **Arguments:**

    - `function`: `(carry, block) -> (carry, results)`.
    - `carry`: before the first block.
    - `arrays`, `rows`, `size`: as of `map_blocks`.

    **Returns:**

    The last carry, and the results with `rows` rows.
    """
    if size >= rows:
        return function(carry, arrays)
    carry, out = jax.lax.scan(function, carry, _split(arrays, rows, size))
    return carry, _joined(out, rows)


def _joined(blocks: Any, rows: int) -> Any:
    """The blocks one after the other; arrays without entries, too, of which -1 says no length."""
    join = lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])[:rows]
    return jax.tree.map(join, blocks)


def _split(arrays: Any, rows: int, size: int) -> Any:
    blocks = -(-rows // size)

    def split(x):
        padding = [(0, blocks * size - rows)] + [(0, 0)] * (x.ndim - 1)
        return jnp.pad(x, padding).reshape(blocks, size, *x.shape[1:])

    return jax.tree.map(split, arrays)
