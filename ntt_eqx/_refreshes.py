"""Refreshes: when a network gets a new mask, and from which scores."""

import abc
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ._checks import MOST, asked_for_values, check_count
from ._masks import GradualDensity, Sparsity
from ._masks._allocation import check_density
from ._masks._select import select
from ._scores import AbstractLabelFreeScore, split_weights
from ._scores._base import fresh
from ._sparse import SparseModel, count_kept
from ._step_info import StepInfo, key_of_seed
from ._types import MaskTree, PyTree, ScoreTree, widen


class AbstractRefreshView(eqx.Module):
    """The inputs of a refresh, in a transfer (`RefreshView`) or in training (`TrainView`).

    Attributes:
        student: the model after the step.
        x: the inputs of the step's batch `[batch, ...]`.
        info: number of steps done, a key for this refresh, the density.
    """

    student: eqx.AbstractVar[SparseModel]
    x: eqx.AbstractVar[Array]
    info: eqx.AbstractVar[StepInfo]

    def weights(self) -> PyTree:
        """The prunable weights, those under the mask too; `None` elsewhere.

        In training pruned weights are zero.
        """
        return split_weights(self.student.model, self.student.mask)[0]

    @abc.abstractmethod
    def dense_gradient(self) -> PyTree:
        """The gradient of the loss by every prunable weight, kept or not; pruned ones are zero."""


class AbstractRefresh(eqx.Module):
    """When a network gets a new mask, and from which scores.

    A refresh returns scores. The `Sparsity` of the transfer or of the training makes the mask that
    keeps the highest, so counts, allocation and pattern hold for every refresh.
    """

    @abc.abstractmethod
    def due(self, step: Int[Array, ""]) -> Bool[Array, ""] | bool:
        """Whether the mask is refreshed after `step` steps; the constant `False` means never."""

    @abc.abstractmethod
    def scores(self, view: AbstractRefreshView) -> ScoreTree:
        """A score for each prunable weight, `None` elsewhere; the highest are kept."""

    def check_pattern(self, sparsity: Sparsity, mask: MaskTree) -> None:
        """Raise `ValueError` for a sparsity whose pattern the scores cannot rank; none by default.

        **Arguments:**

        - `sparsity`: what makes masks of the scores.
        - `mask`: a mask of the model.
        """


class AbstractPeriodicRefresh(AbstractRefresh):
    """A refresh after every `every` steps.

    Attributes:
        every: steps between two refreshes.
        until: the last ones are before this step; `None` for no end.
    """

    every: eqx.AbstractVar[int]
    until: eqx.AbstractVar[int | None]

    def __check_init__(self) -> None:
        """Reject invalid step numbers."""
        name = type(self).__name__
        check_count(f"{name}: every", self.every)
        check_count(f"{name}: until", self.until, -MOST, none=True)

    def due(self, step: Int[Array, ""]) -> Bool[Array, ""] | bool:
        """After every `every` steps, before `until`."""
        due = step % self.every == 0
        return due if self.until is None else due & (step < self.until)


class MagnitudeRefresh(AbstractPeriodicRefresh):
    """Score by the magnitudes of the dense weights, as published; a pruned weight may come back.

    Under a density schedule this is gradual magnitude pruning. In training, where pruned weights
    are zero, none comes back (Zhu & Gupta, 2017, arXiv 1710.01878).

    Attributes:
        every: steps between two refreshes.
        until: the last ones are before this step; `None` for no end.
    """

    every: int = eqx.field(static=True, default=100)
    until: int | None = eqx.field(static=True, default=None)

    def scores(self, view: AbstractRefreshView) -> ScoreTree:
        """The absolute value of each weight."""
        return jax.tree.map(jnp.abs, view.weights())


