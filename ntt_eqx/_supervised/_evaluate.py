"""Evaluate an objective over all samples."""

from collections.abc import Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .._batch import as_stream, batch_size as size_of, is_batch, opened, pair
from .._checks import check_count
from .._distribute import left_to_xla, replicate, spread
from .._types import PyTree
from ._objective import (
    CROSS_ENTROPY,
    CrossEntropy,
    Objective,
    SquaredError,
    check_start,
    judge,
    readable,
)


def evaluate(
    model: PyTree,
    data: Any,
    objective: Objective = CROSS_ENTROPY,
    *,
    batch_size: int = 1000,
) -> dict[str, float]:
    """Mean loss and metrics of a model over all samples, in inference mode.

    **Arguments:**

    - `model`: any Equinox model of one sample, or a `SparseModel`.
    - `data`: all samples as one batch, in a form that `objective` reads: for `CrossEntropy` and
      `SquaredError` a pair `(x [N, ...], y [N, ...])` or what has them as `x` and `y`, such as
      `ntt.data.as_batch(data.test, mean=data.mean, std=data.std)`, which standardises pixels. Or
      what yields batches, which may differ in size: a list of them, an iterator, a torch
      `DataLoader`. `train` says what is one batch, and what is many.
    - `objective`: `CrossEntropy()`, `SquaredError()`, or your own; see `AbstractObjective`. With
      `key=None`.
    - `batch_size`: samples of one batch per call of the compiled model.

    **Returns:**

    `{"loss": mean of the objective, "accuracy": share classified correctly}` with `CrossEntropy`;
    for others the loss and their own metrics. Every sample counts once, whatever the batches.

    **Raises:**

    `ValueError` when there is no sample, samples do not suit the objective and the model, or one is
    NaN or infinite.
    """
    check_count("evaluate: batch_size", batch_size)
    model = replicate(model)
    sums: list[dict[str, Array]] = []
    total = 0
    for part in _parts(data, objective, batch_size):
        check_start("evaluate", objective, model, part)
        total += size_of("evaluate", part)
        sums.append(_sums(objective, model, part))
    if total == 0:
        raise ValueError("evaluate: there is no batch in the data.")
    found = jax.device_get(sums)
    return {
        name: float(np.sum([s[name] for s in found], dtype=np.float64) / total) for name in found[0]
    }


def _parts(data: Any, objective: Objective, batch_size: int) -> Iterator[PyTree]:
    """The batches of a stream, or pieces of one batch, so that only a piece is on the device."""
    read = lambda batch: spread("evaluate", readable("evaluate", objective, batch))
    if not is_batch(data):
        yield from map(read, as_stream("evaluate: data", data))
        return
    own = isinstance(objective, CrossEntropy | SquaredError)
    whole = opened(pair("evaluate", data) if own else data)
    for start in range(0, size_of("evaluate", whole), batch_size):
        piece = jax.tree.map(lambda leaf, start=start: leaf[start : start + batch_size], whole)
        yield read(piece)


@eqx.filter_jit
def _sums(objective: Objective, model: PyTree, batch: PyTree) -> dict[str, Array]:
    """Sum each value over the samples; a scalar mean counts once for each sample."""
    size = size_of("evaluate", batch)
    judged = lambda objective, model, batch: judge(objective, model, batch, None, training=False)[0]
    values = left_to_xla(judged, objective, model, batch)
    return {name: v * size if v.ndim == 0 else jnp.sum(v) for name, v in values.items()}
