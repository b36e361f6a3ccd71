"""`SparseModel`: an Equinox model together with the boolean mask of its prunable weights."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, PyTree

from ._types import MaskTree, Where

_NORMALISATIONS = (
    eqx.nn.BatchNorm,
    eqx.nn.GroupNorm,
    eqx.nn.LayerNorm,
    eqx.nn.RMSNorm,
)


class SparseModel(eqx.Module):
    """A model whose prunable weights pass through a mask.

    The dense weights are kept under the mask: a pruned weight keeps its value and may come back
    when the mask changes. Zeros are put in by `where`, so a NaN or an infinity under the mask
    never reaches the output.

    Attributes:
        model: any Equinox model written for one sample, with dense weights.
        masks: for every leaf of `model` (a `None` counts as one) a boolean array of its shape if
            it is a prunable weight, else `None`. A flat tuple and not a tree of layers, so that
            what looks for the attributes of layers, as `eqx.nn.inference_mode` does, finds those
            of `model` alone.
    """

    model: Any
    masks: tuple[Any, ...]

    def __init__(self, model: PyTree, mask: MaskTree):
        """Pair `model` with `mask`.

        Raises:
            ValueError: a mask leaf has another shape or dtype than its weight asks for, or the
                two structures differ.
        """
        self.model = model
        self.masks = _mask_of_each_leaf(model, mask)

    @property
    def mask(self) -> MaskTree:
        """The structure of `model`: boolean arrays at prunable weights, `None` elsewhere."""
        return jtu.tree_structure(self.model, is_leaf=_is_none).unflatten(self.masks)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Apply the masked model; arguments are those of `model`."""
        return self.to_dense()(*args, **kwargs)

    def to_dense(self) -> Any:
        """The plain model, with exact zeros where the mask is `False`."""
        return map_masked(_with_zeros, self.model, self.mask)

    def with_mask(self, mask: MaskTree) -> "SparseModel":
        """The same dense weights under another mask."""
        return SparseModel(self.model, mask)

    def density(self) -> Float[Array, ""]:
        """Share of prunable weights that are kept, in `[0, 1]`."""
        masks = jax.tree.leaves(self.masks)
        kept = jnp.stack([jnp.sum(m, dtype=jnp.int32) for m in masks])
        return jnp.sum(kept).astype(jnp.float32) / sum(m.size for m in masks)

    def densities(self) -> dict[str, Float[Array, ""]]:
        """Share of weights kept, for every prunable leaf, keyed by its path."""
        named = jtu.tree_leaves_with_path(self.mask)
        return {jtu.keystr(path): jnp.mean(m, dtype=jnp.float32) for path, m in named}


def prunable_weights(model: PyTree, where: Where | None = None) -> PyTree[bool]:
    """Mark the leaves of `model` that pruning may set to zero.

    By default these are the floating-point leaves called `weight` or `weight_*` of every layer
    but the normalisations (`LayerNorm`, `GroupNorm`, `RMSNorm`, `BatchNorm`): the weights of dense,
    convolutional, embedding and recurrent layers, never a bias.

    **Arguments:**

    - `model`: any Equinox model.
    - `where`: another rule, `(path, owner, leaf) -> bool`, called for every floating-point array;
      `path` is the key string of the leaf (`".layers[0].weight"`), `owner` the module that holds
      it.

    **Returns:**

    The structure of `model` with a Python `bool` at every leaf.

    **Raises:**

    `ValueError` when no leaf is prunable.
    """
    marks = _marks(model, where)
    if not any(jax.tree.leaves(marks)):
        raise ValueError(
            f"prunable_weights: no prunable weight in {type(model).__name__}; "
            "pass `where=` to choose leaves."
        )
    return marks


def prunable_leaves(model: PyTree) -> list[Array]:
    """The weights that `sparsify` would mask; none where a model has none."""
    marked = zip(jax.tree.leaves(_marks(model, None)), jax.tree.leaves(model), strict=True)
    return [leaf for mark, leaf in marked if mark]


def sparsify(model: PyTree, where: Where | None = None) -> SparseModel:
    """Wrap `model` with a mask that keeps every prunable weight.

    **Arguments:**

    - `model`: any Equinox model; a `SparseModel` is returned as it is.
    - `where`: see `prunable_weights`.

    **Returns:**

    A `SparseModel` of density 1, with the weights of `model`.
    """
    if isinstance(model, SparseModel):
        return model
    marks = prunable_weights(model, where)
    mask = jax.tree.map(lambda p, w: jnp.ones(w.shape, bool) if p else None, marks, model)
    return SparseModel(model, mask)


