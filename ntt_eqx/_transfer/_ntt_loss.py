"""`ntt_loss`: the transfer loss of any two models, and what it says of a batch."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from .._checks import check_batch, check_key, sample_of, sample_output
from .._examples import check_kind
from .._sparse import SparseModel, kept_weights
from .._step_info import StepInfo, key_of_seed
from .._types import PyTree, squared_norm
from ._config import NTTConfig
from ._loss import AbstractTransferLoss
from ._method import NeuralTangentTransfer


class NTTMetrics(eqx.Module):
    """The metrics of one batch: float32 scalars, or `None` for metrics that the loss lacks.

    Attributes:
        loss: the transfer loss L.
        kernel_distance: mean squared difference of the kernels' entries; `None` if the loss
            uses no kernel.
        target_distance: mean squared difference of the outputs; `None` if the loss has no such
            term.
        weight_norm: sum of squares of the kept weights.
        density: share of prunable weights kept.
        learning_rate: the optimiser's, if its state has one (`optax.inject_hyperparams`); `None`
            otherwise.
        terms: further terms of the loss, by name.
    """

    loss: Float[Array, ""]
    kernel_distance: Float[Array, ""] | None
    target_distance: Float[Array, ""] | None
    weight_norm: Float[Array, ""]
    density: Float[Array, ""]
    learning_rate: Float[Array, ""] | None
    terms: dict[str, Float[Array, ""]]


def ntt_loss(
    student: SparseModel,
    teacher: PyTree,
    x: Shaped[Array, "batch ..."],
    config: NTTConfig | NeuralTangentTransfer,
    *,
    key: PRNGKeyArray | None = None,
) -> tuple[Float[Array, ""], NTTMetrics]:
    """The transfer loss of two models on an unlabelled batch.

    If you have a state, `ntt_evaluate` is faster and uses the state's step.

    **Arguments:**

    - `student`, `teacher`: models of one sample; dropout is off in both.
    - `x`: `[batch, ...]`, an even number of samples: the kernel is taken between its halves.
    - `config`: the loss and the density; a schedule's is the one at step 0.
    - `key`: what a sketch's directions are drawn from; the same ones at every call without.

    **Returns:**

    The loss, and all its terms as `NTTMetrics`.

    **Raises:**

    `ValueError` for a batch of odd size or of fewer than two samples, one that is neither of floats
    nor of signed integers, and for models that do not suit it or each other.
    """
    x = halves("ntt_loss", x)
    sparsity = config.sparsity if isinstance(config, NeuralTangentTransfer) else config.sparsity()
    loss = config.loss if isinstance(config, NeuralTangentTransfer) else config.loss()
    key = jax.random.fold_in(key_of_seed(0), 0) if key is None else key
    check_key("ntt_loss", key)
    info = StepInfo(jnp.zeros((), jnp.int32), key, sparsity.overall(student.mask))
    return loss_at(loss, student, teacher, x, info)


def loss_at(
    loss: AbstractTransferLoss, student: SparseModel, teacher: PyTree, x: Any, info: StepInfo
) -> tuple[Float[Array, ""], NTTMetrics]:
    """The loss at a info of a transfer, and what it says."""
    check_halves("ntt_loss", x)
    student, teacher = eqx.nn.inference_mode(student), eqx.nn.inference_mode(teacher)
    one, two = (sample_output("ntt_loss", m, sample_of(x)).shape for m in (student, teacher))
    if one != two:
        raise ValueError(
            f"ntt_loss: the student's outputs have the shape {one}, the teacher's {two}."
        )
    value, terms = loss(student, teacher, x, info)
    if "weight_norm" not in terms:
        squares = [squared_norm(w) for w in kept_weights(student)]
        terms = {**terms, "weight_norm": sum(squares)}
    known = ("kernel_distance", "target_distance", "weight_norm")
    scalar = lambda v: jnp.asarray(v, jnp.float32)
    distances = [scalar(terms[name]) if name in terms else None for name in known[:2]]
    metrics = NTTMetrics(
        scalar(value),
        *distances,
        weight_norm=scalar(terms["weight_norm"]),
        density=scalar(student.density()),
        learning_rate=None,
        terms={name: scalar(v) for name, v in terms.items() if name not in known},
    )
    return value, metrics


def with_rate(metrics: NTTMetrics, rate: Float[Array, ""] | None) -> NTTMetrics:
    """The metrics with a learning rate."""
    return eqx.tree_at(lambda m: m.learning_rate, metrics, rate, is_leaf=lambda leaf: leaf is None)


def halves(caller: str, x: Any) -> Array:
    """The samples as an array, by shape and dtype alone.

    **Raises:**

    `ValueError` unless there is an even number of them, of floats or signed integers.
    """
    check_halves(caller, x)
    return check_kind(caller, x)


def check_halves(caller: str, x: Any) -> None:
    """Raise `ValueError` unless `x` holds an even number of samples, two at least."""
    if len(getattr(x, "shape", ())) < 1:
        check_batch(caller, x)
    if x.shape[0] < 2 or x.shape[0] % 2:
        raise ValueError(
            f"{caller}: the batch must hold an even number of samples, got {x.shape[0]}."
        )
