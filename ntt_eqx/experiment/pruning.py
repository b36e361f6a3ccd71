"""The sparse network that a cell starts from: its score, its mask, and their checks."""

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from .. import (
    NM,
    LayerCollapseWarning,
    SparseModel,
    make_mask,
    prune,
    reinitialise,
    scores,
    shuffle_mask,
    sparsify,
)
from ._errors import ExperimentError
from .cells import Cell
from .methods import METHODS
from .settings import MaskSettings, parse_pattern


def pruned_at_start(
    cell: Cell, teacher: Any, examples: tuple[Array, Array] | None, key: PRNGKeyArray
) -> SparseModel:
    """The dense initialisation `teacher` with the mask that the cell's score gives it.

    For NTT this is the score of its first mask, for any other method its own.

    Warns `LayerCollapseWarning` when a layer is left empty. Raises `ExperimentError` for scores
    that are not finite, or a mask that does not fit the network.
    """
    sparse, scoring = sparsify(teacher), cell.scoring
    record = METHODS[cell.method if cell.transfer is None else cell.transfer.initial_mask]
    if record.score is None:
        return sparse
    score = record.score(key, teacher, cell.density)
    inputs: Any = examples
    if examples is not None and not record.labels:
        inputs = examples[0]
        if isinstance(score, scores.LossGradient):  # cuts its batch in two halves
            inputs = inputs[: len(inputs) // 2 * 2]
    try:
        return prune(
            sparse,
            score,
            _density(cell, sparse.mask),
            inputs,
            **_shape_options(cell),
            steps=(scoring.iterations or 1) if scoring is not None else 1,
            schedule=scoring.schedule if scoring is not None else "exponential",
            invert=cell.mask is not None and cell.mask.ablation == "invert",
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

    Raises `ExperimentError` for a density that leaves a layer empty, or a pattern that does not
    fit.
    """
    if cell.method == "dense":
        return
    ones = sparsify(teacher).mask
    shapes = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, np.float32), ones)
    make = functools.partial(make_mask, density=_density(cell, ones), **_shape_options(cell))
    try:
        jax.eval_shape(make, shapes)
    except ValueError as error:
        raise ExperimentError(f"{cell.name}, {cell.model}: {_plain(error)}") from error


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
