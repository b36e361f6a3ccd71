"""Scores to masks with exact counts."""

import contextlib
import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float

from .._batch import as_array
from .._checks import in_host_memory
from .._sparse import SparseModel
from .._types import MaskTree, ScoreTree, at_trace_time
from ._allocation import Allocation, check_density, layer_shapes, whole_counts
from ._collapse import is_traced
from ._pattern import AbstractOrdered, AbstractPattern, Unstructured, check_order
from ._select import select_each


def build_mask(
    scores: ScoreTree,
    density: Any,
    *,
    scope: Literal["layer", "global"],
    allocation: Allocation | None,
    pattern: AbstractPattern | None,
    within: MaskTree | None = None,
    steps: int = 1,
    last: bool = True,
    scheduled: bool = False,
) -> tuple[MaskTree, Bool[Array | np.ndarray, ""]]:
    """The mask of the highest scores, and inside `jit` whether that is lost.

    `make_mask` says what the arguments mean.

    A single density may be traced, as from a schedule. There is no warning about empty layers.

    Scores that cannot rank the weights (`by_index`) raise. Inside `jit`, which cannot raise, such a
    layer keeps no weight, and the mask is lost. No ranked layer is empty, so `lost` can tell later.

    **Arguments:**

    - `within`: a mask whose pruned weights must not return. If one would, the call raises; inside
      `jit` its layer keeps no weight. The scores of pruned weights are `-inf`.
    - `steps`: in how many rounds weights are pruned; see `by_index`.
    - `last`: whether this is the last round. In an earlier round all remaining weights are kept if
      they are fewer than the density requires.
    - `scheduled`: whether the density is one of a schedule, which may begin with more weights than
      the pattern lets a layer keep. The layer then keeps all of those, as in an earlier round.
    """
    pattern = Unstructured() if pattern is None else pattern
    with _known(scores, density, within):
        rounds = {"lenient": steps > 1, "most": not last, "scheduled": scheduled or not last}
        masks, unranked = _built(scores, density, scope, allocation, pattern, **rounds)
        leaves, treedef = jax.tree.flatten(masks)
        olds = leaves if within is None else jax.tree.leaves(within)
        returns = [False] * len(leaves) if within is None else _returns(leaves, olds)
        for name, new, old, back in zip(_names(masks), leaves, olds, returns, strict=True):
            if not is_traced(back) and bool(back):
                raise ValueError(_would_return(name, new, old))
        for name, new, flag in zip(_names(masks), leaves, unranked, strict=True):
            if not is_traced(flag) and bool(flag):
                raise ValueError(_cannot_rank(scores, name, int(new.sum()), scope, pattern))
        if not is_traced((unranked, returns)):
            return masks, np.zeros((), bool)  # it would have raised
        gone = [one | back for one, back in zip(unranked, returns, strict=True)]
        any_gone = jnp.stack(gone).any()
        if scope == "global":
            gone = [any_gone] * len(gone)
        return treedef.unflatten([m & ~g for m, g in zip(leaves, gone, strict=True)]), any_gone


@jax.jit
def _returns(new: list[Array], old: list[Array]) -> list[Bool[Array, ""]]:
    return [jnp.any(n & ~o) for n, o in zip(new, old, strict=True)]


def ranked(
    scores: ScoreTree,
    density: Any,
    *,
    scope: Literal["layer", "global"],
    allocation: Allocation | None,
    pattern: AbstractPattern,
    scheduled: bool,
) -> tuple[MaskTree, Bool[Array, ""]]:
    """The mask of the highest scores, and whether they can rank the weights."""
    masks, unranked = _built(scores, density, scope, allocation, pattern, scheduled=scheduled)
    return masks, ~jnp.stack(unranked).any()


def lost(mask: MaskTree, scope: str) -> Bool[Array, ""]:
    """Whether `build_mask` made `mask` inside `jit`, of scores that cannot rank the weights."""
    empty = jnp.stack([~jnp.any(m) for m in jax.tree.leaves(mask)])
    return empty.all() if scope == "global" else empty.any()


def _built(
    scores: ScoreTree,
    density: Any,
    scope: str,
    allocation: Any,
    pattern: AbstractPattern,
    **rounds: bool,
) -> tuple[MaskTree, list[Bool[Array, ""]]]:
    """The mask, and for each layer whether its scores cannot rank its weights."""
    named, treedef = jtu.tree_flatten_with_path(scores)
    layers = {jtu.keystr(path): leaf for path, leaf in named}
    if scope not in ("layer", "global"):
        raise ValueError(f"make_mask: scope must be 'layer' or 'global', got {scope!r}.")
    if not isinstance(pattern, AbstractPattern):
        raise ValueError(f"make_mask: pattern must be an AbstractPattern, got {pattern!r}.")
    layers = _checked(scores, layers)
    if scope == "global" and (isinstance(density, Mapping) or allocation is not None):
        raise ValueError(
            "make_mask: scope='global' takes one density, no allocation and no N:M pattern; "
            "these set the densities of layers, which only scope='layer' keeps."
        )
    # Only a Module is a network with ends to spare, and explicit densities by layer win over it.
    shapes = layer_shapes(scores)
    network = isinstance(scores, eqx.Module) and not isinstance(density, Mapping)
    spared = pattern.spared(shapes) if network else ()
    if isinstance(pattern, AbstractOrdered):
        check_order(pattern, scores, spared)
    chosen = {name: leaf for name, leaf in layers.items() if name not in spared}
    of_chosen = {name: shapes[name] for name in chosen}
    if scope == "layer":
        how = allocation or "uniform"
        found = _keep_by_pool(chosen, of_chosen, density, how, pattern, **rounds)
    else:
        found = _keep_of_all(chosen, of_chosen, density, pattern, **rounds)
    never = jnp.zeros((), bool)
    whole = {name: (jnp.ones(shapes[name], bool), never) for name in spared}
    masks, flags = zip(*((found | whole)[name] for name in layers), strict=True)
    return jtu.tree_unflatten(treedef, masks), list(flags)


