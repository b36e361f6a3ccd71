"""Runs of supervised steps."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from .._batch import as_stream, pair, shape_of_inputs
from .._diagnosis import Diagnosis, Evidence, check_first_update, recording, weight_norms
from .._distribute import replicate, spread
from .._examples import as_inference
from .._fit import History, Progress, Row, drive
from .._held import Held
from .._masks import check_collapse
from .._optimise import copied
from .._refreshes import cannot_rank, refresh_due
from .._sparse import SparseModel
from .._types import GradientTransformation, PyTree
from ._evaluate import evaluate
from ._objective import CROSS_ENTROPY, Objective, check_start, readable
from ._on_kept_weights import Steps
from ._step import (
    TrainConfig,
    TrainMetrics,
    TrainState,
    check_state,
    step_as,
    train_init,
    with_zeros,
)

Model = TypeVar("Model")


def train(
    model: Model,
    batches: Iterable[Any],
    optimizer: GradientTransformation,
    *,
    num_steps: int,
    objective: Objective = CROSS_ENTROPY,
    l2_weight: float = 1e-8,
    key: PRNGKeyArray | None = None,
    log_every: int | None = 100,
    test_set: Any = None,
    observe: Mapping[str, Callable[[TrainState], Mapping[str, Any]]] | None = None,
    on_log: Callable[[TrainState, Row], None] | None = None,
) -> tuple[Model, History]:
    """Train a model on batches, by softmax cross-entropy or any other objective.

    The zeros of a `SparseModel` stay exactly zero: no step changes its mask, and pruned weights
    keep their values under it. This is the short form of `train_init` and `train_steps`, which
    serve runs that are saved and resumed.

    **Arguments:**

    - `model`: any Equinox model of one sample, or a `SparseModel`.
    - `batches`: yields batches of one shape, arrays in whatever form the objective reads: tuples,
      lists, dicts, dataclasses or Modules of jax or numpy arrays or torch tensors. `CrossEntropy`
      and `SquaredError` read pairs `(x [batch, ...], y [batch, ...])`, fields or keys `x` and `y`,
      and the keys of Hugging Face's data sets, such as `image` or `pixel_values` with `label` or
      `labels`. See `fit` for their number.
      Or one batch, for all steps: an array, a dict, what has fields, a tuple of arrays, and a list
      of two arrays, which is a pair `[x, y]`. A tuple or a list whose entries are batches of
      several arrays are many.
    - `optimizer`: any optax transformation (published: Adam, 1e-3).
    - `num_steps`: number of steps.
    - `objective`, `l2_weight`: the loss to minimise; see `TrainConfig`.
    - `key`: for dropout or an objective that needs one; see `train_init`.
    - `log_every`: steps between two rows of the history; `None` for the last row only.
    - `test_set`: evaluated for a row's part `"test"`, in any form of `batches` but that of an
      iterator, which could be gone through only once; see `evaluate`.
    - `observe`: more parts of a row, `name -> (state -> values)`.
    - `on_log`: called with the state and each new row; the state may be kept.

    **Returns:**

    The trained model and the history, see `train_steps`.

    **Raises:**

    `ValueError` for batches that do not suit the objective or that run out, and when the
    optimizer's first step is not finite; `DivergenceError`, which says what is wrong, when the loss
    is not finite, unless the optimiser skips such steps; see `fit`.

    **Warns:**

    `LayerCollapseWarning` where a mask empties a layer or leaves outputs without a path from the
    input.
    """
    state = train_init(model, TrainConfig(l2_weight, objective), optimizer, key=key)
    state, history = train_steps(
        state,
        batches,
        num_steps=num_steps,
        log_every=log_every,
        test_set=test_set,
        observe=observe,
        on_log=on_log,
    )
    return state.model, history


def train_steps(
    state: TrainState,
    batches: Iterable[Any],
    *,
    num_steps: int,
    log_every: int | None = 100,
    test_set: Any = None,
    observe: Mapping[str, Callable[[TrainState], Mapping[str, Any]]] | None = None,
    on_log: Callable[[TrainState, Row], None] | None = None,
    on_step: Callable[[Progress[TrainState]], None] | None = None,
    window: Mapping[str, Sequence[float]] | None = None,
) -> tuple[TrainState, History]:
    """Run until `num_steps` steps have been made in all, those before this call included.

    A run cut in two, with the state and the iterator carried over, gives the bits of an uncut one.

    On a CPU, large layers with few kept weights are trained on these alone, if objective, model and
    optimiser allow it; all states that the run shows are masked. Such steps are `train_step`'s to
    rounding.

    **Arguments:**

    - `state`: from `train_init`, an earlier `train_steps`, or a checkpoint; it is left as it is.
    - `batches`, `log_every`, `test_set`, `observe`, `on_log`: see `train`.
    - `num_steps`: the step to run to.
    - `on_step`, `window`: see `fit`. Each step reuses the memory of the state before it: copy what
      `on_step` shall keep.

    **Returns:**

    The state after the last step, and rows
    `{"step": int, "train": {"loss", "objective", "accuracy"}, "test": {"loss", "accuracy"}}` (with
    `CrossEntropy`), `"train"` being means over the steps since the row before; see `fit`. The test
    loss is the objective alone, without L2, of `TrainState.trained`.

    **Raises:**

    See `train`.
    """
    check_state("train", state)
    objective, begin, first = state.config.objective, state, True
    steps = Steps(_step, state, num_steps)
    parts = dict(observe or {})
    if test_set is not None:
        as_stream("train: test_set", test_set, again=True)
        parts["test"] = lambda state: evaluate(state.trained, test_set, objective)

    def step(state: Any, batch: Any) -> tuple[Any, TrainMetrics, Evidence]:
        nonlocal first
        batch = spread("train", readable("train", objective, batch))
        if first:
            check_start("train", objective, state.model, batch)
            if isinstance(state.model, SparseModel):
                check_collapse(state.model, shape_of_inputs(batch), caller="train")
            state = Held.of(state)
        state, metrics, norms = steps(state, batch)
        if first and bool(jnp.isfinite(metrics.loss)):
            check_first_update("train", state.whole().model, lambda: _gradient(begin, batch))
        first = False
        return state, metrics, Evidence(batch, norms)

    return drive(
        step,
        replicate(copied(state)),  # the steps reuse its memory
        as_stream("train: batches", batches),
        num_steps=num_steps,
        log_every=log_every,
        observe=parts,
        on_log=None if on_log is None else lambda state, row: on_log(copied(state), row),
        on_step=on_step,
        window=window,
        name="train",
        diagnosis=Diagnosis(
            lambda state: state.model,
            lambda state, batch: check_start("train", objective, state.model, batch),
            _outputs,
            begin,
            _behind,
        ),
    )


def _behind(state: TrainState, step: int) -> None:
    dynamic = state.config.dynamic
    if dynamic is None:
        return
    due = bool(refresh_due(dynamic.refresh, dynamic.sparsity, jnp.int32(step)))
    if due and bool(dynamic.sparsity.lost(state.model.mask)):
        raise cannot_rank("train", dynamic.refresh, step, "dynamic=None")


@functools.partial(jax.jit, donate_argnums=0)
def _step(held: Held[TrainState], batch: PyTree) -> tuple[Held[TrainState], TrainMetrics, Any]:
    state = held.whole()
    # as the loss sees them, so that its L2 term and these share their sums
    norms = weight_norms(with_zeros(state.model), masked=True)
    state, metrics = step_as("train", state, batch)
    return Held.of(state), metrics, norms


@eqx.filter_jit
def _gradient(state: TrainState, batch: PyTree) -> PyTree:
    """The gradient of the loss at a state, by a step that records it."""
    optimizer = recording()
    params = eqx.filter(state.model, eqx.is_inexact_array)
    config = TrainConfig(state.config.l2_weight, state.config.objective)  # of the step alone
    before = TrainState(
        state.model, optimizer.init(params), state.step, state.key, config, optimizer
    )
    return step_as("train", before, batch)[0].opt_state


@eqx.filter_jit
def _outputs(state: TrainState, batch: PyTree) -> PyTree:
    return jax.vmap(as_inference(state.model))(pair("train", batch)[0])
