"""`ntt_step`: one step of a transfer; `ntt_evaluate`: what a batch says of a state."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped

from .._distribute import left_to_xla, lost_unless_shared
from .._examples import as_inference
from .._ntk import index_masks, is_index, stored
from .._optimise import learning_rate, optimise
from .._parameters import partition_parameters
from .._sparse import SparseModel, map_masked
from .._sparse_layers import (
    KeptEntries,
    current_entries,
    is_called_alike,
    like_model,
    on_entries,
)
from .._stateful import advanced
from .._step_info import StepInfo
from ._ntt_loss import NTTMetrics, halves, loss_at, with_rate
from ._state import NTTState, check_state
from ._view import RefreshView


def ntt_step(state: NTTState, x: Shaped[Array, "batch ..."]) -> tuple[NTTState, NTTMetrics]:
    """One step of the optimiser on an unlabelled batch; use it as `eqx.filter_jit(ntt_step)`.

    When its refresh is due the mask is taken again: in the published recipe from the magnitudes of
    the dense student weights, after every `mask_every` steps, except within the last `mask_every`
    of `num_steps`. Under a schedule of the density it is taken at the schedule's end and after the
    last step, too. Shapes never change, so nothing is compiled again.

    **Arguments:**

    - `state`: from `ntt_init` or the step before.
    - `x`: `[batch, ...]`, an even number of samples. `jit` takes the bytes of a NumPy array for
      native ones before this function sees it; `transfer` converts other byte orders.

    **Returns:**

    The next state, and the metrics of the batch before the update. Where the refresh's scores
    cannot rank the weights (all zero, NaN), their layers are empty and the loss is NaN.

    **Raises:**

    `ValueError` for samples whose shape or dtype does not suit, raw pixels among them.
    """
    check_state("ntt_step", state)
    return left_to_xla(_stepped, state, halves("ntt_step", x), like=(state, None))


def ntt_evaluate(state: NTTState, x: Shaped[Array, "batch ..."]) -> NTTMetrics:
    """The metrics of a state on an unlabelled batch, without an update; use `eqx.filter_jit`.

    **Arguments:**

    - `state`: from `ntt_init` or a step.
    - `x`: `[batch, ...]`, an even number of samples.

    **Returns:**

    The `NTTMetrics` that `ntt_step` would give for this batch.

    **Raises:**

    `ValueError` for samples whose shape or dtype does not suit, raw pixels among them.
    """
    check_state("ntt_evaluate", state)
    return left_to_xla(_evaluated, state, halves("ntt_evaluate", x))


def _stepped(state: NTTState, x: Array) -> tuple[NTTState, NTTMetrics]:
    method = state.method
    # The one place of a step at which entries of the mask are looked for: to do so takes longer to
    # compile than the kernel. So the refresh leaves it to the next step, which sees another mask.
    index = index_masks(state.student.mask, state.support)
    entries, room = current_entries(state.student.model, state.student.mask, state.entries)
    # The student's weights move, and the statistics of its batch norms with them. They come first,
    # so that loss, kernel and gradient are those of one and the same network.
    student = advanced(state.student, x)
    params, static = partition_parameters(student)
    params = lost_unless_shared(params, x)

    def loss(params: Any) -> tuple[Array, NTTMetrics]:
        return _loss(state, eqx.combine(params, static), x, index, entries, room)

    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    params, opt_state = optimise(
        method.optimizer,
        gradient,
        state.opt_state,
        params,
        value=value,
        value_fn=lambda params: loss(params)[0],
    )
    student = _settled(eqx.combine(params, static), state.student, method.pruned)
    step = state.step + 1
    student, lost = _refreshed(state, student, step, x)
    metrics = with_rate(metrics, learning_rate(opt_state))
    if lost is not None:
        metrics = eqx.tree_at(lambda m: m.loss, metrics, jnp.where(lost, jnp.nan, metrics.loss))
    state = dataclasses.replace(
        state,
        student=student,
        opt_state=opt_state,
        step=step,
        support=stored(index),
        entries=entries,
    )
    return state, metrics


def _loss(
    state: NTTState,
    student: SparseModel,
    x: Array,
    index: Any,
    entries: dict[str, KeptEntries],
    room: Bool[Array, ""],
) -> tuple[Array, NTTMetrics]:
    """The loss of a student whose layers with `entries` are evaluated on their kept weights."""
    density = student.density()
    if entries:
        kept = on_entries(student, entries, room)
        if is_called_alike(as_inference(student), as_inference(kept), entries, x[0]):
            student, index = kept, like_model(kept.model, index, is_leaf=is_index)
    value, metrics = loss_at(state.method.loss, student, state.teacher, x, state.step_info(index))
    return value, eqx.tree_at(lambda m: m.density, metrics, density)


def _evaluated(state: NTTState, x: Array) -> NTTMetrics:
    state = lost_unless_shared(state, x)
    student = state.student
    entries, room = current_entries(student.model, student.mask, state.entries)
    _, metrics = _loss(state, student, x, state.support, entries, room)
    return with_rate(metrics, learning_rate(state.opt_state))


def _settled(student: SparseModel, before: SparseModel, pruned: str) -> SparseModel:
    """The student with what `pruned` says under its mask."""
    if pruned == "free":
        return student
    old = iter([w for w, m in _masked_pairs(before)])

    def one(weight: Array, mask: Array) -> Array:
        hidden = next(old)
        return jnp.where(mask, weight, hidden if pruned == "frozen" else jnp.zeros_like(weight))

    return SparseModel(map_masked(one, student.model, student.mask), student.mask)


def _masked_pairs(sparse: SparseModel) -> list[tuple[Array, Array]]:
    pairs: list[tuple[Array, Array]] = []
    map_masked(lambda w, m: pairs.append((w, m)), sparse.model, sparse.mask)
    return pairs


def _refreshed(
    state: NTTState, student: SparseModel, step: Int[Array, ""], x: Array
) -> tuple[SparseModel, Bool[Array, ""] | None]:
    """The student after the refresh, if one is due, and whether that made no mask.

    Scores that cannot rank the weights leave layers empty (`Sparsity.lost`): the loss of the step
    is NaN then, which ends a run.
    """
    method = state.method
    due = method.due(step)
    if due is False:
        return student, None
    sparsity = method.sparsity

    def again() -> tuple[Any, Any]:
        density = sparsity.overall(student.mask, step)
        key = jax.random.fold_in(state.step_info().key, 1)
        view = RefreshView(
            student=student,
            teacher=state.teacher,
            x=x,
            info=StepInfo(step, key, density),
            loss=method.loss,
        )
        return sparsity.mask_or_lost(method.refresh.scores(view), step)

    stays = lambda: (student.mask, jnp.zeros((), bool))
    mask, lost = jax.lax.cond(due, again, stays)
    return student.with_mask(mask), lost
