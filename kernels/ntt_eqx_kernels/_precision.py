"""How exactly numbers are multiplied: by JAX as told, by the kernels as sums of bfloat16 ones."""

import contextlib
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp

Precision: TypeAlias = Literal["float32", "tf32", "bfloat16"]
"""Error of a product, as a share of its largest entry: 1e-5, 1e-3, 1e-2."""

# A bfloat16 number carries 8 bits of the 24 of a float32 one: 1, 2 and 3 pieces of a number leave
# relative errors of 2^-9, 2^-17 and 2^-25.
PIECES: dict[str, int] = {"bfloat16": 1, "tf32": 2, "float32": 3}

PRECISIONS: tuple[Precision, ...] = get_args(Precision)
"""Their names, the most exact first."""

MATMUL: dict[str, str] = {
    "bfloat16": "bfloat16",
    "tf32": "tensorfloat32",
    "float32": "float32",
}
"""The names that `jax.default_matmul_precision` has for them."""


def at_precision(precision: Precision) -> contextlib.AbstractContextManager[None]:
    """Within it JAX's products are at least as exact as `precision`, whatever is set outside.

    Their transposes keep it, wherever they are taken.

    **Arguments:**

    - `precision`: `"float32"`, `"tf32"` or `"bfloat16"`.

    **Returns:**

    A context manager.
    """
    return jax.default_matmul_precision(MATMUL[precision])


def resolve(operation: str, precision: Precision | None, dtype: jnp.dtype) -> Precision:
    """The precision asked for; by default, the one that the inputs carry."""
    if precision is None:
        return "bfloat16" if dtype == jnp.bfloat16 else "float32"
    if precision not in PIECES:
        raise ValueError(
            f"{operation}: precision must be one of {sorted(PIECES)} or None, got {precision!r}."
        )
    return precision


def accumulator_dtype(dtype: Any) -> Any:
    """What products of `dtype` are summed in: float64 for itself, float32 for all others."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def split(x: jax.Array, pieces: int) -> list[jax.Array]:
    """`x` (float32) as a sum of that many bfloat16 arrays, the largest first."""
    parts = []
    for piece in range(pieces):
        parts.append(x.astype(jnp.bfloat16))
        if piece + 1 < pieces:
            x = x - parts[-1].astype(jnp.float32)
    return parts


def split_in_memory(x: jax.Array, pieces: int) -> list[jax.Array]:
    """Like `split`, outside a kernel: XLA may take a cast there and back for nothing to do."""
    parts = []
    for _ in range(pieces):
        parts.append(jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7))
        x = x - parts[-1]
    return [part.astype(jnp.bfloat16) for part in parts]


def products(left: int, right: int) -> list[tuple[int, int]]:
    """Which pieces to multiply: all pairs whose share of the result is above the last piece's."""
    most = max(left, right)
    return [(p, q) for p in range(left) for q in range(right) if p + q < most]
