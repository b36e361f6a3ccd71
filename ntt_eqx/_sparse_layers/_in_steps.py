"""Masked layers that a compiled step evaluates on their kept weights alone, whatever the mask."""

from collections.abc import Callable, Collection
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool

from .._kept import kept_layers
from .._program import Const, Program, slots_of, unfold, without_dead_steps
from .._sparse import SparseModel, count_kept
from .._types import MaskTree, PyTree
from ._layers import KeptMatrix
from ._sorted_index import SortedIndex, sorted_each


class KeptEntries(eqx.Module):
    """Where a mask keeps weights, and that mask: an index answers for no other.

    Attributes:
        index: the entries; its shapes depend on the mask's shape and count alone.
        mask: the mask.
    """

    index: SortedIndex
    mask: Bool[Array, "i j"]


def kept_entries(
    model: PyTree,
    mask: MaskTree,
    where: Callable[[str, Bool[np.ndarray, "i j"]], bool],
    room: Callable[[int, int], int] = lambda count, size: count,
) -> dict[str, KeptEntries]:
    """The entries of the concrete masks of `eqx.nn.Linear` layers that `where` chooses.

    **Arguments:**

    - `where`: from the layer's key string and its mask.
    - `room`: from the number of kept weights and that of all, for how many there is room.

    **Returns:**

    `KeptEntries` by the layers' key strings.
    """
    masks = {name: np.asarray(m) for name, m in _masks_of_layers(model, mask).items()}
    chosen = {name: m for name, m in masks.items() if m.any() and where(name, m)}
    if not chosen:
        return {}
    kept = tuple(room(int(np.count_nonzero(m)), m.size) for m in chosen.values())
    arrays = [jnp.asarray(m) for m in chosen.values()]
    index, _ = eqx.filter_jit(sorted_each)(arrays, kept)
    parts = zip(chosen, index, arrays, strict=True)
    return {name: KeptEntries(found, m) for name, found, m in parts}


def current_entries(
    model: PyTree, mask: MaskTree, known: dict[str, KeptEntries]
) -> tuple[dict[str, KeptEntries], Bool[Array, ""]]:
    """The entries of masks from earlier ones of whatever masks; works under `jit`.

    The masks are compared, and all entries found anew where one differs.

    **Returns:**

    The entries, and whether there is room for those of all masks.
    """
    if not known:
        return known, jnp.ones((), bool)
    masks = _masks_of_layers(model, mask)
    masks = [masks[name] for name in known]
    old = list(known.values())
    same = jnp.stack([jnp.all(m == one.mask) for m, one in zip(masks, old, strict=True)])
    index, room = jax.lax.cond(
        jnp.all(same),
        lambda: ([one.index for one in old], jnp.ones(len(old), bool)),
        lambda: sorted_each(masks, [one.index.kept for one in old]),
    )
    parts = zip(known, index, masks, strict=True)
    return {name: KeptEntries(found, m) for name, found, m in parts}, jnp.all(room)


def entries_have_room(model: PyTree, mask: MaskTree, known: dict[str, KeptEntries]) -> bool:
    """Whether concrete masks keep at most as many weights as there is room for."""
    masks = _masks_of_layers(model, mask)
    return all(int(count_kept(masks[n])) <= one.index.kept for n, one in known.items())


def on_entries(
    sparse: SparseModel,
    entries: dict[str, KeptEntries],
    room: Bool[Array, ""],
    *,
    spare: bool = False,
) -> SparseModel:
    """The same function on kept weights alone; NaN without room for them.

    Derivatives by the weights of `sparse` are those of the masked model: zero at pruned ones.

    **Arguments:**

    - `spare`: whether there is room for more weights than are kept; what stands there is masked.
    """

    def one(path: Any, node: Any) -> Any:
        name = jtu.keystr(path)
        if name not in entries:
            return node
        index = entries[name].index
        values = jnp.where(room, index.gather(node.weight), jnp.nan)
        return eqx.tree_at(lambda layer: layer.weight, node, KeptMatrix(values, index))

    model = jtu.tree_map_with_path(one, sparse.model, is_leaf=_is_linear)
    mask = like_model(model, sparse.mask)
    if spare:
        real = {f"{name}.weight.values": one.index.is_entry() for name, one in entries.items()}
        named, treedef = jtu.tree_flatten_with_path(mask, is_leaf=lambda leaf: leaf is None)
        mask = treedef.unflatten([real.get(jtu.keystr(path), leaf) for path, leaf in named])
    return SparseModel(model, mask)