class ScoreRefresh(AbstractPeriodicRefresh):
    """Apply any label-free score to the sparse student, on the batch of the step.

    Attributes:
        score: the score.
        every: steps between two refreshes.
        until: the last ones are before this step; `None` for no end.
    """

    score: AbstractLabelFreeScore
    every: int = eqx.field(static=True)
    until: int | None = eqx.field(static=True)

    # Type checkers put the fields that the base declares before those of this class.
    def __init__(
        self, score: AbstractLabelFreeScore, every: int = 100, until: int | None = None
    ) -> None:
        """Set the fields.

        **Arguments:**

        - `score`: the score.
        - `every`: steps between two refreshes.
        - `until`: the last ones are before this step; `None` for no end.
        """
        self.score, self.every, self.until = score, every, until

    def scores(self, view: AbstractRefreshView) -> ScoreTree:
        """The scores; a random score draws with a new key at each refresh.

        Most scores of a pruned weight are 0, and those of a kept weight whose unit is silent on
        this batch are 0, too. Between the two the kept one stays.
        """
        scores = fresh(self.score, view.info.step)(view.student, view.x)
        return jax.tree.map(_kept_before_pruned, scores, view.student.mask)


def _kept_before_pruned(score: Array, kept: Bool[Array, "..."]) -> Array:
    least = jnp.finfo(score.dtype).smallest_subnormal
    return jnp.where(kept & (score == 0), jnp.asarray(least, score.dtype), score)


def cannot_rank(caller: str, refresh: AbstractRefresh, step: int, keep: str) -> ValueError:
    """The error where the refresh after `step` made no mask; `keep` says how to do without one.

    NaN weights make no mask either, so that this is raised only where the weights before the step,
    and its batch, are finite.
    """
    return ValueError(
        f"{caller}: the scores of {type(refresh).__name__} cannot rank the weights after step "
        f"{step} (most of a layer equal, zero, infinite or NaN), so that no mask can be taken from "
        f"them; look at what they measure there, or keep the mask ({keep})."
    )


class AbstractDropAndGrow(AbstractPeriodicRefresh):
    """A refresh that drops a share of each layer's kept weights, and grows others in their place.

    Attributes:
        fraction: the share, in (0, 1).
    """

    fraction: eqx.AbstractVar[float]

    def __check_init__(self) -> None:
        """Reject a fraction outside of (0, 1)."""
        if not 0 < self.fraction < 1:
            name = type(self).__name__
            raise ValueError(f"{name}: fraction must be in (0, 1), got {self.fraction!r}.")

    def check_pattern(self, sparsity: Sparsity, mask: MaskTree) -> None:
        """Raise `ValueError` if `sparsity` ranks means of scores.

        What stays has scores above all others. Where most of a group stays, so does its mean, and
        the mask would never change.
        """
        named = jax.tree_util.tree_leaves_with_path(mask)
        shapes = {jax.tree_util.keystr(path): tuple(leaf.shape) for path, leaf in named}
        if (name := sparsity.pooled_layer(shapes)) is not None:
            raise ValueError(
                f"{type(self).__name__}: drops and grows single weights, but the pattern "
                f"{sparsity.pattern} keeps groups of {name} by the mean of their scores, which "
                "would never change; take MagnitudeRefresh() or ScoreRefresh(score), or a pattern "
                "of single weights."
            )


class RigLRefresh(AbstractDropAndGrow):
    """Drop kept weights of small magnitude, grow pruned ones of large gradient (RigL).

    Evci et al., ICML 2020, arXiv 1911.11134, with the transfer loss in place of the supervised one.
    In each layer the share `f_t = fraction / 2 · (1 + cos(π t / until))` with the
    smallest magnitude among the kept weights is dropped, none after `until` (a constant `fraction`
    if it is `None`). The weights with the largest gradients replace them; a dropped weight may
    return. In the paper grown weights start at zero: `NeuralTangentTransfer(pruned="zero")`.

    Attributes:
        every: steps between two refreshes.
        until: T_end; `None` for no end.
        fraction: share of kept weights that the first refresh drops, in (0, 1).
    """

    every: int = eqx.field(static=True, default=100)
    until: int | None = eqx.field(static=True, default=None)
    fraction: float = eqx.field(static=True, default=0.3)

    def scores(self, view: AbstractRefreshView) -> ScoreTree:
        """Scores in [2, 3] for weights that stay, in [0, 1] for all others."""
        slopes = jax.tree.map(lambda g: jnp.abs(widen(g)), view.dense_gradient())
        steepest = jnp.stack(
            [jnp.max(g).astype(jnp.float32) for g in jax.tree.leaves(slopes)]
        ).max()
        growth = jax.tree.map(lambda g: _unit(g.astype(jnp.float32), steepest), slopes)
        share = jnp.asarray(self.fraction, jnp.float32)
        if self.until is not None:
            time = view.info.step.astype(jnp.float32) / self.until
            time = jnp.minimum(time, 1.0)  # a schedule of the density may refresh later, too
            share = share / 2 * (1 + jnp.cos(math.pi * time))
        return _drop_and_grow(view, share, growth)


