"""Whole tiles: sizes rounded up, arrays filled up with zeros."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def ceil_to(size: int, unit: int) -> int:
    """The least multiple of `unit` that is at least `size`."""
    return -(-size // unit) * unit


def pad_to(x: jax.Array, tiles: Sequence[int]) -> jax.Array:
    """`x` with zeros behind every axis, up to whole tiles."""
    widths = [(0, ceil_to(n, t) - n) for n, t in zip(x.shape, tiles, strict=True)]
    return x if not any(after for _, after in widths) else jnp.pad(x, widths)
