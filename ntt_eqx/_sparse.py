"""`SparseModel`: an Equinox model together with the boolean mask of its prunable weights."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ._distribute import is_sharded, left_to_xla
from ._kept import check_masked_form, is_kept_layer, kept_layers
from ._prunable import (
    _NORMALISATIONS as _NORMALISATIONS,
    Prunable,
    marks_of,
    prunable_weights as prunable_weights,
    sorted_arrays,
    warn_of_left_out,
)
from ._types import MaskTree, PyTree, Where
from .kernels import MaskBits


class SparseModel(eqx.Module):
    """A model whose prunable weights pass through a mask.

    The dense weights are kept under the mask: a pruned weight keeps its value and may come back
    when the mask changes. `where` writes the zeros, so a NaN or an infinity under the mask never
    reaches the output.

    Attributes:
        masks: one entry for each leaf of `model` (`None` counts as a leaf): a boolean array of the
            leaf's shape if it is a prunable weight, else `None`. A flat tuple, because functions
            such as `eqx.nn.inference_mode` search a tree for the attributes of layers, and must
            find those of `model` alone.
        model: any Equinox model written for one sample, with dense weights.
    """

    # The masks come first, so that the leaves of a stored SparseModel begin with booleans and those
    # of a plain model do not. Reading one file into the other kind of model then fails, instead of
    # bringing pruned weights back.
    masks: tuple[Any, ...]
    model: Any

    def __init__(self, model: PyTree, mask: MaskTree):
        """Pair `model` with `mask`.

        Raises:
            ValueError: a mask has the wrong shape or dtype, no weight has a mask, or the
                structures of `model` and `mask` differ.
        """
        _check_pair(model, mask)
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
        """Return the plain model, with exact zeros where the mask is `False`."""
        return map_masked(where_kept, self.model, self.mask)

    def with_mask(self, mask: MaskTree) -> "SparseModel":
        """The same dense weights under another mask."""
        return SparseModel(self.model, mask)

    def density(self) -> Float[Array, ""]:
        """Share of prunable weights that are kept, in `[0, 1]`."""
        kept, size = kept_of(self)
        return kept.astype(jnp.float32) / size

    def densities(self) -> dict[str, Float[Array, ""]]:
        """Share of weights kept, for every prunable leaf, keyed by its path."""
        found: dict[str, Float[Array, ""]] = {}
        masks = iter(self.masks)
        none_or_layer = lambda node: node is None or is_kept_layer(node)
        for path, node in jtu.tree_leaves_with_path(self.model, is_leaf=none_or_layer):
            here = [next(masks) for _ in jax.tree.leaves(node, is_leaf=_is_none)]
            if is_kept_layer(node):
                share = node.values.size / math.prod(node.weight_shape)
                found[f"{jtu.keystr(path)}.values"] = jnp.asarray(share, jnp.float32)
            elif here[0] is not None:
                found[jtu.keystr(path)] = jnp.mean(here[0], dtype=jnp.float32)
        return found


def count_kept(mask: Bool[Array, "..."]) -> Int[Array, ""]:
    """How many weights a mask keeps, int32."""
    # The sum over at most 255 equal rows fits a byte, and takes a third of the time on a CPU.
    rows = next(n for n in range(255, 0, -1) if mask.size % n == 0)
    in_bytes = lambda mask: jnp.sum(mask.reshape(rows, mask.size // rows), axis=0, dtype=jnp.uint8)
    return left_to_xla(lambda mask: jnp.sum(in_bytes(mask), dtype=jnp.int32), mask)


def count_kept_in_all(masks: Sequence[Bool[Array, "..."]]) -> Int[Array, ""]:
    """How many weights masks keep together, int32."""
    if not masks or any(map(is_sharded, masks)):
        return sum(map(count_kept, masks), start=jnp.zeros((), jnp.int32))
    return _count_of_bits(list(masks))


@jax.jit
def _count_of_bits(masks: list[Bool[Array, "..."]]) -> Int[Array, ""]:
    # One function for XLA to compile instead of three a mask; in a step of a transfer the search
    # for a mask's entries has these bits already.
    return MaskBits.of([m.reshape(1, m.size) for m in masks]).count


def prunable_leaves(model: PyTree) -> list[Array]:
    """The weights that `sparsify` would mask; none where a model has none."""
    marked = zip(jax.tree.leaves(marks_of(model, None)), jax.tree.leaves(model), strict=True)
    return [leaf for mark, leaf in marked if mark]


def sparsify(model: PyTree, where: Where | None = None) -> SparseModel:
    """Wrap `model` with a mask that keeps every prunable weight.

    **Arguments:**

    - `model`: any Equinox model; a `SparseModel` is returned as it is.
    - `where`: see `prunable_weights`.

    **Returns:**

    A `SparseModel` of density 1, with the weights of `model`.

    **Warns:**

    `LeftOutWarning`, once for each type of model, if the default rule leaves out arrays that look
    like weights: see `describe_prunable`.
    """
    check_masked_form("sparsify", model)
    if isinstance(model, SparseModel):
        return model
    marks = prunable_weights(model, where)
    if where is None:
        warn_of_left_out(model, marks)
    mask = jax.tree.map(lambda p, w: jnp.ones(w.shape, bool) if p else None, marks, model)
    return SparseModel(model, mask)


def describe_prunable(model: PyTree, where: Where | None = None) -> Prunable:
    """Which arrays of a model are pruned and which are not.

    **Arguments:**

    - `model`: any Equinox model; for a `SparseModel`, its mask decides what is pruned.
    - `where`: the choice; see `prunable_weights`.

    **Returns:**

    A `Prunable`; `print(describe_prunable(model))` shows its table.

    **Raises:**

    `ValueError` when nothing is pruned.
    """
    if not isinstance(model, SparseModel):
        return sorted_arrays(model, prunable_weights(model, where))
    marks = jax.tree.map(lambda m: m is not None, model.mask, is_leaf=_is_none)
    return sorted_arrays(model.model, marks)


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


def kept_of(sparse: SparseModel) -> tuple[Int[Array, ""], int]:
    """How many prunable weights are kept, and how many there are."""
    masks, layers = jax.tree.leaves(sparse.masks), kept_layers(sparse.model).values()
    stored = sum(layer.values.size for layer in layers)
    size = sum(m.size for m in masks) + sum(math.prod(la.weight_shape) for la in layers)
    return count_kept_in_all(masks) + np.int32(stored), size


def map_masked(
    function: Callable[[Array, Bool[Array, "..."]], Any], model: PyTree, mask: MaskTree
) -> PyTree:
    """Replace every masked leaf `w` of `model` by `function(w, m)`; keep all other leaves."""
    return jax.tree.map(
        lambda m, w: w if m is None else function(w, m), mask, model, is_leaf=_is_none
    )


def masked_weights(sparse: SparseModel, *, masked: bool = False) -> list[Array]:
    """The masked prunable weights, in the order of `jax.tree.leaves(sparse.mask)`.

    **Arguments:**

    - `masked`: the model has zeros under the mask already.
    """
    dense = sparse.model if masked else sparse.to_dense()
    only = jax.tree.map(lambda m, w: None if m is None else w, sparse.mask, dense, is_leaf=_is_none)
    return jax.tree.leaves(only)


def kept_weights(sparse: SparseModel, *, masked: bool = False) -> list[Array]:
    """All prunable weights, zeros under the mask; of layers that store kept ones alone, these.

    **Arguments:**

    - `masked`: the model has zeros under the mask already.
    """
    named = {jtu.keystr(path) for path, _ in jtu.tree_leaves_with_path(sparse.mask)}
    layers = kept_layers(sparse.model).items()
    values = [layer.values for name, layer in layers if f"{name}.values" not in named]
    return masked_weights(sparse, masked=masked) + values


def where_kept(weight: Array | None, mask: Bool[Array, "..."]) -> Array | None:
    """A weight with zeros where it is pruned; `None` stands for itself."""
    return None if weight is None else jnp.where(mask, weight, jnp.zeros_like(weight))


def _check_pair(model: PyTree, mask: Any) -> None:
    if isinstance(model, SparseModel):
        raise ValueError(
            "SparseModel: the model is a SparseModel already; sparse.with_mask(mask) gives it "
            "another mask."
        )
    one = jtu.treedef_is_leaf(jtu.tree_structure(mask, is_leaf=_is_none))
    if one and not jtu.treedef_is_leaf(jtu.tree_structure(model, is_leaf=_is_none)):
        raise ValueError(
            "SparseModel: the mask must be a tree like the model's, with a boolean array at each "
            f"prunable weight, as make_mask makes, got {mask!r:.60}; prune(model, score, density) "
            "takes a density."
        )


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