class SETRefresh(AbstractDropAndGrow):
    """Drop kept weights of small magnitude, grow random ones in their place (SET).

    Mocanu et al., Nature Communications 2018, arXiv 1707.04780. In each layer the share `fraction`
    with the smallest magnitude among the kept weights is dropped; the paper takes it from positive
    and negative weights apart. A dropped weight may return.

    Attributes:
        every: steps between two refreshes; an epoch in the paper.
        until: the last ones are before this step; `None` for no end.
        fraction: share of kept weights that each refresh drops, in (0, 1): zeta.
        seed: of the random choices, which follow from it and the step.
    """

    every: int = eqx.field(static=True, default=100)
    until: int | None = eqx.field(static=True, default=None)
    fraction: float = eqx.field(static=True, default=0.3)
    seed: int = eqx.field(static=True, default=0)

    def __check_init__(self) -> None:
        """Reject a negative seed."""
        check_count("SETRefresh: seed", self.seed, 0)

    def scores(self, view: AbstractRefreshView) -> ScoreTree:
        """Scores in [2, 3] for weights that stay, random ones in [0, 1) for all others."""
        masks, treedef = jax.tree.flatten(view.student.mask)
        key = jax.random.fold_in(key_of_seed(self.seed), view.info.step)
        keys = jax.random.split(key, len(masks))
        drawn = [jax.random.uniform(k, m.shape) for k, m in zip(keys, masks, strict=True)]
        share = jnp.asarray(self.fraction, jnp.float32)
        if self.until is not None:  # a schedule of the density may refresh later, too
            share = jnp.where(view.info.step < self.until, share, 0.0)
        return _drop_and_grow(view, share, treedef.unflatten(drawn))


class RoundRefresh(AbstractRefresh):
    """Score by the magnitudes of the kept weights at the end of each round of training.

    The refresh of lottery tickets (Frankle & Carbin, 2019, arXiv 1803.03635; with rewinding
    Frankle et al., 2020, arXiv 1912.05671): after `steps` steps the smallest weights are pruned and
    the network goes back to where it was after `rewind` steps, so that each further round takes
    `steps - rewind`. See `lottery_ticket`.

    Attributes:
        steps: length of one training.
        rounds: how often it is pruned.
        rewind: steps after which the weights are those that a round starts from.
    """

    steps: int = eqx.field(static=True)
    rounds: int = eqx.field(static=True)
    rewind: int = eqx.field(static=True, default=0)

    def __check_init__(self) -> None:
        """Reject counts out of range."""
        check_count("RoundRefresh: steps", self.steps)
        check_count("RoundRefresh: rounds", self.rounds)
        check_count("RoundRefresh: rewind", self.rewind, 0)
        if self.rewind >= self.steps:
            raise ValueError(
                f"RoundRefresh: rewind must be below steps={self.steps}, got {self.rewind}."
            )

    @property
    def end(self) -> int:
        """The step of the last refresh."""
        return self.steps + (self.rounds - 1) * (self.steps - self.rewind)

    @property
    def num_steps(self) -> int:
        """The steps of all trainings, that of the last mask included."""
        return self.steps + self.rounds * (self.steps - self.rewind)

    def done(self, step: Int[Array, ""] | int) -> Any:
        """The number of refreshes up to `step`, that at `step` included."""
        over = (step - self.steps) // (self.steps - self.rewind) + 1
        return jnp.clip(over, 0, self.rounds)

    def due(self, step: Int[Array, ""]) -> Bool[Array, ""] | bool:
        """At the end of each round."""
        return self.done(step) > self.done(step - 1)

    def scores(self, view: AbstractRefreshView) -> ScoreTree:
        """The absolute value of each weight."""
        return jax.tree.map(jnp.abs, view.weights())


