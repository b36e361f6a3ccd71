"""The supervised loss and one step of it."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt32

from .._batch import as_arrays
from .._checks import check_key, check_weight, check_weights
from .._distribute import left_to_xla, replicate, spread
from .._optimise import copied, init_optimizer, optimise
from .._parameters import parameters, partition_parameters
from .._primitives import with_equivalents
from .._sparse import SparseModel, kept_weights, map_masked, prunable_leaves, where_kept
from .._stateful import with_state
from .._step_info import StepInfo, key_words, step_key
from .._types import GradientTransformation, PyTree, squared_norm
from ._dynamic import DynamicSparsity, TrainView, refreshed, remembered, with_first_mask
from ._objective import CROSS_ENTROPY, Objective, check_step, judge


class TrainConfig(eqx.Module):
    """The loss of training: the mean of the objective, and L2.

    Attributes:
        l2_weight: coefficient of the sum of squared prunable weights, masked ones left out
            (published: 1e-8). A model without prunable weights has no such sum.
        objective: `CrossEntropy()`, `SquaredError()`, or your own `(model, batch, key) -> loss`;
            see `AbstractObjective`.
        ema: decay of the exponential moving average of the weights, in [0, 1), which follows them
            at every step: `average = ema average + (1 - ema) weights`, from the initial ones on.
            It is what is evaluated, `TrainState.trained`; 0 for none.
        dynamic: how the mask changes in training; `None` to keep it.
    """

    l2_weight: float = eqx.field(static=True, default=1e-8)
    objective: Objective = CROSS_ENTROPY
    ema: float = eqx.field(static=True, default=0.0)
    dynamic: DynamicSparsity | None = None

    def __check_init__(self) -> None:
        check_weight("TrainConfig: l2_weight", self.l2_weight)
        if not callable(self.objective) or isinstance(self.objective, type):
            raise ValueError(
                "TrainConfig: the objective must be a function (model, batch, key) -> loss, or a "
                f"Module such as CrossEntropy(), got {self.objective!r}."
            )
        check_weight("TrainConfig: ema", self.ema)
        if self.ema >= 1:
            raise ValueError(f"TrainConfig: ema must be below 1, got {self.ema!r}.")
        if not isinstance(self.dynamic, DynamicSparsity | None):
            raise ValueError(
                f"TrainConfig: dynamic must be a DynamicSparsity, got {self.dynamic!r}."
            )
        if self.ema and self.dynamic is not None and self.dynamic.rewind is not None:
            raise ValueError("TrainConfig: an average of weights that are rewound has no meaning.")


class TrainMetrics(eqx.Module):
    """The metrics of one step, before its update: float32 scalars.

    Attributes:
        loss: the minimised loss, with L2.
        objective: mean of the objective over the batch.
        metrics: means of the objective's own metrics by name; `CrossEntropy` has the `accuracy`.
    """

    loss: Float[Array, ""]
    objective: Float[Array, ""]
    metrics: dict[str, Float[Array, ""]]


class TrainState(eqx.Module):
    """The complete state of a run; storing it is enough to resume bit for bit.

    Attributes:
        model: the model, dense or a `SparseModel`.
        opt_state: the optimiser's state.
        step: number of steps done.
        key: two words, from which every step derives its own PRNG key; or `None`.
        config: what is minimised.
        optimizer: the optax optimiser.
        average: the moving average of the model's parameters, with zeros for pruned weights; `None`
            without `TrainConfig.ema`. In float32 for those of 16 bits, in which it would stand
            still. The running statistics of batch norm are averages already.
        rewound: the arrays of model and optimiser state that a refresh goes back to; `None` without
            `DynamicSparsity.rewind`.
    """

    model: Any
    opt_state: PyTree
    step: Int[Array, ""]
    key: UInt32[Array, "2"] | None
    config: TrainConfig
    optimizer: GradientTransformation = eqx.field(static=True)
    average: PyTree = None
    rewound: PyTree = None

    @property
    def trained(self) -> Any:
        """The model to evaluate and to keep: `model`, with the averaged weights if there are any.

        Its mask is that of `model`.
        """
        if self.average is None:
            return self.model
        params, rest = partition_parameters(self.model)
        narrow = jax.tree.map(lambda a, like: a.astype(like.dtype), self.average, params)
        return eqx.combine(narrow, rest)


def train_init(
    model: PyTree,
    config: TrainConfig,
    optimizer: GradientTransformation,
    *,
    key: PRNGKeyArray | None = None,
) -> TrainState:
    """The state before the first step.

    **Arguments:**

    - `model`: any Equinox model of one sample, or a `SparseModel`; where `config` has a
      `DynamicSparsity`, a mask is added that keeps everything, or the given one must be of it.
    - `config`: the loss to minimise, and how the mask changes.
    - `optimizer`: any optax transformation.
    - `key`: where dropout or the objective needs one; the model is called as `model(x, key=key)`
      then, and without one as `model(x)` in inference mode. A `StatefulModel` trains in training
      mode either way: batch norm uses the batch, and dropout is off without a key.

    **Returns:**

    A `TrainState` at step 0.

    **Raises:**

    `ValueError` when a weight is NaN or infinite, `optimizer` is no optax transformation, `key` is
    not one random key, or the mask does not have the counts of the `DynamicSparsity`.
    """
    if not isinstance(config, TrainConfig):
        raise ValueError(
            "train_init: the second argument must be a TrainConfig, got "
            f"{type(config).__name__}; write TrainConfig(objective=...)."
        )
    check_weights("train_init", model)
    if key is not None:
        check_key("train_init", key)
    model = with_first_mask("train_init", model, config.dynamic)
    params = parameters(with_zeros(model))
    opt_state = init_optimizer("train_init", optimizer, params)
    rewinds = config.dynamic is not None and config.dynamic.rewind is not None
    rewound = copied(eqx.filter((model, opt_state), eqx.is_array)) if rewinds else None
    average = copied(_averageable(model)) if config.ema else None
    step = jnp.zeros((), jnp.int32)
    words = None if key is None else key_words(key)
    return replicate(TrainState(model, opt_state, step, words, config, optimizer, average, rewound))


def train_step(state: TrainState, batch: PyTree) -> tuple[TrainState, TrainMetrics]:
    """One optimiser step, to be used as `eqx.filter_jit(train_step)`.

    Pruned weights stay out of it, whatever the optimiser: it sees zeros in their places, as the
    model does, and what it makes of them is dropped, so that they keep their value under the mask.

    **Arguments:**

    - `state`: from `train_init` or the step before.
    - `batch`: arrays in the form that the objective reads, such as `(x [batch, ...], y [batch])`.
      `jit` cuts integers of 64 bits down to 32 before this function sees them, and takes the bytes
      of a NumPy array for native ones; `train` and `train_steps` look at a batch before.

    **Returns:**

    The next state and the metrics of this batch, NaN where a label is out of range.

    **Raises:**

    `ValueError` for a batch whose shapes or dtypes do not suit `CrossEntropy` or `SquaredError`.
    """
    return step_as("train_step", state, batch)


def step_as(caller: str, state: TrainState, batch: PyTree) -> tuple[TrainState, TrainMetrics]:
    """`train_step`, with another name before its errors."""
    check_state(caller, state)
    batch = as_arrays(caller, batch)
    check_step(caller, state.config.objective, state.model, batch)
    return left_to_xla(_stepped, state, batch, like=(state, None))


def check_state(caller: str, state: Any) -> None:
    """Raise `ValueError` unless `state` is a `TrainState`."""
    if not isinstance(state, TrainState):
        raise ValueError(
            f"{caller}: the state must be a TrainState, as train_init makes one, got "
            f"{type(state).__name__}."
        )


def _stepped(state: TrainState, batch: PyTree) -> tuple[TrainState, TrainMetrics]:
    batch = spread("train_step", batch)
    key = None if state.key is None else step_key(state.key, state.step)
    params, rest = partition_parameters(with_zeros(state.model))

    def loss(params: PyTree, masked: bool = False) -> tuple[Float[Array, ""], Any]:
        model = eqx.combine(params, rest)
        metrics, after = _loss(model, batch, key, state.config, masked=masked)
        return metrics.loss, (metrics, after)

    # The zeros are there, so that only the gradient needs the mask: a pass over all weights less.
    differentiated = with_equivalents(functools.partial(loss, masked=True))
    (value, (metrics, after)), gradient = jax.value_and_grad(differentiated, has_aux=True)(params)
    gradient = _of_kept(gradient, state.model)
    value_fn = lambda params: with_equivalents(loss)(params)[0]
    weights, _ = partition_parameters(state.model)
    params, opt_state = optimise(
        state.optimizer,
        gradient,
        state.opt_state,
        params,
        value=value,
        value_fn=value_fn,
        onto=weights,
    )
    model = _keep_pruned(eqx.combine(params, rest), state.model)
    model = model if after is None else with_state(model, after)
    step, config, rewound = state.step + 1, state.config, state.rewound
    if config.dynamic is not None:
        value_of = lambda model: _loss(model, batch, key, config)[0].loss
        info = _info(state, config.dynamic, step)
        view = TrainView(student=with_zeros(model), batch=batch, info=info, loss=value_of)  # pyright: ignore[reportCallIssue]
        model, opt_state, lost = refreshed(config.dynamic, view, model, opt_state, rewound)
        rewound = remembered(config.dynamic, rewound, (model, opt_state), step)
        if lost is not None:  # scores that cannot rank end the run
            loss_or_nan = jnp.where(lost, jnp.nan, metrics.loss)
            metrics = eqx.tree_at(lambda m: m.loss, metrics, loss_or_nan)
    average = _averaged(state.average, model, config.ema)
    return TrainState(
        model, opt_state, step, state.key, config, state.optimizer, average, rewound
    ), metrics


def _info(state: TrainState, dynamic: DynamicSparsity, step: Int[Array, ""]) -> StepInfo:
    """What the refresh after a step is told."""
    key = step_key(key_words(None) if state.key is None else state.key, state.step)
    density = dynamic.sparsity.overall(state.model.mask, step)
    return StepInfo(step, jax.random.fold_in(key, 1), density)


def _loss(
    model: PyTree,
    batch: PyTree,
    key: PRNGKeyArray | None,
    config: TrainConfig,
    *,
    masked: bool = False,
) -> tuple[TrainMetrics, Any]:
    """The metrics of a batch and the model's state after it; `masked`: zeros are there already."""
    penalised = _penalised(model, masked)
    model = model.model if masked and isinstance(model, SparseModel) else model
    values, after = judge(config.objective, model, batch, key, training=True)
    means = {k: jnp.mean(v) for k, v in values.items()}
    objective = means.pop("loss")
    penalty = sum(
        (squared_norm(w).astype(objective.dtype) for w in penalised),
        start=jnp.zeros((), objective.dtype),
    )
    return TrainMetrics(objective + config.l2_weight * penalty, objective, means), after


