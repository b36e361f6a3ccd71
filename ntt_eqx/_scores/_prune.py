"""`prune`: from a score to a sparse model, in one shot or in many small steps."""

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from .._masks import AbstractPattern, Sparsity, check_collapse, invert_scores
from .._masks._allocation import Allocation, Density, check_density
from .._masks._make import build_mask
from .._sparse import SparseModel, sparsify
from .._types import ScoreTree
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
    - `batch`: what the score needs: inputs `[batch, ...]`, or `(x, y)` with labels. A label-free
      score is given `x` alone, also when `batch` has labels.
    - `scope`, `allocation`, `pattern`: see `make_mask`.
    - `steps`: how many times to score and prune; step t of T goes down to `d_t`.
    - `schedule`: `"exponential"`, `d_t = d^(t/T)`, or `"linear"`, `d_t = 1 - (1 - d) t/T`.
    - `regrow`: let later steps bring weights back that earlier steps pruned.
    - `invert`: keep the lowest scores instead, as a check.

    **Returns:**

    The sparse model: the weights of `model` under the mask.

    **Raises:**

    `ValueError` as `make_mask` does, for scores that are NaN, and for options that contradict each
    other.

    **Warns:**

    `LayerCollapseWarning` when `scope="global"` empties a layer.
    """
    if steps < 1:
        raise ValueError(f"prune: steps must be at least 1, got {steps}.")
    if schedule not in ("exponential", "linear"):
        raise ValueError(f"prune: schedule must be 'exponential' or 'linear', got {schedule!r}.")
    if isinstance(density, Sparsity):
        if scope != "layer" or allocation is not None or pattern is not None:
            raise ValueError(
                "prune: a Sparsity says scope, allocation and pattern; give these to Sparsity."
            )
        scope, allocation, pattern = density.scope, density.allocation, density.pattern
        final: Any = density.at(0)
    else:
        final = density
    sparse = sparsify(model)
    given = (
        batch[0]
        if isinstance(score, AbstractLabelFreeScore) and isinstance(batch, tuple)
        else batch
    )
    for step in range(1, steps + 1):
        scores = scored(score if step == 1 else fresh(score, step), sparse, given)
        scores = invert_scores(scores) if invert else scores
        if not regrow:
            scores = _bar_pruned(scores, sparse)
        target = _scheduled(final, step / steps, schedule)
        sparse = sparse.with_mask(
            build_mask(scores, target, scope=scope, allocation=allocation, pattern=pattern)
        )
    if scope == "global":
        check_collapse(sparse.mask, caller="prune")
    return sparse


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
