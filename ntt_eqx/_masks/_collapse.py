"""Layer collapse: a layer of which nothing is left, so that no signal passes."""

import warnings
from typing import Any

import jax
import jax.tree_util as jtu
from jax.core import Tracer

from .._types import MaskTree


class LayerCollapseWarning(UserWarning):
    """A mask removes every weight of a layer."""


def check_collapse(mask: MaskTree, *, caller: str = "check_collapse") -> tuple[str, ...]:
    """Warn about every layer that a mask empties.

    **Arguments:**

    - `mask`: a mask tree with concrete values.
    - `caller`: the name that the warning starts with.

    **Returns:**

    The paths of the empty layers (`".layers[0].weight"`); an empty tuple when none is.

    **Raises:**

    `ValueError` when the mask is traced: its values are not known yet.
    """
    named = jtu.tree_leaves_with_path(mask)
    if is_traced(mask):
        raise ValueError("check_collapse: the mask is traced; call it outside of jit.")
    with jax.ensure_compile_time_eval():  # the mask may be a constant of a traced function
        kept = jax.device_get([m.any() for _, m in named])
    empty = tuple(
        jtu.keystr(path) for (path, _), any_kept in zip(named, kept, strict=True) if not any_kept
    )
    if empty:
        warnings.warn(
            f"{caller}: layer collapse, no weight is left in {', '.join(empty)}; "
            "use scope='layer', a higher density or an iterative schedule.",
            LayerCollapseWarning,
            stacklevel=3 if caller != "check_collapse" else 2,
        )
    return empty


def is_traced(tree: Any) -> bool:
    """Whether any leaf has no value yet because it is traced by a transformation."""
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree))