def _averaged(average: PyTree, model: PyTree, ema: float) -> PyTree:
    """The moving average one step on, zero where the mask is; `None` if there is none."""
    if average is None:
        return None
    one = lambda old, new: (ema * old + (1 - ema) * new).astype(old.dtype)
    average = jax.tree.map(one, average, _averageable(model))
    if not isinstance(model, SparseModel):
        return average
    # A weight that was dropped starts anew at zero if it comes back, and so does its average.
    return SparseModel(map_masked(where_kept, average.model, model.mask), average.mask)


def _averageable(model: PyTree) -> PyTree:
    """The parameters of `model`; what a pruned weight hides is no part of an average."""
    narrow = lambda a: jnp.issubdtype(a.dtype, jnp.floating) and a.dtype.itemsize < 4
    params = parameters(with_zeros(model))
    return jax.tree.map(lambda a: a.astype(jnp.float32) if narrow(a) else a, params)


def _penalised(model: PyTree, masked: bool) -> list[Array]:
    if not isinstance(model, SparseModel):
        return prunable_leaves(model)
    return kept_weights(model, masked=masked)


def with_zeros(model: PyTree) -> PyTree:
    """The model with its pruned weights set to zero."""
    return SparseModel(model.to_dense(), model.mask) if isinstance(model, SparseModel) else model


def _of_kept(gradient: PyTree, model: PyTree) -> PyTree:
    """A gradient by the weights of `model`, with zeros where these are pruned."""
    if not isinstance(model, SparseModel):
        return gradient
    zeros = map_masked(where_kept, gradient.model, model.mask)
    return eqx.tree_at(lambda found: found.model, gradient, zeros)


def _keep_pruned(after: PyTree, before: PyTree) -> PyTree:
    """`after`, with the pruned weights of `before` under the mask."""
    if not isinstance(before, SparseModel):
        return after
    keep = lambda m, new, old: new if m is None else jnp.where(m, new, old)
    weights = jax.tree.map(
        keep, before.mask, after.model, before.model, is_leaf=lambda leaf: leaf is None
    )
    return SparseModel(weights, before.mask)
