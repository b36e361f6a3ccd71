"""Scores to masks with exact counts."""

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.core import Tracer
from jaxtyping import Array, Bool, Float

from .._types import MaskTree, ScoreTree
from ._allocation import (
    Allocation,
    Share,
    check_density,
    densities_of,
    whole_counts,
)
from ._collapse import is_traced
from ._pattern import AbstractPattern
from ._select import keep_highest


def build_mask(
    scores: ScoreTree,
    density: Any,
    *,
    scope: Literal["layer", "global"],
    allocation: Allocation | None,
    pattern: AbstractPattern | None,
) -> MaskTree:
    """The mask of the highest scores; `make_mask` says what the arguments mean.

    One density may also be traced, as a schedule gives it. No warning about empty layers.
    """
    named, treedef = jtu.tree_flatten_with_path(scores)
    layers = {jtu.keystr(path): leaf for path, leaf in named}
    if scope not in ("layer", "global"):
        raise ValueError(f"make_mask: scope must be 'layer' or 'global', got {scope!r}.")
    if not isinstance(pattern, AbstractPattern | None):
        raise ValueError(f"make_mask: pattern must be an AbstractPattern, got {pattern!r}.")
    _check_scores(layers)
    if scope == "layer":
        masks = _keep_by_layer(layers, density, allocation or "uniform", pattern)
        return jtu.tree_unflatten(treedef, masks)
    if isinstance(density, Mapping) or allocation is not None:
        raise ValueError(
            "make_mask: scope='global' takes one density, no allocation and no N:M pattern; "
            "these set the densities of layers, which only scope='layer' keeps."
        )
    return jtu.tree_unflatten(treedef, _keep_of_all(layers, density, pattern))


def _keep_by_layer(
    layers: Mapping[str, Array],
    density: Any,
    allocation: Allocation,
    pattern: AbstractPattern | None,
) -> list[Bool[Array, "..."]]:
    shapes = {name: tuple(leaf.shape) for name, leaf in layers.items()}
    shares = densities_of(shapes, density, allocation)
    groups = {n: _groups(n, leaf, pattern, shares[n]) for n, leaf in layers.items()}
    counts = whole_counts(shares, [leaf.size for leaf in groups.values()], allocation == "erk")
    masks = []
    for (name, leaf), count in zip(groups.items(), counts, strict=True):
        if isinstance(count, int):
            _check_count(count, float(shares[name]), leaf.size, f"layer {name}")
        marks = keep_highest(leaf.reshape(-1), jnp.asarray(count, jnp.int32)).reshape(leaf.shape)
        masks.append(_ungroup(name, marks, shapes[name], pattern))
    return masks


def _keep_of_all(
    layers: Mapping[str, Array], density: Any, pattern: AbstractPattern | None
) -> list[Bool[Array, "..."]]:
    groups = {name: _groups(name, leaf, pattern, None) for name, leaf in layers.items()}
    size = sum(leaf.size for leaf in groups.values())
    if isinstance(density, Tracer):
        (count,) = whole_counts({"": density.astype(jnp.float32)}, [size], together=False)
    else:
        density = check_density(density, "make_mask")
        count = round(density * size)
        _check_count(count, density, size, "the network")
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.result_type(*groups.values())
    flat = jnp.concatenate([leaf.reshape(-1).astype(dtype) for leaf in groups.values()])
    marks = keep_highest(flat, jnp.asarray(count, jnp.int32))
    masks, start = [], 0
    for name, leaf in groups.items():
        part = marks[start : start + leaf.size].reshape(leaf.shape)
        masks.append(_ungroup(name, part, tuple(layers[name].shape), pattern))
        start += leaf.size
    return masks


def _groups(
    name: str, scores: Float[Array, "..."], pattern: AbstractPattern | None, density: Share | None
) -> Array:
    return scores if pattern is None else pattern.groups(scores, name, density)


def _ungroup(
    name: str,
    marks: Bool[Array, "..."],
    shape: tuple[int, ...],
    pattern: AbstractPattern | None,
) -> Bool[Array, "..."]:
    return marks if pattern is None else pattern.spread(marks, shape, name)


def _check_count(count: int, density: float, size: int, what: str) -> None:
    if count == 0:
        raise ValueError(
            f"make_mask: density {density:g} leaves no weight in {what}, which has {size} to "
            f"choose from; it takes more than {0.5 / size:.3g}."
        )


def _check_scores(layers: Mapping[str, Array]) -> None:
    if not layers:
        raise ValueError("make_mask: the score tree has no scores.")
    for name, leaf in layers.items():
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            got = type(leaf).__name__ if dtype is None else dtype
            raise ValueError(f"make_mask: scores{name} must be a floating-point array, got {got}.")
        if leaf.size == 0:
            raise ValueError(f"make_mask: scores{name} is empty, its shape is {leaf.shape}.")
    concrete = {name: leaf for name, leaf in layers.items() if not is_traced(leaf)}
    with jax.ensure_compile_time_eval():  # constants of a traced function are concrete, too
        broken = jax.device_get([jnp.isnan(leaf).any() for leaf in concrete.values()])
    for name, has_nan in zip(concrete, broken, strict=True):
        if has_nan:
            raise ValueError(f"make_mask: scores{name} has NaN entries.")
