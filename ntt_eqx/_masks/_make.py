"""`make_mask`: scores to masks with exact counts."""

from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float

from .._types import MaskTree, ScoreTree
from ._allocation import Allocation, Density, allocate, check_density, round_together
from ._collapse import check_collapse, is_traced
from ._pattern import NM, Pattern, pool, spread
from ._select import keep_highest


def make_mask(
    scores: ScoreTree,
    density: Density,
    *,
    scope: Literal["layer", "global"] = "layer",
    allocation: Allocation | None = None,
    pattern: Pattern | None = None,
) -> MaskTree:
    """Keep the weights with the highest scores.

    Counts are exact: `round(density * size)` of every layer, or of all layers together. Ties go
    to the lowest index: row-major within a leaf, leaves in tree order. Deterministic, and fast
    enough for the inside of a training step (`scores` may be traced; `density` is static).

    **Arguments:**

    - `scores`: the structure of a model with a float array at every prunable weight and `None`
      elsewhere; the highest are kept.
    - `density`: share of weights to keep, in `(0, 1]`; or, with `scope="layer"`, a mapping from
      the path of every layer (`".layers[0].weight"`) to its own density.
    - `scope`: `"layer"` takes the highest of each layer, `"global"` of all of them together.
    - `allocation`: with `scope="layer"`, how the density is shared out over the layers:
      `"uniform"` (the default) or `"erk"`, see `allocate`. The counts of `"erk"` add up to
      `round(density * size)` of the whole network.
    - `pattern`: keep or drop weights together: `NM`, `Block` or `Channels`. `Block` and `Channels`
      count groups instead of weights. `NM` fixes the density: it must be `n / m`, or 1 in layers
      that are to stay dense.

    **Returns:**

    The structure of `scores` with boolean arrays, `True` where a weight is kept.

    **Raises:**

    `ValueError` for a density that is NaN, not above 0 or above 1, one that leaves a layer without
    a weight (it names the layer), a pattern that does not fit a layer, options that contradict
    each other, scores that are not floating point, and, when they are concrete, scores that are
    NaN. Traced NaN scores rank below all others.

    **Warns:**

    `LayerCollapseWarning` when `scope="global"` empties a layer, if the scores are concrete.
    """
    mask = build_mask(scores, density, scope=scope, allocation=allocation, pattern=pattern)
    if scope == "global" and not is_traced(mask):
        check_collapse(mask, caller="make_mask")
    return mask


def build_mask(
    scores: ScoreTree,
    density: Density,
    *,
    scope: Literal["layer", "global"],
    allocation: Allocation | None,
    pattern: Pattern | None,
) -> MaskTree:
    """`make_mask` without the warning."""
    named, treedef = jtu.tree_flatten_with_path(scores)
    layers = {jtu.keystr(path): leaf for path, leaf in named}
    if scope not in ("layer", "global"):
        raise ValueError(f"make_mask: scope must be 'layer' or 'global', got {scope!r}.")
    _check_scores(layers)
    if scope == "layer":
        densities = allocate(scores, density, allocation or "uniform")
        if isinstance(pattern, NM):
            masks = [_keep_nm(pattern, n, s, densities[n]) for n, s in layers.items()]
        else:
            masks = _keep_by_layer(layers, densities, allocation, pattern)
        return jtu.tree_unflatten(treedef, masks)
    if isinstance(density, Mapping) or allocation is not None or isinstance(pattern, NM):
        raise ValueError(
            "make_mask: scope='global' takes one density, no allocation and no N:M pattern; "
            "these set the densities of layers, which only scope='layer' keeps."
        )
    return jtu.tree_unflatten(treedef, _keep_of_all(layers, density, pattern))


def _keep_by_layer(
    layers: Mapping[str, Array],
    densities: Mapping[str, float],
    allocation: Allocation | None,
    pattern: Pattern | None,
) -> list[Bool[Array, "..."]]:
    groups = {name: _groups(name, leaf, pattern) for name, leaf in layers.items()}
    amounts = [densities[name] * leaf.size for name, leaf in groups.items()]
    if allocation == "erk":
        counts = round_together(amounts, round(sum(amounts)))
    else:
        counts = [round(amount) for amount in amounts]
    masks = []
    for (name, leaf), count in zip(groups.items(), counts, strict=True):
        _check_count(count, densities[name], leaf.size, f"layer {name}")
        marks = keep_highest(leaf.reshape(-1), jnp.asarray(count, jnp.int32)).reshape(leaf.shape)
        masks.append(_ungroup(name, marks, layers[name].shape, pattern))
    return masks


def _keep_of_all(
    layers: Mapping[str, Array], density: float | int, pattern: Pattern | None
) -> list[Bool[Array, "..."]]:
    density = check_density(density, "make_mask")
    groups = {name: _groups(name, leaf, pattern) for name, leaf in layers.items()}
    size = sum(leaf.size for leaf in groups.values())
    count = round(density * size)
    _check_count(count, density, size, "the network")
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.result_type(*groups.values())
    flat = jnp.concatenate([leaf.reshape(-1).astype(dtype) for leaf in groups.values()])
    marks = keep_highest(flat, jnp.asarray(count, jnp.int32))
    masks, start = [], 0
    for name, leaf in groups.items():
        part = marks[start : start + leaf.size].reshape(leaf.shape)
        masks.append(_ungroup(name, part, layers[name].shape, pattern))
        start += leaf.size
    return masks


def _keep_nm(pattern: NM, name: str, scores: Array, density: float) -> Bool[Array, "..."]:
    if density == 1.0:
        return jnp.ones(scores.shape, bool)
    if round(density * pattern.m, 9) != pattern.n:
        raise ValueError(
            f"make_mask: the pattern {pattern.n}:{pattern.m} has density "
            f"{pattern.n / pattern.m:g}, but {name} was given {density:g}."
        )
    return pattern.keep(scores, name)


def _groups(name: str, scores: Float[Array, "..."], pattern: Pattern | None) -> Array:
    if pattern is None or isinstance(pattern, NM):
        return scores
    return pool(scores, pattern.sizes(scores.shape, name))


def _ungroup(
    name: str, marks: Bool[Array, "..."], shape: tuple[int, ...], pattern: Pattern | None
) -> Bool[Array, "..."]:
    if pattern is None or isinstance(pattern, NM):
        return marks
    return spread(marks, pattern.sizes(shape, name), shape)


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
