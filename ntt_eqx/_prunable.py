"""Which arrays of a model are prunable, and a warning about those left out."""

import dataclasses
import warnings
from typing import Any

import equinox as eqx
import jax
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from ._kept import is_kept_layer
from ._parameters import parameter_marks
from ._types import Where

_NORMALISATIONS = (
    eqx.nn.BatchNorm,
    eqx.nn.GroupNorm,
    eqx.nn.LayerNorm,
    eqx.nn.RMSNorm,
)


class LeftOutWarning(UserWarning):
    """The default rule excludes arrays of two or more axes from pruning."""


@dataclasses.dataclass(frozen=True)
class Prunable:
    """Which floating-point arrays of a model are pruned; `print` it for a table.

    Attributes:
        pruned: shapes by path of those that pruning may set to zero.
        left_out: shapes of the others that look like weights: two axes or more, no bias, not in a
            normalisation, no positions. Whether they should be pruned is for the user to say.
        kept: shapes of all others, such as biases and norms.
    """

    pruned: dict[str, tuple[int, ...]]
    left_out: dict[str, tuple[int, ...]]
    kept: dict[str, tuple[int, ...]]

    def __str__(self) -> str:
        """A line for each array."""
        parts = (("pruned", self.pruned), ("left out", self.left_out), ("kept dense", self.kept))
        rows = [
            (path, "x".join(map(str, shape)) or "scalar", what)
            for what, named in parts
            for path, shape in named.items()
        ]
        widths = [max((len(row[c]) for row in rows), default=0) for c in range(2)]
        return "\n".join(f"{a.ljust(widths[0])}  {b.rjust(widths[1])}  {c}" for a, b, c in rows)


def prunable_weights(model: PyTree, where: Where | None = None) -> PyTree[bool]:
    """Mark the leaves of `model` that pruning may set to zero.

    By default these are the floating-point leaves called `weight` or `weight_*` of every layer
    but the normalisations (`LayerNorm`, `GroupNorm`, `RMSNorm`, `BatchNorm`): the weights of dense,
    convolutional, embedding and recurrent layers, never a bias. The `values` of sparse layers are
    such weights, too.

    **Arguments:**

    - `model`: any Equinox model.
    - `where`: another rule, `(path, owner, leaf) -> bool`, called for every parameter, that is,
      for every floating-point array that is not part of an `eqx.nn.State`;
      `path` is the key string of the leaf (`".layers[0].weight"`), `owner` the module that holds
      it.

    **Returns:**

    The structure of `model` with a Python `bool` at every leaf.

    **Raises:**

    `ValueError` when no leaf is prunable.
    """
    marks = marks_of(model, where)
    if not any(jax.tree.leaves(marks)):
        raise ValueError(
            f"prunable_weights: no prunable weight in {type(model).__name__}; "
            "pass `where=` to choose leaves."
        )
    return marks


def marks_of(model: PyTree, where: Where | None) -> PyTree[bool]:
    """`prunable_weights` of a model that may have none."""
    rule = _is_layer_weight if where is None else where
    leaves, treedef = jtu.tree_flatten_with_path(model)
    marks = [
        is_parameter and bool(rule(jtu.keystr(path), _owner(model, path), leaf))
        for is_parameter, (path, leaf) in zip(
            jax.tree.leaves(parameter_marks(model)), leaves, strict=True
        )
    ]
    return jtu.tree_unflatten(treedef, marks)


def sorted_arrays(model: PyTree, marks: PyTree) -> Prunable:
    """Sort the floating-point arrays of a model; `marks` says which are pruned."""
    named, _ = jtu.tree_flatten_with_path(model, is_leaf=lambda leaf: leaf is None)
    found: dict[str, dict[str, tuple[int, ...]]] = {"pruned": {}, "left_out": {}, "kept": {}}
    is_none = lambda leaf: leaf is None
    meant = jax.tree.leaves(parameter_marks(model), is_leaf=is_none)
    each = zip(named, meant, jax.tree.leaves(marks, is_leaf=is_none), strict=True)
    for (path, leaf), is_parameter, mark in each:
        if is_parameter:
            kind = "pruned" if mark else "left_out" if _may_be_meant(model, path, leaf) else "kept"
            found[kind][jtu.keystr(path)] = tuple(leaf.shape)
    return Prunable(**found)


def warn_of_left_out(model: PyTree, marks: PyTree) -> None:
    """Warn once for each type of model which arrays the default rule leaves out."""
    names = tuple(sorted_arrays(model, marks).left_out)
    seen = (type(model), names)
    if not names or seen in _SEEN:
        return
    _SEEN.add(seen)
    shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    warnings.warn(
        f"sparsify: {type(model).__name__}: {shown} are left out of pruning, for only arrays that "
        "layers call `weight` are prunable by default. To choose, give ntt_init or sparsify "
        "`where=`, such as `where=lambda path, owner, leaf: leaf.ndim >= 2`; "
        "`describe_prunable(model)` lists all.",
        LeftOutWarning,
        stacklevel=4,
    )


_SEEN: set[Any] = set()


def _may_be_meant(model: PyTree, path: jtu.KeyPath, leaf: Array) -> bool:
    name = jtu.keystr(path).rsplit(".", 1)[-1]
    if sum(size > 1 for size in leaf.shape) < 2 or name.startswith(("bias", "position")):
        return False
    return not isinstance(_owner(model, path), _NORMALISATIONS)


def _is_layer_weight(path: str, owner: Any, leaf: Array) -> bool:
    name = path.rsplit(".", 1)[-1]
    if is_kept_layer(owner):
        return name == "values"
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
