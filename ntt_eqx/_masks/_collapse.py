"""Layer collapse: a layer without weights, or an output without a path from the input."""

import warnings
from typing import Any

import jax
import jax.tree_util as jtu
from jax.core import Tracer
from jaxtyping import Array, Bool, Shaped

from .._checks import sample_of
from .._sparse import SparseModel
from .._types import MaskTree, at_trace_time
from ._reach import cut_outputs


class LayerCollapseWarning(UserWarning):
    """A mask removes every weight of a layer, or every path from the input to an output."""


def check_collapse(
    mask: MaskTree | SparseModel,
    x: Shaped[Array, "batch ..."] | Any = None,
    *,
    caller: str = "check_collapse",
) -> tuple[str, ...]:
    """Warn about every layer that a mask empties and every output that it cuts off.

    An output is cut off when no path of kept weights leads to it from the input: then it is the
    same for all inputs, and a classifier never tells its class by them. Paths are followed through
    the model itself, with positive numbers in place of the kept weights, so that neither their
    values nor biases matter; an output that does not depend on the input without a mask, too, is
    none.

    **Arguments:**

    - `mask`: a mask tree with concrete values, or a `SparseModel`.
    - `x`: for outputs, with a `SparseModel`: inputs `[batch, ...]`, of which the shape is looked
      at. Inputs of integers, such as tokens, say nothing of paths.
    - `caller`: the name that the warning starts with.

    **Returns:**

    The paths of the empty layers (`".layers[0].weight"`) and, where no layer is empty, the outputs
    that are cut off (`"output 3"`); an empty tuple when there are none.

    **Raises:**

    `ValueError` when the mask is traced, for its values are not known yet, or is none.
    """
    sparse = mask if isinstance(mask, SparseModel) else None
    mask = mask.mask if isinstance(mask, SparseModel) else mask
    if is_traced(mask):
        raise ValueError("check_collapse: the mask is traced; call it outside of jit.")
    if x is not None and sparse is None:
        raise ValueError("check_collapse: give a SparseModel to look at its outputs, not a mask.")
    named = check_mask_tree("check_collapse", mask)
    with at_trace_time():  # the mask may be a constant of a traced function
        kept = jax.device_get(_keep_any(list(named.values())))
    empty = tuple(name for name, any_kept in zip(named, kept, strict=True) if not any_kept)
    stacklevel = 3 if caller != "check_collapse" else 2
    if empty:
        warnings.warn(
            f"{caller}: layer collapse, no weight is left in {', '.join(empty)}; "
            "use scope='layer', a higher density or an iterative schedule.",
            LayerCollapseWarning,
            stacklevel=stacklevel,
        )
        return empty
    if sparse is None or x is None or len(x.shape) < 1:
        return ()
    cut = cut_outputs(sparse, sample_of(x))
    if cut:
        outputs = "output " if len(cut) == 1 else "outputs "
        outputs += ", ".join(map(str, cut[:10])) + (", ..." if len(cut) > 10 else "")
        warnings.warn(
            f"{caller}: no path of kept weights leads from the input to {outputs}: a classifier "
            "cannot tell such a class by its input; use a higher density, "
            "allocation='erk' or a score of paths, such as SynFlow in many steps.",
            LayerCollapseWarning,
            stacklevel=stacklevel,
        )
    return tuple(f"output {k}" for k in cut)


@jax.jit
def _keep_any(masks: list[Any]) -> list[Bool[Array, ""]]:
    return [m.any() for m in masks]


def check_mask_tree(caller: str, mask: Any) -> dict[str, Array]:
    """The boolean arrays of a mask by their paths.

    **Raises:**

    `ValueError` when there are none, or something else.
    """
    if isinstance(mask, SparseModel):
        raise ValueError(f"{caller}: takes a mask, got a SparseModel; give its `.mask`.")
    named = {jtu.keystr(path): leaf for path, leaf in jtu.tree_leaves_with_path(mask)}
    for name, leaf in named.items():
        if str(getattr(leaf, "dtype", None)) != "bool":
            got = getattr(leaf, "dtype", type(leaf).__name__)
            raise ValueError(
                f"{caller}: mask{name} must be a boolean array, got {got}; make_mask makes masks, "
                "and a SparseModel has one in `.mask`."
            )
    if not named:
        raise ValueError(f"{caller}: the mask has no arrays, got {mask!r:.80}.")
    return named


def is_traced(tree: Any) -> bool:
    """Whether any leaf is a tracer, without a value."""
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree))
