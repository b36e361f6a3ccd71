"""Under `jax.shard_map`: the mesh axes that values vary over."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import ManualAxisType


def varying_alike(*args: Any) -> list[Any]:
    """The arrays, all varying over every mesh axis that any of them varies over.

    The transpose of the cast sums over those axes, so that a gradient rule written for one device
    is right inside `jax.shard_map`.
    """
    axes = _varying(args)
    return [jax.tree.map(lambda x: _cast(x, axes), arg) for arg in args]


def like_varying(tree: Any, args: Sequence[Any]) -> Any:
    """The arrays of `tree`, varying over the mesh axes that `args` vary over.

    Mosaic GPU forgets them on the way.
    """
    axes = _varying(args)
    return jax.tree.map(lambda x: _cast(x, axes), tree)


def varies(*args: Any) -> bool:
    """Whether any of the arrays varies over an axis of a mesh."""
    return bool(_varying(args))


def zeros_of(result: jax.ShapeDtypeStruct, shape: Sequence[int]) -> jax.Array:
    """Zeros of this shape that go on as what `jax.eval_shape` says of a result."""
    zeros = jnp.zeros(tuple(shape), result.dtype)
    kind = getattr(result, "manual_axis_type", None)
    return zeros if kind is None else _cast(zeros, kind.varying)


def result_type(args: Sequence[Any], shape: Sequence[int], dtype: Any) -> jax.ShapeDtypeStruct:
    """The type of a kernel's result: it varies over the mesh axes that its arguments vary over."""
    axes = _varying(args)
    extra: dict[str, Any] = {"manual_axis_type": ManualAxisType(varying=axes)} if axes else {}
    return jax.ShapeDtypeStruct(tuple(shape), dtype, **extra)


def _cast(x: jax.Array, axes: frozenset):
    missing = tuple(axes - jax.typeof(x).manual_axis_type.varying)
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def _varying(args: Sequence[Any]) -> frozenset:
    types = [jax.typeof(x).manual_axis_type for x in jax.tree.leaves(list(args))]
    return frozenset().union(*(t.varying for t in types))
