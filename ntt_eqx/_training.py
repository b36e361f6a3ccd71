"""The supervised phase: train a dense or sparse model on labels, and evaluate it."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from ._checks import (
    check_batch,
    check_finite,
    check_weight,
    check_weights,
    is_count,
    sample_of,
)
from ._errors import DivergenceError
from ._examples import (
    Examples,
    as_inference,
    check_examples,
    check_labels,
    next_batch,
    num_classes,
    softmax_cross_entropy,
)
from ._optimise import check_first_update, init_optimizer, optimise
from ._sparse import SparseModel, map_masked, masked_weights, sparsify
from ._types import widen

History: TypeAlias = list[dict[str, Any]]
"""One row per evaluation: `{"step": 100, "batch": {...}, "train": {...}, "test": {...}}`."""

Model = TypeVar("Model")


@runtime_checkable
class Labelled(Protocol):
    """Inputs `x` of shape `[N, ...]` and labels `y` of shape `[N]`, like a `Split` or a `Batch`."""

    @property
    def x(self) -> Any: ...  # noqa: D102
    @property
    def y(self) -> Any: ...  # noqa: D102


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """What the supervised loss is.

    Attributes:
        l2: coefficient of the sum of squared prunable weights, masked ones left out (published:
            1e-8).
        dropout: call the model as `model(x, key=key)` in training mode; without it the model is
            called as `model(x)` in inference mode.
    """

    l2: float = 1e-8
    dropout: bool = False

    def __post_init__(self) -> None:
        check_weight("TrainConfig: l2", self.l2)


class TrainMetrics(NamedTuple):
    """What one step saw, before its update: scalars, float32.

    Attributes:
        loss: softmax cross-entropy plus L2.
        cross_entropy: softmax cross-entropy, mean over the batch.
        accuracy: share of the batch that was classified correctly.
    """

    loss: Float[Array, ""]
    cross_entropy: Float[Array, ""]
    accuracy: Float[Array, ""]


class TrainState(eqx.Module):
    """All that a run carries from step to step; saving it is enough to resume bit for bit.

    Attributes:
        model: the model, dense or a `SparseModel`.
        opt_state: the optimiser's state.
        step: number of steps made.
        diverged_at: the first step with a loss that was not finite; -1 as long as there is none.
        key: source of the dropout masks; `None` without dropout.
        config: the loss.
        optimizer: the optax optimiser.
    """

    model: Any
    opt_state: PyTree
    step: Int[Array, ""]
    diverged_at: Int[Array, ""]
    key: PRNGKeyArray | None
    config: TrainConfig = eqx.field(static=True)
    optimizer: optax.GradientTransformation = eqx.field(static=True)


def train(
    model: Model,
    batches: Iterable[Examples],
    optimizer: optax.GradientTransformation,
    *,
    num_steps: int,
    l2: float = 1e-8,
    dropout: bool = False,
    key: PRNGKeyArray | None = None,
    evaluate_every: int | None = None,
    train_set: Labelled | tuple[Any, Any] | None = None,
    test_set: Labelled | tuple[Any, Any] | None = None,
    mean: float | None = None,
    std: float | None = None,
    on_log: Callable[[TrainState, dict[str, Any]], None] | None = None,
) -> tuple[Model, History]:
    """Train a model on labelled batches with softmax cross-entropy.

    Pruned weights get no gradient: the zeros of a `SparseModel` are exactly zero after the run,
    which is checked at its end. For runs that are saved and resumed see `train_init` and
    `train_steps`, of which this is the short form.

    **Arguments:**

    - `model`: any Equinox model from one sample to logits, or a `SparseModel`.
    - `batches`: yields `(x [batch, ...], y [batch])`, as many as `num_steps` at least; one shape.
    - `optimizer`: an optax optimiser (published: Adam, 1e-3).
    - `num_steps`: number of steps.
    - `l2`, `dropout`: see `TrainConfig`; `key` is needed for dropout only.
    - `evaluate_every`: steps between two rows of the history; `None` for the last row only.
    - `train_set`, `test_set`: what is evaluated for a row; `mean` and `std` standardise them if
      they hold integers, see `evaluate`.
    - `on_log`: called with the state and each new row; the state may be kept.

    **Returns:**

    The trained model and the history, see `train_steps`.

    **Raises:**

    `ValueError` for batches that do not fit the model or that run out, `DivergenceError` when the
    loss is not finite.
    """
    state = train_init(model, TrainConfig(l2, dropout), optimizer, key=key)
    state, history = train_steps(
        state,
        batches,
        num_steps=num_steps,
        evaluate_every=evaluate_every,
        train_set=train_set,
        test_set=test_set,
        mean=mean,
        std=std,
        on_log=on_log,
    )
    return state.model, history


def train_init(
    model: PyTree,
    config: TrainConfig,
    optimizer: optax.GradientTransformation,
    *,
    key: PRNGKeyArray | None = None,
) -> TrainState:
    """The state before the first step.

    **Arguments:**

    - `model`, `optimizer`: see `train`.
    - `config`: the loss.
    - `key`: source of the dropout masks, needed when `config.dropout`.

    **Returns:**

    A `TrainState` at step 0.

    **Raises:**

    `ValueError` when dropout has no key, or a weight is NaN or infinite.
    """
    if config.dropout and key is None:
        raise ValueError("train_init: dropout needs a key.")
    check_weights("train_init", model)
    return TrainState(
        model=model,
        opt_state=init_optimizer("train_init", optimizer, eqx.filter(model, eqx.is_inexact_array)),
        step=jnp.asarray(0, jnp.int32),
        diverged_at=jnp.asarray(-1, jnp.int32),
        key=key if config.dropout else None,
        config=config,
        optimizer=optimizer,
    )


def train_step(state: TrainState, batch: Examples) -> tuple[TrainState, TrainMetrics]:
    """One optimiser step, to be used as `eqx.filter_jit(train_step)`.

    **Arguments:**

    - `state`: from `train_init` or the step before.
    - `batch`: `(x [batch, ...], y [batch])`, standardised floats and integer labels.

    **Returns:**

    The next state and the metrics of this batch.
    """
    x, y = batch
    weights, rest = eqx.partition(state.model, eqx.is_inexact_array)
    key = None if state.key is None else jax.random.fold_in(state.key, state.step)
    given = rest, jnp.asarray(x), jnp.asarray(y), key, state.config
    (loss, (entropy, accuracy)), gradient = jax.value_and_grad(_loss, has_aux=True)(weights, *given)
    weights, opt_state = optimise(
        state.optimizer,
        gradient,
        state.opt_state,
        weights,
        value=loss,
        value_fn=lambda weights: _loss(weights, *given)[0],
    )
    first_bad = (state.diverged_at < 0) & ~jnp.isfinite(loss)
    state = TrainState(
        model=eqx.combine(weights, rest),
        opt_state=opt_state,
        step=state.step + 1,
        diverged_at=jnp.where(first_bad, state.step, state.diverged_at),
        key=state.key,
        config=state.config,
        optimizer=state.optimizer,
    )
    return state, TrainMetrics(loss, entropy, accuracy)


def train_steps(
    state: TrainState,
    batches: Iterable[Examples],
    *,
    num_steps: int,
    evaluate_every: int | None = None,
    train_set: Labelled | tuple[Any, Any] | None = None,
    test_set: Labelled | tuple[Any, Any] | None = None,
    mean: float | None = None,
    std: float | None = None,
    on_log: Callable[[TrainState, dict[str, Any]], None] | None = None,
) -> tuple[TrainState, History]:
    """Run until `num_steps` steps have been made in all, those before this call included.

    A run cut in two, with the state and the iterator carried over, gives the bits of an uncut one.

    **Arguments:**

    - `state`: from `train_init`, an earlier `train_steps`, or a checkpoint; it is left as it is.
    - `batches`: yields `(x [batch, ...], y [batch])`; one batch is taken per step and none more.
    - `num_steps`: the step to run to.
    - `evaluate_every`, `train_set`, `test_set`, `mean`, `std`, `on_log`: see `train`.

    **Returns:**

    The state after the last step, and one row per multiple of `evaluate_every` and for the last
    step: `{"step": int, "batch": {"loss", "accuracy"}, "train": {...}, "test": {...}}`. `"batch"`
    is the mean over the training batches since the row before (the loss is the cross-entropy
    without L2); `"train"` and `"test"` are there when the sets are given. A run from the start
    has a row for step 0 when `evaluate_every` is given.

    **Raises:**

    `ValueError` for batches that do not fit the model or that run out, `DivergenceError` when the
    loss is not finite.
    """
    if not is_count(num_steps, 0):
        raise ValueError(
            f"train_steps: num_steps must not be negative nor a fraction, got {num_steps}."
        )
    if evaluate_every is not None and not is_count(evaluate_every):
        raise ValueError(f"train_steps: evaluate_every must be at least 1, got {evaluate_every}.")
    sets = {"train": train_set, "test": test_set}
    history: History = []
    step, first = int(state.step), int(state.step)
    pending: list[TrainMetrics] = []

    def log() -> None:
        if int(state.diverged_at) >= 0:
            raise DivergenceError("train", int(state.diverged_at), float("nan"))
        row: dict[str, Any] = {"step": step}
        if pending:
            seen = jax.device_get(pending)
            row["batch"] = {
                "loss": float(np.mean([metrics.cross_entropy for metrics in seen])),
                "accuracy": float(np.mean([metrics.accuracy for metrics in seen])),
            }
            pending.clear()
        for name, data in sets.items():
            if data is not None:
                row[name] = evaluate(state.model, data, mean=mean, std=std)
        history.append(row)
        if on_log is not None:
            on_log(_copy(state), row)

    if step == 0 and evaluate_every is not None and num_steps > 0:
        log()
    zeros = _pruned_places(state.model)
    state = _copy(state)  # the steps below reuse its memory
    source = iter(batches)
    while step < num_steps:
        batch = next_batch("train_steps", source, step, num_steps)
        if step == first:
            check_examples("train_steps", state.model, batch)
        state, metrics = _step(batch, state)
        if step == first and bool(jnp.isfinite(metrics.loss)):
            check_first_update("train", state.model)
        pending.append(metrics)
        step += 1
        if step == num_steps or (evaluate_every is not None and step % evaluate_every == 0):
            log()
    _check_zeros(state.model, zeros)
    return state, history


def evaluate(
    model: PyTree,
    data: Labelled | tuple[Any, Any],
    *,
    batch_size: int = 1000,
    mean: float | None = None,
    std: float | None = None,
) -> dict[str, float]:
    """Cross-entropy and accuracy of a model on labelled data, in inference mode.

    **Arguments:**

    - `model`: any Equinox model from one sample to logits, or a `SparseModel`.
    - `data`: `(x [N, ...], y [N])` or anything that has them as `.x` and `.y`.
    - `batch_size`: samples per call of the compiled model.
    - `mean`, `std`: for integer `x`: pixels become `(x / 255 - mean) / std`. Float `x` is taken
      as standardised already.

    **Returns:**

    `{"loss": mean softmax cross-entropy, "accuracy": share classified correctly}`.

    **Raises:**

    `ValueError` when inputs and labels do not fit each other or the model, an input is NaN or
    infinite, or integer inputs come without `mean` and `std`.
    """
    if not isinstance(data, tuple):
        data = getattr(data, "x", None), getattr(data, "y", None)
    if len(data) != 2 or not all(hasattr(part, "dtype") for part in data):
        raise ValueError("evaluate: needs arrays of inputs and labels, (x, y).")
    x, y = data
    check_batch("evaluate", x)
    pixels = jnp.issubdtype(x.dtype, jnp.integer)
    if pixels != (mean is not None) or pixels != (std is not None):
        raise ValueError(
            f"evaluate: integer inputs need mean and std and float inputs take none; "
            f"got {x.dtype}, mean={mean}, std={std}."
        )
    if y.shape != x.shape[:1] or not jnp.issubdtype(y.dtype, jnp.integer):
        raise ValueError(
            f"evaluate: needs integer labels, one per sample; "
            f"got x {x.dtype}{list(x.shape)} and y {y.dtype}{list(y.shape)}."
        )
    if not is_count(batch_size):
        raise ValueError(f"evaluate: batch_size must be at least 1, got {batch_size}.")
    check_finite("evaluate", "x", x)
    sample = jax.ShapeDtypeStruct(x.shape[1:], jnp.float32) if pixels else sample_of(x)
    check_labels("evaluate", y, num_classes("evaluate", model, sample))
    size = min(batch_size, x.shape[0])
    scale = None if mean is None or std is None else (jnp.float32(mean), jnp.float32(std))
    sums = []
    for start in range(0, x.shape[0], size):
        part_x, part_y = x[start : start + size], y[start : start + size]
        missing = size - part_x.shape[0]
        if missing:  # one static shape: repeat samples, and count them nowhere
            part_x, part_y = _pad(part_x, missing), _pad(part_y, missing)
        sums.append(_evaluate_batch(model, part_x, part_y, jnp.int32(size - missing), scale))
    losses, hits = zip(*jax.device_get(sums), strict=True)
    total = x.shape[0]
    return {"loss": float(np.sum(losses, dtype=np.float64) / total),
            "accuracy": float(np.sum(hits) / total)}  # fmt: skip


def rescale_by_density(sparse: SparseModel) -> SparseModel:
    """Divide the prunable weights of every layer by the square root of that layer's density.

    Keeps the variance of the pre-activations at what it was before random pruning. A layer with
    no weight left stays as it is.

    **Arguments:**

    - `sparse`: the initial sparse model.

    **Returns:**

    The same mask over rescaled weights.
    """

    def rescale(w: Float[Array, "*s"], m: Bool[Array, "*s"]) -> Float[Array, "*s"]:
        density = jnp.mean(m, dtype=jnp.float32)
        return w * jax.lax.rsqrt(jnp.where(density > 0, density, 1.0)).astype(w.dtype)

    return SparseModel(map_masked(rescale, sparse.model, sparse.mask), sparse.mask)


def _loss(
    weights: PyTree,
    rest: PyTree,
    x: Array,
    y: Array,
    key: PRNGKeyArray | None,
    config: TrainConfig,
) -> tuple[Array, tuple[Array, Array]]:
    model = eqx.combine(weights, rest)
    if config.dropout:
        assert key is not None
        dense = model.to_dense() if isinstance(model, SparseModel) else model
        keys = jax.random.split(key, x.shape[0])
        logits = widen(jax.vmap(lambda x, key: dense(x, key=key))(x, keys))
    else:
        logits = widen(jax.vmap(as_inference(model))(x))
    entropy = jnp.mean(softmax_cross_entropy(logits, y))
    accuracy = jnp.mean(jnp.argmax(logits, axis=1).astype(y.dtype) == y, dtype=jnp.float32)
    penalty = sum(
        (jnp.sum(jnp.square(w), dtype=entropy.dtype) for w in _penalised(model)),
        start=jnp.zeros((), entropy.dtype),
    )
    return entropy + config.l2 * penalty, (entropy, accuracy)


def _penalised(model: PyTree) -> list[Array]:
    try:
        return masked_weights(sparsify(model))
    except ValueError:  # a model of the user's own, without a layer that has weights
        return []


@eqx.filter_jit(donate="all-except-first")
def _step(batch: Examples, state: TrainState) -> tuple[TrainState, TrainMetrics]:
    return train_step(state, batch)


@eqx.filter_jit
def _evaluate_batch(
    model: PyTree, x: Any, y: Any, count: Int[Array, ""], scale: tuple[Array, Array] | None
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    if scale is not None:
        x = (x.astype(jnp.float32) / 255.0 - scale[0]) / scale[1]
    logits = widen(jax.vmap(as_inference(model))(x))
    counted = jnp.arange(x.shape[0], dtype=jnp.int32) < count
    losses = jnp.where(counted, softmax_cross_entropy(logits, y), 0.0)
    hits = counted & (jnp.argmax(logits, axis=1).astype(y.dtype) == y)
    return jnp.sum(losses), jnp.sum(hits, dtype=jnp.int32)


def _copy(state: TrainState) -> TrainState:
    return jax.tree.map(lambda leaf: jnp.copy(leaf) if eqx.is_array(leaf) else leaf, state)


def _pad(array: Any, missing: int) -> Any:
    return np.concatenate([array, np.repeat(array[:1], missing, axis=0)])


def _pruned_places(model: PyTree) -> list[np.ndarray] | None:
    if not isinstance(model, SparseModel):
        return None
    return [~m for m in jax.device_get(jax.tree.leaves(model.mask))]


def _check_zeros(model: PyTree, pruned: list[np.ndarray] | None) -> None:
    if pruned is None:
        return
    weights = jax.device_get(masked_weights(model))
    if not all((w[p] == 0).all() for w, p in zip(weights, pruned, strict=True)):
        raise RuntimeError("train_steps: a pruned weight is not zero after training.")
