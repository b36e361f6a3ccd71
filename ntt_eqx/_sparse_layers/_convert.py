"""From masked layers to those that store kept weights alone, and back."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.tree_util as jtu
import numpy as np
from jax.core import Tracer

from .._checks import check_count
from .._kept import AbstractKeptLayer, is_kept_layer
from .._sparse import SparseModel
from .._types import PyTree
from ._costs import pays
from ._layers import SparseConv, SparseLinear

_CONVOLUTIONS = (eqx.nn.Conv, eqx.nn.Conv1d, eqx.nn.Conv2d, eqx.nn.Conv3d)


def sparse_layers(
    sparse: SparseModel,
    where: Callable[[str, eqx.Module], bool] | None = None,
    *,
    batch_size: int = 64,
) -> SparseModel:
    """Replace masked layers by layers that store kept weights alone.

    Each `eqx.nn.Linear` and `eqx.nn.Conv` with a masked weight becomes a layer with the array
    `values`, its kept weights row by row, and integer indices. It has the same outputs and
    gradients to rounding, in both modes and under every transformation of JAX, forms no array of
    the size of the weight, and is faster where few weights are kept. Optimiser states hold kept
    weights alone. The layers have no weight to bring back: refreshes, scores, `compact` and exports
    need the masked form, which `masked_layers` gives without loss. A model that asks for the class
    of its layers, or maps a function over its own arrays, has to know these as well, or it is
    another function with them.

    **Arguments:**

    - `sparse`: a `SparseModel` of any Equinox model.
    - `where`: `(path, layer) -> bool` says for each masked layer whether to replace it, such as
      `lambda path, layer: True` for all; `path` is the key string of the layer (`".layers[0]"`).
      By default, on a CPU, a training step's costs decide, as they were measured there; on other
      devices nothing was measured, and layers stay.
    - `batch_size`: the samples of a step for these costs.

    **Returns:**

    The same model with these layers, as a `SparseModel` whose other masked weights stay masked. It
    is called, trained and evaluated as before; `densities` counts its layers by their `values`.
    Weights under the mask of replaced layers are lost.

    **Raises:**

    `ValueError` for what is no `SparseModel`, inside `jit`, where masks have no values, and if
    `where` asks for a layer in a form of its own (a subclass), which may do more than its parent.
    """
    _check("sparse_layers", sparse)
    check_count("sparse_layers: batch_size", batch_size)
    masks = dict(jtu.tree_leaves_with_path(sparse.mask))
    named, treedef = jtu.tree_flatten_with_path(sparse.model, is_leaf=_is_layer)
    nodes: list[Any] = []
    for path, node in named:
        mask = masks.get((*path, jtu.GetAttrKey("weight"))) if _is_layer(node) else None
        if mask is not None and _bare(node) and mask.ndim == _axes(node):
            mask = _concrete(mask)
            asked = pays(node, mask, batch_size) if where is None else where(jtu.keystr(path), node)
            if asked:
                node = _kept_only(node, mask)
        nodes.append(node)
    return _paired(treedef.unflatten(nodes), masks)


def masked_layers(sparse: SparseModel) -> SparseModel:
    """Replace layers that store kept weights alone by the masked layers that they stand for.

    **Arguments:**

    - `sparse`: a `SparseModel` from `sparse_layers`, trained or not.

    **Returns:**

    A `SparseModel` with the classes, the masks and the kept weights that it had before
    `sparse_layers`, or those that training made of them; pruned weights are zero.

    **Raises:**

    `ValueError` for what is no `SparseModel`.
    """
    _check("masked_layers", sparse)
    named, treedef = jtu.tree_flatten_with_path(sparse.model, is_leaf=is_kept_layer)
    masks = dict(jtu.tree_leaves_with_path(sparse.mask))
    nodes: list[Any] = []
    for path, node in named:
        if is_kept_layer(node):
            masks[*path, jtu.GetAttrKey("weight")] = node.mask()
            node = node.dense()
        nodes.append(node)
    return _paired(treedef.unflatten(nodes), masks)


def _check(caller: str, sparse: Any) -> None:
    if not isinstance(sparse, SparseModel):
        raise ValueError(
            f"{caller}: needs a SparseModel, got {type(sparse).__name__}; "
            "ntt.SparseModel(model, mask) pairs a model with its mask."
        )


def _is_layer(node: Any) -> bool:
    return isinstance(node, eqx.nn.Linear | eqx.nn.Conv)


def _bare(layer: Any) -> bool:
    """Whether a layer does what Equinox's does; a subclass may do something else."""
    return type(layer) in (eqx.nn.Linear, *_CONVOLUTIONS)


def _axes(layer: Any) -> int:
    """The axes of the weight of one such layer; a stack of layers has more."""
    return 2 if isinstance(layer, eqx.nn.Linear) else 2 + layer.num_spatial_dims


def _kept_only(layer: Any, mask: np.ndarray) -> AbstractKeptLayer:
    if isinstance(layer, eqx.nn.Linear):
        return SparseLinear(layer, mask)
    return SparseConv(layer, mask)


def _concrete(mask: Any) -> np.ndarray:
    if isinstance(mask, Tracer):
        raise ValueError(
            "sparse_layers: the shapes of layers follow from the mask, which has no values inside "
            "jit; call it outside."
        )
    return np.asarray(mask)


def _paired(model: PyTree, masks: dict[Any, Any]) -> SparseModel:
    """`model` with the masks at those of these paths that it still has."""
    none = lambda leaf: leaf is None
    named, treedef = jtu.tree_flatten_with_path(model, is_leaf=none)
    return SparseModel(model, treedef.unflatten([masks.get(path) for path, _ in named]))