_Kept = tuple[Bool[Array, "..."], Bool[Array, ""]]  # marks or a mask, and whether ties decide it


def _keep_by_pool(
    layers: Mapping[str, Array],
    shapes: Mapping[str, tuple[int, ...]],
    density: Any,
    allocation: Allocation,
    pattern: AbstractPattern,
    scheduled: bool = False,
    **rounds: bool,
) -> dict[str, _Kept]:
    """The mask of each layer, in every pool of which its density of groups is kept."""
    shares = pattern.densities(shapes, density, allocation)
    groups = pattern.group_scores(layers, shares)
    shares = {pool: shares[pool] for pool in groups}  # a pattern may order its pools in two ways
    known = isinstance(density, float | int)
    known = known or (isinstance(pattern, Unstructured) and isinstance(density, Tracer))
    rooms = {pool: leaf.size for pool, leaf in groups.items()}
    totals = pattern.totals(shapes, rooms)
    sizes, together = [totals[pool] for pool in groups], allocation == "erk"
    counts = whole_counts(shares, sizes, together, density if known else None)
    counts = [
        _checked_count(count, shares[pool], room, f"layer {pool}", pattern, scheduled)
        for count, (pool, room) in zip(counts, rooms.items(), strict=True)
    ]
    chosen = _select(list(groups.values()), _int32(counts), **rounds)
    return _masks(dict(zip(groups, chosen, strict=True)), shapes, pattern)


def _keep_of_all(
    layers: Mapping[str, Array],
    shapes: Mapping[str, tuple[int, ...]],
    density: Any,
    pattern: AbstractPattern,
    scheduled: bool = False,
    **rounds: bool,
) -> dict[str, _Kept]:
    """The mask of each layer, where the groups of all pools compete for one density."""
    groups = pattern.group_scores(layers, None)
    rooms = {pool: leaf.size for pool, leaf in groups.items()}
    size = sum(pattern.totals(shapes, rooms).values())
    if isinstance(density, Tracer):
        (count,) = whole_counts({"": density.astype(jnp.float32)}, [size], together=False)
    else:
        density = check_density(density, "make_mask")
        count = round(density * size)
    room = sum(rooms.values())
    count = _checked_count(count, density, room, "the network", pattern, scheduled)
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.result_type(*groups.values())
    flat = jnp.concatenate([leaf.reshape(-1).astype(dtype) for leaf in groups.values()])
    ((marks, unranked),) = _select([flat], _int32([count]), **rounds)
    chosen, start = {}, 0
    for name, leaf in groups.items():
        chosen[name] = marks[start : start + leaf.size].reshape(leaf.shape), unranked
        start += leaf.size
    return _masks(chosen, shapes, pattern)


def _masks(
    chosen: Mapping[str, _Kept],
    shapes: Mapping[str, tuple[int, ...]],
    pattern: AbstractPattern,
) -> dict[str, _Kept]:
    """The mask of each layer, of the groups that are chosen in each pool."""
    masks = pattern.masks({pool: marks for pool, (marks, _) in chosen.items()}, shapes)
    never = jnp.zeros((), bool)
    unranked = lambda name: [chosen[pool][1] for pool in pattern.pools_of(name)] or [never]
    tied = lambda name: functools.reduce(operator.or_, unranked(name))
    return {name: (mask, tied(name)) for name, mask in masks.items()}


@functools.partial(jax.jit, static_argnames=("most", "lenient"))
def _select(
    scores: list[Float[Array, "..."]],
    counts: list[Any],
    most: bool = False,
    lenient: bool = False,
) -> list[tuple[Bool[Array, "..."], Bool[Array, ""]]]:
    """`select_each` by one program, which knows the counts when it runs."""
    if most:
        alive = [jnp.sum(leaf > -jnp.inf, dtype=jnp.int32) for leaf in scores]
        counts = [jnp.minimum(c, a) for c, a in zip(counts, alive, strict=True)]
    return select_each(scores, counts, lenient=lenient)


def _int32(counts: Sequence[Any]) -> list[Any]:
    return [np.int32(c) if isinstance(c, int) else c.astype(jnp.int32) for c in counts]


