"""Runs of training whose large sparse layers store kept weights alone between two looks."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from .._batch import pair
from .._distribute import layout_in_use
from .._examples import as_inference
from .._held import AbstractHeld, Held
from .._optimise import copied
from .._parameters import parameters
from .._refreshes import due_steps
from .._sparse import SparseModel
from .._sparse_layers import (
    KeptEntries,
    Moments,
    is_called_alike,
    is_large,
    kept_entries,
    moments_of,
    off_entries,
    on_entries,
    pays_in_training,
)
from .._stateful import StatefulModel
from .._types import PyTree
from ..kernels import target_device
from ._objective import CrossEntropy, SquaredError
from ._step import TrainConfig, TrainState, with_zeros

_KnownMoments = dict[frozenset[tuple[str, int]], Moments | None]
"""Moments by layers and the number of weights that they have room for; the same for all masks.

`None` where the optimiser does not treat each weight by itself.
"""

_Step = Callable[[Held[TrainState], PyTree], tuple[Held[TrainState], Any, Any]]


@dataclasses.dataclass(frozen=True)
class OnKeptWeights(AbstractHeld[TrainState]):
    """A state whose large layers store kept weights alone.

    Attributes:
        held: that state.
        masked: an earlier state with all weights, under the same mask.
        entries: the places of the kept weights, by the layers' key strings.
        moments: the arrays of the optimiser that belong to these layers.
    """

    held: Held[TrainState]
    masked: TrainState
    entries: dict[str, KeptEntries]
    moments: Moments

    def whole(self) -> TrainState:
        """The masked state; weights and moments under the mask are those of `masked`."""
        return _to_whole(self.held.whole(), self.masked, self.entries, self.moments)


class Steps:
    """Steps of a run, each on kept weights where it computes the same faster.

    Whether it does follows from the state, the batch's size and the step's number alone, so that a
    run that is cut in two takes the same steps.
    """

    def __init__(self, step: _Step, begin: TrainState, num_steps: int):
        """`step`: one step of a state in either form, which may reuse its memory."""
        self._step, self._at = step, int(begin.step)
        self._open = _may_change_form(begin)
        self._due = _refreshes(begin, num_steps) if self._open else frozenset[int]()
        self._tried = False
        self._moments: _KnownMoments = {}

    def __call__(self, state: Any, batch: PyTree) -> tuple[Any, Any, Any]:
        """One step: the next state in either form, the metrics, and the weights' norms before."""
        self._at += 1
        if self._at in self._due:  # a refresh looks at all weights
            state, self._tried = _as_held(state), False
        elif self._open and not self._tried:
            kept, self._tried = on_kept_weights(state.whole(), batch, self._moments), True
            state = state if kept is None else kept
        if not isinstance(state, OnKeptWeights):
            return self._step(state, batch)
        held, metrics, norms = self._step(state.held, batch)
        return dataclasses.replace(state, held=held), metrics, norms


def on_kept_weights(state: TrainState, batch: PyTree, known: _KnownMoments) -> OnKeptWeights | None:
    """The state with its large layers on kept weights, or `None` where it has to stay as it is.

    It stays where no layer pays, where the optimiser does not treat each weight by itself, and
    where the model does something else with a layer's weight than to multiply by it. Neither is
    asked again for layers and rooms whose moments are `known`, to which this adds.
    """
    size, spare = len(jax.tree.leaves(batch)[0]), not _counts_stay(state)
    pays = lambda _, mask: pays_in_training(mask, size)
    model, mask = state.model.model, state.model.mask
    entries = kept_entries(model, mask, pays, _roomy if spare else _exact)
    if not entries:
        return None
    rooms = _rooms(entries)
    if rooms not in known:
        params = with_zeros(state.model)
        moments = moments_of(state.optimizer, params, state.opt_state, entries)
        if moments and not _same_outputs(params, entries, pair("train", batch)[0]):
            return None
        known[rooms] = moments
    moments = known[rooms]
    if moments is None:
        return None
    held = Held.of(copied(_to_kept(state, entries, moments, spare)))  # steps reuse its memory
    return OnKeptWeights(held, state, entries, moments)