def apply_mask(model: PyTree, mask: MaskTree) -> PyTree:
    """`model` with exact zeros where `mask` is `False`.

    **Arguments:**

    - `model`: any Equinox model.
    - `mask`: the structure of `model`, boolean arrays at masked leaves and `None` elsewhere.

    **Returns:**

    The model; leaves without a mask are untouched.

    **Raises:**

    `ValueError` for a mask that does not fit, as `SparseModel` does.
    """
    return SparseModel(model, mask).to_dense()


def map_masked(
    function: Callable[[Array, Bool[Array, "..."]], Any], model: PyTree, mask: MaskTree
) -> PyTree:
    """Replace every masked leaf `w` of `model` by `function(w, m)`; keep all other leaves."""
    return jax.tree.map(
        lambda m, w: w if m is None else function(w, m), mask, model, is_leaf=_is_none
    )


def masked_weights(sparse: SparseModel) -> list[Array]:
    """The prunable weights with zeros put in, in the order of `jax.tree.leaves(sparse.mask)`."""
    dense = sparse.to_dense()
    only = jax.tree.map(lambda m, w: None if m is None else w, sparse.mask, dense, is_leaf=_is_none)
    return jax.tree.leaves(only)


def _marks(model: PyTree, where: Where | None) -> PyTree[bool]:
    rule = _is_layer_weight if where is None else where
    leaves, treedef = jtu.tree_flatten_with_path(model)
    marks = [
        eqx.is_inexact_array(leaf) and bool(rule(jtu.keystr(path), _owner(model, path), leaf))
        for path, leaf in leaves
    ]
    return jtu.tree_unflatten(treedef, marks)


def _with_zeros(weight: Array, mask: Bool[Array, "..."]) -> Array:
    return jnp.where(mask, weight, jnp.zeros_like(weight))


def _is_layer_weight(path: str, owner: Any, leaf: Array) -> bool:
    name = path.rsplit(".", 1)[-1]
    named = name == "weight" or name.startswith("weight_")
    return named and leaf.ndim >= 2 and not isinstance(owner, _NORMALISATIONS)


def _owner(model: PyTree, path: jtu.KeyPath) -> Any:
    node = model
    for key in path[:-1]:
        if isinstance(key, jtu.GetAttrKey):
            node = getattr(node, key.name)
        elif isinstance(key, jtu.SequenceKey):
            node = node[key.idx]
        elif isinstance(key, jtu.DictKey):
            node = node[key.key]
        else:  # a node registered without keys: its children have no attribute names
            return None
    return node


def _mask_of_each_leaf(model: PyTree, mask: MaskTree) -> tuple[Any, ...]:
    named, treedef = jtu.tree_flatten_with_path(mask, is_leaf=_is_none)
    try:
        parts = treedef.flatten_up_to(model)
    except ValueError as error:
        raise ValueError(
            f"SparseModel: the mask does not have the structure of {type(model).__name__}: {error}"
        ) from error
    masks: list[Any] = []
    for (path, m), part in zip(named, parts, strict=True):
        leaves = jtu.tree_leaves(part, is_leaf=_is_none)  # None in a mask may stand for a layer
        if m is not None:
            _check_mask(jtu.keystr(path), m, leaves)
        masks.extend([m] * len(leaves))
    return tuple(masks)


def _check_mask(name: str, m: Any, leaves: list[Any]) -> None:
    if len(leaves) != 1:
        raise ValueError(
            f"SparseModel: mask{name} must be None, for there is no weight in the model but "
            f"{len(leaves)} leaves."
        )
    if not eqx.is_array_like(m) and not hasattr(m, "dtype"):
        return  # a placeholder of a tree transformation
    if not hasattr(m, "dtype") or m.dtype != bool:
        raise ValueError(f"SparseModel: mask{name} must be a boolean array, got {m!r}.")
    (w,) = leaves
    if hasattr(w, "shape") and m.shape != w.shape:
        raise ValueError(
            f"SparseModel: mask{name} has shape {m.shape} but the weight has shape {w.shape}."
        )


def _is_none(leaf: Any) -> bool:
    return leaf is None
