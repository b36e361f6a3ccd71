"""`prune`: from a score to a sparse model, in one shot or in many small steps."""

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from .._batch import inputs_of, shape_of_inputs
from .._checks import is_count
from .._masks import AbstractPattern, Sparsity, check_collapse, invert_scores
from .._masks._allocation import Allocation, Density, check_density
from .._masks._collapse import is_traced
from .._masks._make import build_mask
from .._sparse import SparseModel, sparsify
from .._types import PyTree, ScoreTree
from ._base import AbstractLabelFreeScore, AbstractSupervisedScore, fresh, scored


def prune(
    model: PyTree,
    score: AbstractLabelFreeScore | AbstractSupervisedScore,
    density: Density | Sparsity,
    batch: Any = None,
    *,
    scope: Literal["layer", "global"] = "layer",
    allocation: Allocation | None = None,
    pattern: AbstractPattern | None = None,
    steps: int = 1,
    schedule: Literal["exponential", "linear"] = "exponential",
    regrow: bool = False,
    invert: bool = False,
) -> SparseModel:
    """Score a model's weights and keep the highest, in one shot or iteratively.

    **Arguments:**

    - `model`: any Equinox model, or a `SparseModel` to be pruned further.
    - `score`: what to keep, from `ntt_eqx.scores`.
    - `density`: share of weights to keep in the end, or one for every layer, or a `Sparsity`; see
      `make_mask`.
    - `batch`: what the score needs: inputs `[batch, ...]`, or with labels `(x, y)`, `[x, y]` or a
      dict of both, as loaders give them. A label-free score is given the inputs alone, also when
      `batch` has labels.
    - `scope`, `allocation`, `pattern`: see `make_mask`.
    - `steps`: how many times to score and prune; step t of T goes down to `d_t`, where more than
      that is left.
    - `schedule`: `"exponential"`, `d_t = d^(t/T)`, or `"linear"`, `d_t = 1 - (1 - d) t/T`.
    - `regrow`: let later steps bring weights back that earlier steps pruned.
    - `invert`: keep the lowest scores instead, as a check.

    **Returns:**

    The sparse model: the weights of `model` under the mask.

    **Raises:**

    `ValueError` as `make_mask` does, for scores that are NaN, for options that contradict each
    other, and, without `regrow`, for a density above what is left in a layer of a `SparseModel`.

    **Warns:**

    `LayerCollapseWarning` when `scope="global"` empties a layer, or, where `batch` tells the shape
    of the inputs, when outputs are left without a path from the input.
    """
    _check_score("prune", score)
    if not is_count(steps):
        raise ValueError(f"prune: steps must be at least 1, got {steps!r}.")
    if schedule not in ("exponential", "linear"):
        raise ValueError(f"prune: schedule must be 'exponential' or 'linear', got {schedule!r}.")
    if isinstance(density, Sparsity):
        if scope != "layer" or allocation is not None or pattern is not None:
            raise ValueError(
                "prune: a Sparsity says scope, allocation and pattern; give these to Sparsity."
            )
        scope, allocation, pattern = density.scope, density.allocation, density.pattern
        final: Any = density.density
    else:
        final = density
    if callable(final):
        raise ValueError(
            "prune: a schedule of the step belongs to a transfer; give the density in the end, and "
            "`steps` for a density that falls."
        )
    sparse = sparsify(model)
    given = batch
    if isinstance(score, AbstractLabelFreeScore) and batch is not None:
        given = inputs_of("prune", batch)
    for step in range(1, steps + 1):
        scores = scored(score if step == 1 else fresh(score, step), sparse, given)
        scores = invert_scores(scores) if invert else scores
        if not regrow:
            scores = _bar_pruned(scores, sparse)
        target = _scheduled(final, step / steps, schedule)
        mask, _ = build_mask(
            scores,
            target,
            scope=scope,
            allocation=allocation,
            pattern=pattern,
            within=None if regrow else sparse.mask,
            steps=steps,
            last=step == steps,
        )
        sparse = sparse.with_mask(mask)
    if not is_traced(sparse.mask):
        check_collapse(sparse, shape_of_inputs(given), caller="prune")
    return sparse


def _check_score(caller: str, score: Any) -> None:
    kinds = AbstractLabelFreeScore | AbstractSupervisedScore
    if isinstance(score, kinds):
        return
    if isinstance(score, type) and issubclass(score, kinds):
        got = f"the class {score.__name__}: make one of it, as {score.__name__}()"
    else:
        got = repr(score)
    raise ValueError(
        f"{caller}: score must be one of ntt_eqx.scores, such as scores.Snip(), or an own "
        f"AbstractLabelFreeScore or AbstractSupervisedScore, got {got}."
    )


def _bar_pruned(scores: ScoreTree, sparse: SparseModel) -> ScoreTree:
    bar = lambda m, s: jnp.where(m, s, jnp.asarray(-jnp.inf, s.dtype))
    return jax.tree.map(bar, sparse.mask, scores)


def _scheduled(density: Density, share: float, schedule: str) -> Density:
    if isinstance(density, Mapping):
        return {name: _scheduled(d, share, schedule) for name, d in density.items()}  # pyright: ignore
    density = check_density(density, "prune")
    if share == 1.0:
        return density
    return density**share if schedule == "exponential" else 1.0 - (1.0 - density) * share