def _may_change_form(state: TrainState) -> bool:
    """Whether the loss depends on the model's function alone, on one CPU."""
    if type(state.config.objective) not in (CrossEntropy, SquaredError):
        return False
    if target_device().platform != "cpu" or layout_in_use() is not None:
        return False
    model = state.model
    if not isinstance(model, SparseModel) or isinstance(model.model, StatefulModel):
        return False
    if not any(is_large(mask) for mask in jax.tree.leaves(model.mask)):
        return False
    dynamic = state.config.dynamic
    return dynamic is None or dynamic.rewind is None


def _counts_stay(state: TrainState) -> bool:
    """Whether each layer keeps as many weights as it does now until the run's end."""
    dynamic = state.config.dynamic
    if dynamic is None:
        return True
    if dynamic.sparsity.scope != "layer":
        return False
    end = dynamic.sparsity.end if callable(dynamic.sparsity.density) else 0
    return end is not None and int(state.step) >= end


def _rooms(entries: Mapping[str, KeptEntries]) -> frozenset[tuple[str, int]]:
    return frozenset((name, one.index.kept) for name, one in entries.items())


def _exact(count: int, size: int) -> int:
    return count


def _roomy(count: int, size: int) -> int:
    """Room for a number of weights that changes: each room compiles a program, so there are few."""
    room = size
    while room // 2 >= count:
        room //= 2
    return room


def _refreshes(state: TrainState, num_steps: int) -> frozenset[int]:
    """The steps of the run that have a refresh behind them."""
    dynamic = state.config.dynamic
    if dynamic is None:
        return frozenset()
    first = int(state.step) + 1
    return frozenset(due_steps(dynamic.refresh, dynamic.sparsity, first, num_steps))


def _as_held(state: AbstractHeld[TrainState]) -> Held[TrainState]:
    return state if isinstance(state, Held) else Held.of(copied(state.whole()))


@eqx.filter_jit
def _to_kept(
    masked: TrainState, entries: dict[str, KeptEntries], moments: Moments, spare: bool
) -> TrainState:
    to_kept = lambda model: on_entries(model, entries, jnp.ones((), bool), spare=spare)
    average = masked.average
    if average is not None:
        average = parameters(to_kept(average))
    config = masked.config
    return dataclasses.replace(
        masked,
        model=to_kept(masked.model),
        opt_state=moments.to_kept(masked.opt_state, entries),
        config=TrainConfig(config.l2_weight, config.objective, config.ema),
        average=average,
    )


@eqx.filter_jit
def _to_whole(
    kept: TrainState, masked: TrainState, entries: dict[str, KeptEntries], moments: Moments
) -> TrainState:
    average = kept.average
    if average is not None:
        average = off_entries(average, masked.average, entries)
    return dataclasses.replace(
        kept,
        model=off_entries(kept.model, masked.model, entries),
        opt_state=moments.to_whole(kept.opt_state, entries, masked.opt_state),
        config=masked.config,
        average=average,
    )


def _same_outputs(model: SparseModel, entries: dict[str, KeptEntries], x: Any) -> bool:
    """Whether the model computes the same with the weights replaced, on these inputs."""
    try:
        return bool(_compare(model, entries, x))
    except Exception:  # whatever a model raises that reads what the layers do not have
        return False


@eqx.filter_jit
def _compare(model: SparseModel, entries: dict[str, KeptEntries], x: Array) -> Bool[Array, ""]:
    kept = as_inference(on_entries(model, entries, jnp.ones((), bool)))
    model = as_inference(model)
    if not is_called_alike(model, kept, entries, x[0]):  # equal now, they may differ after a step
        return jnp.zeros((), bool)
    one, other = (jax.vmap(each)(x) for each in (model, kept))
    if one.shape != other.shape:
        return jnp.zeros((), bool)
    # far above rounding, so that no run decides by chance, and far below another function
    least = float(jnp.finfo(one.dtype).eps) ** 0.5 * jnp.max(jnp.abs(one), initial=0.0)
    return jnp.max(jnp.abs(one - other), initial=0.0) <= least
