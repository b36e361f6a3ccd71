"""Which outputs of a sparse network the input reaches."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, UInt32

from .._parameters import parameter_marks
from .._sparse import SparseModel
from .._types import PyTree, at_trace_time, wide_dtype

_DRAWS = 4


def cut_outputs(sparse: SparseModel, sample: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    """The outputs, counted flat, that the mask cuts off from the input.

    Looked at only where a unit has lost all weights of one side, for else each has a path; none
    are found where the input is no float, or where the model cannot be called on it alone.
    """
    if not jnp.issubdtype(sample.dtype, jnp.floating):
        return ()
    if not any(map(_lost_a_unit, jax.device_get(jax.tree.leaves(sparse.mask)))):
        return ()
    arrays, static = eqx.partition(eqx.nn.inference_mode(sparse), eqx.is_array)
    masks = arrays.masks
    whole = jax.tree.map(jnp.ones_like, masks)
    try:
        with jax.numpy_dtype_promotion("standard"), at_trace_time():
            # The draws are an argument: numbers made of a constant would be worked out here, each
            # operation by a program of its own.
            draws = jnp.asarray(np.arange(_DRAWS, dtype=np.uint32))
            reached, without = (
                _reached(arrays.model, m, draws, static, sample) for m in (masks, whole)
            )
    except Exception:  # the model takes more than a sample, or has no derivative forwards
        return ()
    return tuple(int(k) for k in np.flatnonzero(np.asarray(without) & ~np.asarray(reached)))


def _lost_a_unit(mask: np.ndarray) -> bool:
    """Whether a slice along one of the axes keeps nothing, whichever the layer's units are."""
    slices = (np.moveaxis(mask, axis, 0).reshape(mask.shape[axis], -1) for axis in range(mask.ndim))
    return any(not part.any(axis=1).all() for part in slices)


@eqx.filter_jit
def _reached(
    model: PyTree,
    masks: Any,
    draws: UInt32[Array, " draws"],
    static: SparseModel,
    sample: jax.ShapeDtypeStruct,
) -> Bool[Array, " outputs"]:
    """Which outputs move with the input when kept weights are positive numbers, biases zero.

    Positive numbers open every ReLU; draws of either sign see what they hide. Each output of a
    layer gets a mean of what it sees, so that nothing overflows.
    """
    dtype = wide_dtype(sample.dtype)

    def moved(draw: Array) -> Bool[Array, " outputs"]:
        is_none = lambda leaf: leaf is None
        named, treedef = jtu.tree_flatten_with_path(model, is_leaf=is_none)
        marks = jax.tree.leaves(parameter_marks(model), is_leaf=is_none)
        leaves = [
            _strength(jtu.keystr(path), leaf, mask, draw) if mark else leaf
            for (path, leaf), mask, mark in zip(named, masks, marks, strict=True)
        ]
        network = eqx.combine(treedef.unflatten(leaves), static.model)
        x = _numbers(sample.shape, draw).astype(dtype)
        _, change = jax.jvp(network, (x,), (jnp.abs(x) + 0.5,))
        return change.reshape(-1) != 0

    return jax.vmap(moved)(draws).any(axis=0)


def _strength(name: str, leaf: Any, mask: Any, draw: Array) -> Any:
    if name.rsplit(".", 1)[-1].startswith("bias"):
        return jnp.zeros_like(leaf, wide_dtype(leaf.dtype))
    numbers = _numbers(leaf.shape, draw).astype(wide_dtype(leaf.dtype))
    if mask is not None:
        numbers = jnp.where(mask, numbers, jnp.zeros_like(numbers))
    if leaf.ndim < 2:
        return jnp.abs(numbers)
    axes = tuple(range(1, leaf.ndim))
    total = jnp.sum(jnp.abs(numbers), axis=axes, keepdims=True)
    return numbers / jnp.where(total > 0, total, jnp.ones_like(total))


def _numbers(shape: tuple[int, ...], draw: Array) -> Array:
    """Different numbers in (0.5, 1.5); in all draws but the first of either sign."""
    size = functools.reduce(lambda a, b: a * b, shape, 1)
    index = jax.lax.iota(jnp.uint32, size) + jnp.uint32(7919) * draw
    mixed = (index ^ (index >> jnp.uint32(15))) * jnp.uint32(0x9E3779B1)
    mixed = (mixed ^ (mixed >> jnp.uint32(13))) * jnp.uint32(0x85EBCA6B)
    unit = (mixed >> jnp.uint32(8)).astype(jnp.float32) / 2.0**24
    sign = jnp.where((draw > 0) & (mixed % 2 == 1), jnp.float32(-1), jnp.float32(1))
    return ((unit + 0.5) * sign).reshape(shape)