def is_called_alike(masked: PyTree, kept: PyTree, names: Collection[str], x: Array) -> bool:
    """Whether a model only multiplies by the weights of these layers, before and after.

    A model that maps a function over its arrays finds the kept entries in the place of a matrix: it
    raises nothing, and is another function. So the programs are read.

    **Arguments:**

    - `masked`, `kept`: the model of one sample with whole weights, and that of `on_entries`.
    - `names`: key strings of the layers.
    - `x`: one sample.
    """
    try:
        before = _products(masked, [f"{name}.weight" for name in names], x)
        after = _products(kept, [f"{name}.weight.values" for name in names], x)
    except Exception:  # whatever a model raises that reads a whole weight
        return False
    return None not in before and before == after


def off_entries(kept: PyTree, masked: PyTree, entries: dict[str, KeptEntries]) -> PyTree:
    """The way back from `on_entries`: `masked` with the values of `kept`.

    **Arguments:**

    - `kept`: a `SparseModel` of layers on kept weights, or what is like one.
    - `masked`: a masked one, whose weights under the mask stay.
    """
    weights = kept_layers(kept.model)

    def one(path: Any, leaf: Any) -> Any:
        name = jtu.keystr(path[:-1])
        if jtu.keystr(path) not in weights or name not in entries:
            return leaf
        return put_back(weights[jtu.keystr(path)].values, entries[name], leaf)

    shared = eqx.combine(like_model(masked.model, kept.model), masked.model)
    return SparseModel(jtu.tree_map_with_path(one, shared), masked.mask)


def put_back(values: Array, entries: KeptEntries, under: Array) -> Array:
    """An array with `values` at the entries of the mask and those of `under` elsewhere."""
    return jnp.where(entries.mask, entries.index.scatter(values), under)


def like_model(model: PyTree, tree: PyTree, is_leaf: Callable[[Any], bool] | None = None) -> PyTree:
    """A tree of leaves at a masked model's weights, for the model with some layers replaced."""
    leaves = dict(jtu.tree_leaves_with_path(tree, is_leaf=is_leaf))
    none = lambda leaf: leaf is None
    named, treedef = jtu.tree_flatten_with_path(model, is_leaf=none)
    return treedef.unflatten([leaves.get(path) for path, _ in named])


def _products(model: PyTree, paths: list[str], x: Array) -> list[list[str] | None]:
    """In which dtypes a model multiplies by each of these arrays; `None` for any other use."""
    named, treedef = jtu.tree_flatten_with_path(model)
    leaves = {jtu.keystr(path): leaf for path, leaf in named}

    def function(weights: list[Array], x: Array) -> Array:
        return treedef.unflatten((leaves | dict(zip(paths, weights, strict=True))).values())(x)

    closed = jax.make_jaxpr(function)([leaves[path] for path in paths], x)
    program = without_dead_steps(unfold(closed))
    return [_dtypes_of_products(program, {slot}) for slot in range(len(paths))]


def _dtypes_of_products(program: Program, slots: set[int]) -> list[str] | None:
    found: list[str] = []
    for step in program.steps:
        each = enumerate(step.inputs)
        read = {n for n, slot in each if not isinstance(slot, Const) and slot in slots}
        if not read:
            continue
        if step.name == "convert_element_type":
            slots = slots.union(step.outputs)
        elif step.name in ("dot_general", "sparse_product") and len(read) == 1:
            found.append(str(step.eqn.invars[read.pop()].aval.dtype))
        elif step.loop is not None and max(read) < step.loop.consts:
            inside = _dtypes_of_products(step.loop.body, read)
            if inside is None:
                return None
            found += inside
        else:
            return None
    return None if slots.intersection(slots_of(program.outputs)) else sorted(found)


def _masks_of_layers(model: PyTree, mask: MaskTree) -> dict[str, Array]:
    """The masks of the layers whose weight can be a `KeptMatrix`, by the layers' key strings."""
    masks = dict(jtu.tree_leaves_with_path(mask))
    found: dict[str, Array] = {}
    for path, node in jtu.tree_leaves_with_path(model, is_leaf=_is_linear):
        m = masks.get((*path, jtu.GetAttrKey("weight"))) if _is_linear(node) else None
        if m is not None and m.ndim == 2:  # a stack of layers has more axes
            found[jtu.keystr(path)] = m
    return found


def _is_linear(node: Any) -> bool:
    return type(node) is eqx.nn.Linear
