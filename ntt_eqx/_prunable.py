"""Which arrays of a model are prunable, and a warning about those left out."""

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.tree_util as jtu
from jaxtyping import Array

from ._kept import is_kept_layer
from ._parameters import is_nnx_variable, parameter_marks, parameters
from ._types import PyTree, Where

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


def prunable_weights(model: PyTree, where: Where | None = None) -> PyTree:
    """Mark the leaves of `model` that pruning may set to zero.

    By default these are, in Equinox modules, the floating-point leaves called `weight` or
    `weight_*` of every layer but the normalisations (`LayerNorm`, `GroupNorm`, `RMSNorm`,
    `BatchNorm`): the weights of dense, convolutional, embedding and recurrent layers, never a bias.
    The `values` of sparse layers are such weights, too.

    A model that is no Equinox module (`eqx.Partial(f, params)` with dicts, lists and tuples of
    arrays, a module of Flax NNX) says less. There, they are the arrays with two axes or more that
    are longer than 1, a `kernel`, `w` or `embedding` among them, unless they are called `bias*`,
    `scale*`, `offset*` or `pos*`.

    **Arguments:**

    - `model`: any Equinox model, or other callable PyTree.
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
        what = f"prunable_weights: no prunable weight in {type(model).__name__}; "
        if jax.tree.leaves(parameters(model)):
            raise ValueError(f"{what}pass `where=` to choose leaves.")
        raise ValueError(
            f"{what}it has no parameters at all. Of a function f(params, x) make a model by "
            "eqx.Partial(f, params)."
        )
    return marks


def marks_of(model: PyTree, where: Where | None) -> PyTree:
    """`prunable_weights` of a model that may have none."""

    def rule(path: jtu.KeyPath, leaf: Array) -> bool:
        if where is None:
            return _is_weight(model, path, leaf)
        return bool(where(jtu.keystr(path), _owner(model, path), leaf))

    leaves, treedef = jtu.tree_flatten_with_path(model)
    marks = [
        is_parameter and rule(path, leaf)
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
    owner, name = _last(model, path)
    if not _is_wide(leaf) or name.startswith(("bias", "position")):
        return False
    return not isinstance(owner, _NORMALISATIONS)


def _is_weight(model: PyTree, path: jtu.KeyPath, leaf: Array) -> bool:
    """The default rule."""
    owner, name = _last(model, path)
    if not is_bare(model, path):
        return not _is_container(owner) and _is_layer_weight(name, owner, leaf)
    return _is_bare_weight(name, leaf)


def is_bare(model: PyTree, path: jtu.KeyPath) -> bool:
    """Whether no Equinox module says by a name what the leaf at `path` is."""
    nodes = _along(model, path)
    holder = next((node for node in reversed(nodes) if not _is_container(node)), None)
    return not isinstance(holder, eqx.Module) or isinstance(holder, eqx.Partial)


def _is_layer_weight(name: str, owner: Any, leaf: Array) -> bool:
    if is_kept_layer(owner):
        return name == "values"
    named = name == "weight" or name.startswith("weight_")
    return named and leaf.ndim >= 2 and leaf.size > 0 and not isinstance(owner, _NORMALISATIONS)


def _is_bare_weight(name: str, leaf: Array) -> bool:
    # The keys of a state_dict have dots: "features.0.bias".
    last = name.rsplit(".", 1)[-1]
    return _is_wide(leaf) and not last.startswith(("bias", "scale", "offset", "pos"))


def _is_wide(leaf: Array) -> bool:
    return sum(size > 1 for size in leaf.shape) >= 2


def _is_container(node: Any) -> bool:
    return isinstance(node, Mapping | list | tuple)


def _last(model: PyTree, path: jtu.KeyPath) -> tuple[Any, str]:
    """Who holds a leaf, and by which name."""
    nodes = _along(model, path)
    if nodes and is_nnx_variable(nodes[-1]):  # whose one leaf is called `value`
        nodes, path = nodes[:-1], path[:-1]
    return (nodes[-1], jtu.keystr(path[-1:], simple=True)) if nodes else (model, "")


def _owner(model: PyTree, path: jtu.KeyPath) -> Any:
    return _along(model, path)[-1] if path else model


def _along(model: PyTree, path: jtu.KeyPath) -> list[Any]:
    """The nodes that a path leads through."""
    nodes = [model][: len(path)]
    for key in path[:-1]:
        nodes.append(_child(nodes[-1], key))
    return nodes


def _child(node: Any, key: Any) -> Any:
    if isinstance(key, jtu.GetAttrKey):
        return getattr(node, key.name, None)
    if isinstance(key, jtu.SequenceKey | jtu.DictKey) and node is not None:
        return node[key.idx if isinstance(key, jtu.SequenceKey) else key.key]
    return None  # a node registered without keys: its children have no attribute names
