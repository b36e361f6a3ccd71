"""Objectives: the loss and the metrics of supervised training."""

import abc
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from .._batch import as_array, as_arrays, pair
from .._checks import check_finite, check_weight, sample_of, sample_output
from .._examples import as_inference, check_examples, check_samples, softmax_cross_entropy
from .._sparse import SparseModel
from .._stateful import check_state_on_top, forward, has_state, in_training_mode, state_of
from .._types import PyTree, widen

Values: TypeAlias = Float[Array, ""] | Float[Array, " batch"]
"""A mean over the batch, or one value per sample."""

Objective: TypeAlias = Callable[[Any, Any, PRNGKeyArray | None], Any]
"""`(model, batch, key) -> loss`, `-> (loss, {name: metric})`, or these two and the model after it.

See `AbstractObjective`."""


class AbstractObjective(eqx.Module):
    """A loss and its metrics for `train` and `evaluate`, with a check of the data.

    `train` and `evaluate` also take any function with the signature of `__call__`. Use a Module if
    the objective has arrays of its own that are not trained, such as class weights or a teacher.
    """

    @abc.abstractmethod
    def __call__(
        self, model: PyTree, batch: PyTree, key: PRNGKeyArray | None
    ) -> Values | tuple[Values, Mapping[str, Any]] | tuple[Values, Mapping[str, Any], PyTree]:
        """The loss of a batch, and its metrics.

        **Arguments:**

        - `model`: the plain model of one sample, with exact zeros where a `SparseModel` has them.
          Without a `key` dropout is off; `evaluate` puts the model into inference mode.
        - `batch`: a batch as the data yields it, with JAX arrays as leaves.
        - `key`: a new key at every step if the run was given one; otherwise, and in `evaluate`,
          `None`.

        **Returns:**

        The loss, and metrics by name if there are any. Each is one value per sample, `[batch]`,
        whose mean is taken, or a scalar that is the mean over the batch already. For models with a
        state, a third value: the model after the batch, from `ntt.forward(model, x, key)`.
        """

    @abc.abstractmethod
    def check(self, caller: str, model: PyTree, batch: PyTree) -> None:
        """Raise `ValueError` when the batch and the model do not fit; called once a run."""


class CrossEntropy(AbstractObjective):
    """Softmax cross-entropy of logits `[classes]` against integer labels, and the accuracy.

    Attributes:
        label_smoothing: share of the target that is spread evenly over all classes, in [0, 1)
            (Szegedy et al., 2016).
    """

    label_smoothing: float = eqx.field(static=True, default=0.0)

    def __check_init__(self) -> None:
        """Reject a share outside of [0, 1)."""
        check_weight("CrossEntropy: label_smoothing", self.label_smoothing)
        if self.label_smoothing >= 1:
            raise ValueError(
                f"CrossEntropy: label_smoothing must be below 1, got {self.label_smoothing!r}."
            )

    def __call__(
        self, model: PyTree, batch: PyTree, key: PRNGKeyArray | None
    ) -> tuple[Float[Array, " batch"], dict[str, Bool[Array, " batch"]], PyTree]:
        """Cross-entropy in nats, and whether the largest logit is that of the label."""
        x, y = pair("CrossEntropy", batch)
        logits, after = outputs(model, x, key)
        y = y if y.dtype.itemsize >= 4 else y.astype(jnp.int32)
        hits = jnp.argmax(logits, axis=1).astype(y.dtype) == y
        losses = softmax_cross_entropy(logits, y, self.label_smoothing)
        return losses, {"accuracy": hits}, after

    def check(self, caller: str, model: PyTree, batch: PyTree) -> None:
        """Raise `ValueError` unless the labels are those of the model's classes."""
        check_examples(caller, model, batch)


CROSS_ENTROPY = CrossEntropy()
"""The default objective."""


