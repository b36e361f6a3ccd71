"""The pruning methods by name, and the sparse network that each starts training from."""

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from .. import _scores
from .._masks import NM, LayerCollapseWarning, make_mask, reinitialise, shuffle_mask
from .._scores import AbstractLabelFreeScore, AbstractSupervisedScore, prune
from .._sparse import SparseModel, sparsify
from .._transfer import NTTConfig, ntt_loss
from ._errors import ExperimentError
from .cells import Cell
from .settings import METHODS, MaskSettings, parse_pattern

_RAY = (0.25, 0.5, 0.75, 1.0)
_SCORES: dict[str, Callable[[PRNGKeyArray], AbstractLabelFreeScore | AbstractSupervisedScore]] = {
    "random": lambda key: _scores.Random(key),
    "magnitude": lambda key: _scores.Magnitude(),
    "snip": lambda key: _scores.Snip(),
    "logit-snip": lambda key: _scores.LogitSnip(),
    "grasp": lambda key: _scores.GraSP(),
    "synflow": lambda key: _scores.SynFlow(),
    "ntk-sap": lambda key: _scores.NTKSAP(key),
    "px": lambda key: _scores.PathExclusion(),
}
SUPERVISED = ("snip", "grasp")
"""Methods whose scores look at labels."""


def pruned_at_start(
    cell: Cell, teacher: Any, examples: tuple[Array, Array] | None, key: PRNGKeyArray
) -> SparseModel:
    """The dense initialisation `teacher` with the mask that the cell's score gives it.

    For NTT this is the score of its first mask, for any other method its own.

    **Arguments:**

    - `cell`: which method, scope, density and kind of mask.
    - `teacher`: the dense network at its initialisation; its weights are kept.
    - `examples`: inputs `[batch, ...]` and labels `[batch]` for methods that look at data.
    - `key`: for methods that draw.

    **Raises:**

    `ExperimentError`: for scores that are not finite, or a mask that does not fit the network.

    **Warns:**

    `LayerCollapseWarning` when a layer is left empty.
    """
    sparse = sparsify(teacher)
    if cell.method == "dense":
        return sparse
    name = cell.method if cell.transfer is None else cell.transfer.initial_mask
    score = _ntt_gradient(cell, teacher) if name == "ntt-gradient" else _SCORES[name](key)
    inputs = examples
    if examples is not None and isinstance(score, AbstractLabelFreeScore):
        inputs = examples[0]
    if name == "ntt-gradient" and inputs is not None:
        inputs = inputs[: len(inputs) // 2 * 2]
    mask = cell.mask or MaskSettings()
    scoring = cell.scoring
    try:
        return prune(
            sparse,
            score,
            _density(cell, sparse.mask),
            inputs,
            **_shape_options(cell),
            steps=(scoring.iterations or 1) if scoring is not None else 1,
            schedule=scoring.schedule if scoring is not None else "exponential",
            invert=mask.ablation == "invert",
        )
    except (ValueError, RuntimeError) as error:
        raise ExperimentError(f"{cell.name}: {_plain(error)}") from error


def ablated(cell: Cell, sparse: SparseModel, key: PRNGKeyArray) -> SparseModel:
    """`sparse` with its mask shuffled or its weights drawn again, if the cell asks for it."""
    ablation = cell.mask.ablation if cell.mask is not None else None
    if ablation == "shuffle":
        return sparse.with_mask(shuffle_mask(sparse.mask, key))
    return reinitialise(sparse, key) if ablation == "reinitialise" else sparse


def check_fits(cell: Cell, teacher: Any) -> None:
    """Check that the mask which `cell` asks for can be made, without computing anything.

    **Raises:**

    `ExperimentError`: for a density that leaves a layer empty, or a pattern that does not fit.
    """
    if cell.method == "dense":
        return
    ones = sparsify(teacher).mask
    shapes = lambda dtype: jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, dtype), ones)
    make = functools.partial(make_mask, density=_density(cell, ones), **_shape_options(cell))
    try:
        jax.eval_shape(make, shapes(np.float32))
    except ValueError as error:
        raise ExperimentError(f"{cell.name}, {cell.model}: {_plain(error)}") from error


def available_methods() -> list[str]:
    """The methods that there are."""
    return list(METHODS)


def kept_weights(sparse: SparseModel) -> dict[str, float]:
    """Share of weights kept in every prunable layer, by its path."""
    found = jax.device_get(sparse.densities())
    return {name.strip("."): float(share) for name, share in found.items()}


@contextmanager
def collapse_told(say: Callable[[str], None], title: str) -> Iterator[None]:
    """Tell `LayerCollapseWarning`s of the body as one plain line each; leave others as they are."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", LayerCollapseWarning)
        yield
    told = set()
    for warning in caught:
        if not issubclass(warning.category, LayerCollapseWarning):
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
            continue
        text = str(warning.message).partition(": ")[2]
        if text not in told:
            say(f"{title}: {text}")
        told.add(text)


def _ntt_gradient(cell: Cell, teacher: Any) -> AbstractLabelFreeScore:
    config = NTTConfig(density=cell.density, l2_weight=0.0)
    return _scores.LossGradient(lambda student, x: ntt_loss(student, teacher, x, config)[0], _RAY)


def _density(cell: Cell, mask: Any) -> float | Mapping[str, float]:
    """The density; for N:M one for each layer, 1 where the inputs do not divide into groups."""
    pattern = parse_pattern(cell.mask.pattern) if cell.mask is not None else None
    if not isinstance(pattern, NM):
        return cell.density
    whole = lambda m: m.ndim < 2 or m.shape[1] % pattern.m
    named = jtu.tree_leaves_with_path(mask)
    return {jtu.keystr(path): 1.0 if whole(m) else cell.density for path, m in named}


def _shape_options(cell: Cell) -> dict[str, Any]:
    mask = cell.mask or MaskSettings()
    return {
        "scope": cell.scope or "layer",
        "allocation": mask.allocation if mask.allocation != "uniform" else None,
        "pattern": parse_pattern(mask.pattern),
    }


def _plain(error: Exception) -> str:
    """The first line of a message, without the name of the function that it starts with."""
    line = str(error).strip().split("\n")[0]
    return line.removeprefix("make_mask: ").removeprefix("prune: ")