def _checked_count(
    count: Any,
    density: Any,
    room: int,
    what: str,
    pattern: AbstractPattern,
    scheduled: bool,
) -> Any:
    """The number of groups to keep, of `room` that there are; at most these with a schedule.

    Raises `ValueError` for none, and without a schedule for more than there are.
    """
    if not isinstance(count, int):
        return jnp.minimum(count, room)
    if count == 0:
        raise ValueError(
            f"make_mask: density {density:g} leaves no weight in {what}, which has {room} to "
            f"choose from; it takes more than {0.5 / room:.3g}."
        )
    if count > room and not scheduled:
        raise ValueError(
            f"make_mask: density {density:g} of {what} is {count:,} weights, and the pattern "
            f"{pattern} has {room:,} to choose from there; ask for fewer, or let the pattern have "
            "more."
        )
    return min(count, room)


def _checked(scores: ScoreTree, layers: Mapping[str, Any]) -> dict[str, Array]:
    if isinstance(scores, SparseModel):
        raise ValueError(
            "make_mask: takes the scores of weights and not a SparseModel; "
            "prune(model, score, density) makes both."
        )
    if not layers:
        raise ValueError("make_mask: the score tree has no scores.")
    found = {}
    for name, leaf in layers.items():
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or not _is_float(dtype):
            got = type(leaf).__name__ if dtype is None else dtype
            hint = ""
            if isinstance(scores, eqx.Module):
                hint = (
                    " Scores are a tree like a model's, with a float array at each prunable weight "
                    f"and None elsewhere, as scores.Magnitude()(model) gives; is this {got} part "
                    "of a model? prune(model, score, density) scores and prunes it."
                )
            raise ValueError(
                f"make_mask: scores{name} must be a floating-point array, got {got}.{hint}"
            )
        if not isinstance(leaf, Array):
            leaf = as_array("make_mask", f"scores{name}", leaf)
        if leaf.size == 0:
            raise ValueError(f"make_mask: scores{name} is empty, its shape is {leaf.shape}.")
        found[name] = leaf
    concrete = {name: in_host_memory(leaf) for name, leaf in found.items() if not is_traced(leaf)}
    far = [leaf for leaf in concrete.values() if not isinstance(leaf, np.ndarray)]
    with at_trace_time():  # constants of a traced function are concrete, too
        known = iter(jax.device_get(_have_nan(far)) if far else ())
    for name, leaf in concrete.items():
        if np.isnan(leaf).any() if isinstance(leaf, np.ndarray) else next(known):
            raise ValueError(f"make_mask: scores{name} has NaN entries.")
    return found


@jax.jit
def _have_nan(scores: list[Array]) -> list[Bool[Array, ""]]:
    return [jnp.isnan(leaf).any() for leaf in scores]


def _is_float(dtype: Any) -> bool:
    try:
        return jnp.issubdtype(dtype, jnp.floating)
    except TypeError:  # of another library
        return False


def _known(*trees: Any) -> contextlib.AbstractContextManager[None]:
    """Constants of a traced function have values, by which scores are refused there, too."""
    traced = is_traced(trees)
    return contextlib.nullcontext() if traced else at_trace_time()


def _names(tree: Any) -> list[str]:
    return [jtu.keystr(path) for path, _ in jtu.tree_leaves_with_path(tree)]


def _cannot_rank(
    scores: ScoreTree, name: str, kept: int, scope: str, pattern: AbstractPattern
) -> str:
    """Why the scores of a layer, or of all with `scope="global"`, make no mask."""
    names, leaves = _names(scores), jax.tree.leaves(scores)
    if scope == "layer":
        leaves, what = [leaves[names.index(name)]], f"the scores of layer {name}"
    else:
        what = "the scores of all layers together"
    flat = np.concatenate([np.asarray(leaf, np.float64).reshape(-1) for leaf in leaves])
    alive = flat[flat > -np.inf]
    values, often = np.unique(alive, return_counts=True)
    seen = f"{flat.size - alive.size:,} are -infinity"
    if alive.size:
        most = int(often.argmax())
        share = "all" if often[most] == alive.size else f"{often[most]:,} of {alive.size:,}"
        seen = f"{share} are {values[most]:g}"
    single = isinstance(pattern, Unstructured)
    groups = "" if single else f" in groups of the pattern {pattern}"
    return (
        f"make_mask: {what} cannot rank its weights ({seen}): to keep {kept:,}{groups}, the index "
        "would decide more of them than the scores do. Look at what the score measures there (a "
        "head or a layer of zeros, units that no example reaches, numbers that overflow), or "
        "choose at random with scores.Random(key)."
    )


def _would_return(name: str, new: Array, old: Array) -> str:
    return (
        f"prune: layer {name} was to keep {int(new.sum()):,} of its {new.size:,} weights, but "
        f"{int(old.sum()):,} are left in it, or they do not fill the pattern's groups: "
        f"{int((new & ~old).sum()):,} pruned ones would return. Ask for a lower density there, or "
        "let pruned weights return with regrow=True."
    )