class SquaredError(AbstractObjective):
    """Squared error of the outputs against targets of the same shape, mean over their entries."""

    def __call__(
        self, model: PyTree, batch: PyTree, key: PRNGKeyArray | None
    ) -> tuple[Float[Array, " batch"], dict[str, Any], PyTree]:
        """The mean squared error of each sample."""
        x, y = pair("SquaredError", batch)
        found, after = outputs(model, x, key)
        error = jnp.square(found - widen(y))
        return jnp.mean(error, axis=tuple(range(1, error.ndim))), {}, after

    def check(self, caller: str, model: PyTree, batch: PyTree) -> None:
        """Raise `ValueError` unless the targets are floats of the shape of the outputs."""
        x, y = pair(caller, batch)
        x = check_samples(caller, x)
        out = (x.shape[0], *sample_output(caller, as_inference(model), sample_of(x)).shape)
        y = as_array(caller, "y", y)
        if tuple(y.shape) != out or not jnp.issubdtype(y.dtype, jnp.floating):
            raise ValueError(
                f"{caller}: the model's outputs for this batch have the shape {out}; the targets "
                f"must be floats of that shape, got {y.dtype} of shape {tuple(y.shape)}."
            )
        check_finite(caller, "y", y)


def outputs(
    model: PyTree, x: Array, key: PRNGKeyArray | None
) -> tuple[Float[Array, "batch ..."], PyTree]:
    """`forward`, with the outputs in the dtype of sums."""
    found, after = forward(model, x, key)
    return widen(found), after


def judge(
    objective: Objective, model: PyTree, batch: PyTree, key: PRNGKeyArray | None, *, training: bool
) -> tuple[dict[str, Values], Any]:
    """What a batch says of a model, and the model's state after it.

    **Returns:**

    The loss, under that name, and the metrics, in the dtype of sums; and the next state of a model
    that has one, else `None`.

    **Raises:**

    `ValueError` when `objective` returns something else, or does not advance the state in training.
    """
    plain = model.to_dense() if isinstance(model, SparseModel) else model
    if training:
        check_state_on_top("objective", plain)
        plain = in_training_mode(plain, key)
    else:
        plain = eqx.nn.inference_mode(plain)
    found = objective(plain, batch, key)
    loss, metrics, *after = found if isinstance(found, tuple) else (found, {})
    state = state_of(after[0]) if after else None
    if training and has_state(plain) and state is None:
        raise ValueError(
            "objective: the model has a state, which the objective must advance: take the outputs "
            "from `outputs, model = ntt.forward(model, x, key)`, and return (loss, metrics, model)."
        )
    if not isinstance(metrics, Mapping) or "loss" in metrics:
        raise ValueError(
            "objective: must return a loss, or a loss and a mapping of metrics with other names "
            f"than 'loss', got {found}."
        )
    values = {"loss": jnp.asarray(loss), **{k: jnp.asarray(v) for k, v in metrics.items()}}
    sizes = {leaf.shape[:1] for leaf in jax.tree.leaves(batch)}
    for name, value in values.items():
        real = name != "loss" or jnp.issubdtype(value.dtype, jnp.floating)
        if value.shape not in {(), *sizes} or not real:
            raise ValueError(
                f"objective: {name} must be a {'real ' if name == 'loss' else ''}scalar or one "
                f"value per sample, got {value.dtype} of shape {value.shape}."
            )
    return {name: widen(value) for name, value in values.items()}, state


def readable(caller: str, objective: Objective, batch: Any) -> PyTree:
    """A batch as arrays: of the library's own objectives the pair that they read, else all of it.

    **Raises:**

    `ValueError` for a leaf that is no array, or where there is no pair.
    """
    own = isinstance(objective, CrossEntropy | SquaredError)
    return as_arrays(caller, pair(caller, batch) if own else batch)


def check_step(caller: str, objective: Objective, model: PyTree, batch: PyTree) -> None:
    """Raise `ValueError` when a batch, traced or not, does not suit the library's own objectives.

    The check of another objective may look at values, which a traced batch has not.
    """
    if isinstance(objective, CrossEntropy | SquaredError):
        objective.check(caller, model, batch)


def check_start(caller: str, objective: Objective, model: PyTree, batch: PyTree) -> None:
    """Raise `ValueError` when the first batch does not suit the objective, or is not finite."""
    if isinstance(objective, AbstractObjective):
        objective.check(caller, model, batch)
    for leaf in jax.tree.leaves(batch):
        check_finite(caller, "the batch", leaf)
