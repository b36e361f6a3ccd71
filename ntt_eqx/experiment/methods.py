"""The pruning methods by name, and the sparse network that each starts training from."""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, PRNGKeyArray

from .. import _scores
from .._masks import make_mask
from .._scores import SupervisedScore
from .._sparse import SparseModel, sparsify
from ._errors import ExperimentError
from .cells import Cell

_SCORES: dict[str, Callable[[PRNGKeyArray], Any]] = {
    "random": lambda key: _scores.Random(key),
    "magnitude": lambda key: _scores.Magnitude(),
    "snip": lambda key: _scores.Snip(),
    "logit-snip": lambda key: _scores.LogitSnip(),
}


def pruned_at_start(
    cell: Cell, teacher: Any, examples: tuple[Array, Array] | None, key: PRNGKeyArray
) -> SparseModel:
    """The dense initialisation `teacher` with the mask that `cell.method` gives it.

    **Arguments:**

    - `cell`: which method, scope and density.
    - `teacher`: the dense network at its initialisation; its weights are kept.
    - `examples`: inputs `[batch, ...]` and labels `[batch]` for methods that look at data.
    - `key`: for methods that draw.

    **Raises:**

    `ExperimentError`: for a method that this version does not have.
    """
    sparse = sparsify(teacher)
    if cell.method == "dense":
        return sparse
    if cell.method not in _SCORES:
        raise ExperimentError(
            f"method {cell.method!r} is not in this version; there are "
            f"{', '.join(available_methods())}."
        )
    score = _SCORES[cell.method](key)
    supervised = isinstance(score, SupervisedScore)
    inputs = examples if supervised or examples is None else examples[0]
    return sparse.with_mask(
        make_mask(score(sparse, inputs), cell.density, scope=cell.scope or "layer")
    )


def available_methods() -> list[str]:
    """The methods that this version can run."""
    return ["dense", "ntt", "ntt-ambient", *_SCORES]


def kept_weights(sparse: SparseModel) -> dict[str, float]:
    """Share of weights kept in every prunable layer, by its path."""
    found = jax.device_get(sparse.densities())
    return {name.strip("."): float(share) for name, share in found.items()}
