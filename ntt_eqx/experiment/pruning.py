"""The sparse network that a cell starts from: its score, its mask, and their checks."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from .. import (
    NM,
    AbstractPattern,
    DynamicSparsity,
    GradualDensity,
    LayerCollapseWarning,
    SparseModel,
    Sparsity,
    Unstructured,
    make_mask,
    prune,
    reinitialise,
    scores,
    shuffle_mask,
    sparsify,
)
from ._errors import ExperimentError, NetworkFailed
from .cells import Cell
from .methods import METHODS
from .own import find_method, place_of
from .settings import MaskSettings, parse_pattern

# The library's advice, in the words of the command.
_OPTIONS = {"allocation='erk'": "METHOD@erk", "scope='layer'": "METHOD@layer"}


def pruned_at_start(
    cell: Cell,
    teacher: Any,
    shape: tuple[int, ...],
    examples: tuple[Array, Array] | None,
    key: PRNGKeyArray,
) -> SparseModel:
    """The dense initialisation `teacher` with the mask that the cell's score gives it.

    For NTT this is the score of its first mask, for any other method its own.

    Warns `LayerCollapseWarning` when a layer is left empty. Raises `NetworkFailed` for scores that
    are not finite, a mask that does not fit the network, and whatever code of a user's raises.
    """
    with _as_failure(cell):
        sparse, scoring = sparsify(teacher), cell.scoring
        record = find_method(cell.method if cell.transfer is None else cell.transfer.initial_mask)
        if record.find is not None:
            found = record.find(teacher, examples, cell.density, key)
            return _checked(cell, found, sparse)
        if record.score is None:  # training drops its first weights
            return sparse.with_mask(sparsity_of(cell, teacher, shape).widest(sparse.mask))
        score = record.score(key, teacher, cell.density)
        inputs: Any = examples
        if examples is not None and not record.labels:
            inputs = examples[0]
            if isinstance(score, scores.LossGradient):  # cuts its batch in two halves
                inputs = inputs[: len(inputs) // 2 * 2]
        with warnings.catch_warnings():
            # lost classes are told when the mask is final: at the start of training
            warnings.filterwarnings("ignore", "prune: no path", LayerCollapseWarning)
            return prune(
                sparse,
                score,
                sparsity_of(cell, teacher, shape),
                inputs,
                steps=(scoring.iterations or 1) if scoring is not None else 1,
                schedule=scoring.schedule if scoring is not None else "exponential",
                invert=cell.mask is not None and cell.mask.ablation == "invert",
            )


def _checked(cell: Cell, found: Any, dense: SparseModel) -> SparseModel:
    """What a user's own method returned, if it is the network that was asked for.

    More weights than were asked for would be an unfair comparison, so they are refused.
    """
    like = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    if not isinstance(found, SparseModel) or like(found.mask) != like(dense.mask):
        what = "a network of other layers" if isinstance(found, SparseModel) else "no SparseModel"
        raise ValueError(
            f"the method returned {what}; it must return the dense network that it was given with "
            "a mask, as ntt.prune does."
        )
    masks = jax.tree.leaves(found.mask)
    kept, size = sum(int(m.sum()) for m in masks), sum(m.size for m in masks)
    if kept > cell.density * size + len(masks):  # each layer may round up
        raise ValueError(
            f"the method keeps {kept} of {size} weights, more than the share {cell.density:g} that "
            "was asked for."
        )
    return found


def sparsity_of(cell: Cell, teacher: Any, shape: tuple[int, ...]) -> Sparsity:
    """How many weights the cell keeps, where, and in which pattern.

    An N:M pattern has a density for each layer: 1 where the inputs do not divide into groups.
    Channels are found on the program of the network for one sample of this `shape`.
    """
    mask, density = cell.mask or MaskSettings(), cell.density
    pattern = parse_pattern(mask.pattern)
    if pattern is not None and not isinstance(pattern, AbstractPattern):
        pattern = pattern(teacher, np.zeros((1, *shape), np.float32), key=cell.key(4))
    if isinstance(pattern, NM):
        named = jtu.tree_leaves_with_path(sparsify(teacher).mask)
        whole = lambda m: m.ndim < 2 or m.shape[1] % pattern.m
        density = {jtu.keystr(path): 1.0 if whole(m) else cell.density for path, m in named}
    allocation = None if mask.allocation == "uniform" else mask.allocation
    return Sparsity(density, cell.scope or "layer", allocation, pattern)


def transfer_sparsity(cell: Cell, teacher: Any, shape: tuple[int, ...], steps: int) -> Sparsity:
    """The sparsity of the cell in a transfer of `steps` steps, whose density may fall.

    Raises `ValueError` for a pattern whose density no schedule can change.
    """
    sparsity = sparsity_of(cell, teacher, shape)
    share = 0.0 if cell.transfer is None else cell.transfer.gradual
    if not share:
        return sparsity
    _check_falls("transfer.gradual", cell, sparsity)
    schedule = GradualDensity(cell.density, end=max(1, round(share * steps)))
    return Sparsity(schedule, sparsity.scope, sparsity.allocation, sparsity.pattern)


def dynamic_of(
    cell: Cell, teacher: Any, shape: tuple[int, ...], steps: int
) -> DynamicSparsity | None:
    """How the cell's mask changes in its training of `steps` steps; `None` if it does not.

    Raises `ValueError` for a pattern whose density no schedule can change.
    """
    record = find_method(cell.method)
    if record.dynamic is None or cell.start is not None:  # a mask from a file stays
        return None
    sparsity = sparsity_of(cell, teacher, shape)
    if record.score is None:
        _check_falls(record.label, cell, sparsity)
    return record.dynamic(sparsity, steps, cell.seed)


def _check_falls(who: str, cell: Cell, sparsity: Sparsity) -> None:
    """Raise `ValueError` for a pattern whose density no schedule can change."""
    if isinstance(sparsity.pattern, NM):
        pattern = cell.mask.pattern if cell.mask is not None else None
        raise ValueError(f"{who} lowers the density, which the pattern {pattern} fixes.")


def ablated(
    cell: Cell, teacher: Any, shape: tuple[int, ...], sparse: SparseModel, key: PRNGKeyArray
) -> SparseModel:
    """`sparse` with its mask shuffled or its weights drawn again, if the cell asks for it.

    `teacher` is the dense initialisation, whose weights a transfer has changed. A shuffled mask
    keeps its pattern. Raises `NetworkFailed` for a mask of a pattern that leaves a layer empty.
    """
    ablation = cell.mask.ablation if cell.mask is not None else None
    if ablation in ("shuffle", "shares"):
        weights = sparse if ablation == "shuffle" else sparsify(teacher)
        sparsity = sparsity_of(cell, teacher, shape)
        if isinstance(sparsity.pattern, Unstructured):
            return weights.with_mask(shuffle_mask(sparse.mask, key))
        with _as_failure(cell):
            counts = sparsity.of_mask(sparse.mask)
        return weights.with_mask(counts.mask(scores.Random(key)(sparsify(teacher))))
    if ablation == "initial":
        return sparsify(teacher).with_mask(sparse.mask)
    return reinitialise(sparse, key) if ablation == "reinitialise" else sparse


def check_fits(cell: Cell, teacher: Any, shape: tuple[int, ...]) -> None:
    """Check that the mask which `cell` asks for can be made, without computing anything.

    Raises `ExperimentError` for a density that empties a layer, or a pattern that does not fit.
    """
    if cell.method == "dense" or find_method(cell.method).find is not None:
        return
    ones = sparsify(teacher).mask
    shapes = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, np.float32), ones)
    try:
        sparsity = sparsity_of(cell, teacher, shape)
        jax.eval_shape(lambda scores: make_mask(scores, sparsity), shapes)
        transfer_sparsity(cell, teacher, shape, steps=100)
        dynamic = dynamic_of(cell, teacher, shape, steps=100)
        if dynamic is not None:
            dynamic.refresh.check_pattern(dynamic.sparsity, shapes)
        if dynamic is not None and cell.training is not None:
            cell.training.recipe().config(dynamic)
    except ValueError as error:
        raise ExperimentError(f"{cell.name}, {cell.model}: {_plain(error)}") from error


@contextmanager
def collapse_shown(say: Callable[[str], None], title: str) -> Iterator[None]:
    """Tell `LayerCollapseWarning`s of the body as one plain line each; leave others as they are."""
    told, usual = set(), warnings.showwarning

    def show(message: Any, category: type[Warning], *place: Any, **more: Any) -> None:
        text = str(message).partition(": ")[2]
        for word, option in _OPTIONS.items():
            text = text.replace(word, option)
        if not issubclass(category, LayerCollapseWarning):
            usual(message, category, *place, **more)
        elif text not in told:
            say(f"{title}: {text}")
            told.add(text)

    with warnings.catch_warnings():
        warnings.simplefilter("always", LayerCollapseWarning)
        warnings.showwarning = show
        yield


@contextmanager
def _as_failure(cell: Cell) -> Iterator[None]:
    """Raise what the body raises as the failure of the cell; other faults of the package stay."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        why, cause = _plain(error), error
    except Exception as error:
        if cell.method in METHODS:
            raise
        why, cause = f"{type(error).__name__}: {_plain(error)}{place_of(error)}", error
    else:
        return
    said = f"{cell.dataset}, {cell.model}, {cell.name}: {why}"
    raise NetworkFailed(said, stage="mask") from cause


def _plain(error: Exception) -> str:
    """The first line of a message, without the name of the function that it starts with."""
    line = str(error).strip().split("\n")[0]
    return line.removeprefix("make_mask: ").removeprefix("prune: ")
