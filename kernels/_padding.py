"""Whole tiles: sizes rounded up, arrays filled up with zeros."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import ManualAxisType


def ceil_to(size: int, unit: int) -> int:
    """The least multiple of `unit` that is at least `size`."""
    return -(-size // unit) * unit


def pad_to(x: jax.Array, tiles: Sequence[int]) -> jax.Array:
    """`x` with zeros behind every axis, up to whole tiles."""
    widths = [(0, ceil_to(n, t) - n) for n, t in zip(x.shape, tiles, strict=True)]
    return x if not any(after for _, after in widths) else jnp.pad(x, widths)


def with_axes_of(args: Sequence[jax.Array], shape: Sequence[int], dtype: Any):
    """The type of a kernel's result: it varies over the mesh axes that any argument varies over."""
    varying = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in args))
    axes = {"manual_axis_type": ManualAxisType(varying=varying)} if varying else {}
    return jax.ShapeDtypeStruct(tuple(shape), dtype, **axes)
