"""`make_mask`: scores to masks with exact counts."""

import math
from typing import Literal

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float

from .._types import MaskTree, ScoreTree
from ._collapse import check_collapse, is_traced
from ._select import keep_highest


def make_mask(
    scores: ScoreTree, density: float | int, *, scope: Literal["layer", "global"] = "layer"
) -> MaskTree:
    """Keep the weights with the highest scores.

    Counts are exact: `round(density * size)` of every layer, or of all layers together. Ties go
    to the lowest index: row-major within a leaf, leaves in tree order. Deterministic, and fast
    enough for the inside of a training step (`scores` may be traced; `density` is static).

    **Arguments:**

    - `scores`: the structure of a model with a float array at every prunable weight and `None`
      elsewhere; the highest are kept.
    - `density`: share of weights to keep, in `(0, 1]`.
    - `scope`: `"layer"` takes the density in every leaf, `"global"` in all of them together.

    **Returns:**

    The structure of `scores` with boolean arrays, `True` where a weight is kept.

    **Raises:**

    `ValueError` for a density that is NaN, not above 0 or above 1, one that leaves a layer without
    a weight (it names the layer), scores that are not floating point, and, when they are concrete,
    scores that are NaN. Traced NaN scores rank below all others.

    **Warns:**

    `LayerCollapseWarning` when `scope="global"` empties a layer, if the scores are concrete.
    """
    named, treedef = jtu.tree_flatten_with_path(scores)
    names = [jtu.keystr(path) for path, _ in named]
    leaves = [leaf for _, leaf in named]
    if scope not in ("layer", "global"):
        raise ValueError(f"make_mask: scope must be 'layer' or 'global', got {scope!r}.")
    density = check_density(density)
    _check_scores(names, leaves)
    if scope == "layer":
        masks = []
        for name, leaf in zip(names, leaves, strict=True):
            count = _count(density, leaf.size, f"layer {name}")
            masks.append(keep_highest(leaf.reshape(-1), count).reshape(leaf.shape))
        return jtu.tree_unflatten(treedef, masks)
    count = _count(density, sum(leaf.size for leaf in leaves), "the network")
    mask = jtu.tree_unflatten(treedef, _keep_highest_of_all(leaves, count))
    if not is_traced(leaves):
        check_collapse(mask, caller="make_mask")
    return mask


def check_density(density: float | int, caller: str = "make_mask") -> float:
    """The density as a Python float.

    **Raises:**

    `ValueError` when it is not a number in `(0, 1]` that is known before tracing.
    """
    try:
        value = math.nan if isinstance(density, bool) else float(density)
    except (TypeError, ValueError, jax.errors.ConcretizationTypeError):
        value = math.nan
    if not 0.0 < value <= 1.0:
        raise ValueError(f"{caller}: density must be a number in (0, 1], got {density!r}.")
    return value


def _count(density: float, size: int, what: str) -> Array:
    count = round(density * size)
    if count == 0:
        raise ValueError(
            f"make_mask: density {density:g} leaves no weight in {what}, which has {size}; "
            f"it takes more than {0.5 / size:.3g}."
        )
    return jnp.asarray(count, jnp.int32)


def _check_scores(names: list[str], leaves: list[Array]) -> None:
    if not leaves:
        raise ValueError("make_mask: the score tree has no scores.")
    for name, leaf in zip(names, leaves, strict=True):
        dtype = getattr(leaf, "dtype", type(leaf))
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"make_mask: scores{name} must be a floating-point array, got {dtype}."
            )
        if leaf.size == 0:
            raise ValueError(f"make_mask: scores{name} is empty, its shape is {leaf.shape}.")
    concrete = [(n, s) for n, s in zip(names, leaves, strict=True) if not is_traced(s)]
    broken = jax.device_get([jnp.isnan(s).any() for _, s in concrete])
    for (name, _), has_nan in zip(concrete, broken, strict=True):
        if has_nan:
            raise ValueError(f"make_mask: scores{name} has NaN entries.")


def _keep_highest_of_all(
    leaves: list[Float[Array, "..."]], count: Array
) -> list[Bool[Array, "..."]]:
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.result_type(*leaves)
    flat = jnp.concatenate([leaf.reshape(-1).astype(dtype) for leaf in leaves])
    marks = keep_highest(flat, count)
    ends = [0]
    for leaf in leaves:
        ends.append(ends[-1] + leaf.size)
    return [
        marks[start:end].reshape(leaf.shape)
        for leaf, start, end in zip(leaves, ends[:-1], ends[1:], strict=True)
    ]