class RoundDensity(eqx.Module):
    """The density of a lottery ticket after a number of steps: `final^(n / rounds)` after n rounds.

    Each round keeps the same share of what the round before it kept.

    Attributes:
        final: the density in the end.
        refresh: the rounds.
    """

    final: float = eqx.field(static=True)
    refresh: RoundRefresh

    def __check_init__(self) -> None:
        """Reject a density outside of (0, 1]."""
        check_density(self.final, "RoundDensity: final")

    @property
    def end(self) -> int:
        """The step at which the final density is reached."""
        return self.refresh.end

    def __call__(self, step: Int[Array, ""] | int) -> Any:
        """The density after `step` steps."""
        done = jnp.asarray(self.refresh.done(step))
        power = jnp.float32(self.final) ** (done.astype(jnp.float32) / self.refresh.rounds)
        return jnp.where(done == self.refresh.rounds, jnp.float32(self.final), power)


class NoRefresh(AbstractRefresh):
    """Keep the first mask."""

    def due(self, step: Int[Array, ""]) -> Bool[Array, ""] | bool:
        """Never."""
        return False

    def scores(self, view: AbstractRefreshView) -> ScoreTree:
        """The mask itself."""
        return jax.tree.map(lambda m: m.astype(jnp.float32), view.student.mask)


def _drop_and_grow(
    view: AbstractRefreshView, share: Float[Array, ""], growth: ScoreTree
) -> ScoreTree:
    """Scores that keep the largest of each layer's kept weights, then those of highest `growth`.

    The share `share` of the kept weights is dropped. Scores are in [2, 3] for weights that stay;
    the others have their `growth`, in [0, 1].
    """

    def one(mask: Array, weight: Array, grown: Array) -> Array:
        size = jnp.abs(weight).astype(jnp.float32)
        kept = count_kept(mask)
        dropped = jnp.round(share * kept.astype(jnp.float32)).astype(jnp.int32)
        ranked = jnp.where(mask, size, -jnp.inf).reshape(-1)
        stays, unranked = select(ranked, kept - dropped)
        stays = stays.reshape(mask.shape)
        found = jnp.where(stays, 2.0 + _unit(size, jnp.max(size)), grown)
        return jnp.where(unranked, jnp.nan, found)  # `Sparsity` rejects NaN scores

    return jax.tree.map(one, view.student.mask, view.weights(), growth)


def _unit(a: Array, top: Array) -> Array:
    return a / jnp.maximum(top, jnp.finfo(jnp.float32).tiny)


def due_steps(refresh: AbstractRefresh, sparsity: Sparsity, first: int, last: int) -> list[int]:
    """The steps from `first` to `last` that have a refresh behind them."""
    steps = np.arange(first, last + 1, dtype=np.int32)
    due = lambda step: jnp.asarray(refresh_due(refresh, sparsity, step))
    return steps[np.asarray(jax.jit(jax.vmap(due))(steps))].tolist() if len(steps) else []


def refresh_due(
    refresh: AbstractRefresh,
    sparsity: Sparsity,
    step: Int[Array, ""],
    num_steps: int | None = None,
) -> Bool[Array, ""] | bool:
    """Whether a mask is refreshed after `step` steps; the constant `False` means never.

    The refresh decides. With a schedule of the density the mask is refreshed at the schedule's end
    and after the last step as well, so that the last mask has the last density; of a
    `GradualDensity`, which changes no more after its end, there alone.
    """
    with asked_for_values(f"{type(refresh).__name__}: `due` asks for the value of its step"):
        due = refresh.due(step)
    if due is False or not callable(sparsity.density):
        return due
    gradual = isinstance(sparsity.density, GradualDensity)
    for last in (None if gradual else num_steps, sparsity.end):
        due = due if last is None else due | (step == last)
    return due
