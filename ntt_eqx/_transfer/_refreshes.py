"""Refreshes: when a student gets a new mask, and from which scores."""

import abc
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree

from .._checks import MOST, check_count
from .._masks._select import select
from .._scores import AbstractLabelFreeScore, split_weights
from .._scores._base import fresh
from .._sparse import SparseModel, count_kept
from .._types import ScoreTree, widen
from ._loss import AbstractTransferLoss, StepInfo


class RefreshView(eqx.Module):
    """The inputs of a refresh.

    Attributes:
        student: the student after the step; dense weights live on under its mask.
        teacher: the dense model, fixed.
        x: the step's batch `[batch, ...]`.
        info: number of steps done, a key for this refresh, the density.
        loss: the transfer loss.
    """

    student: SparseModel
    teacher: Any
    x: Array
    info: StepInfo
    loss: AbstractTransferLoss

    def weights(self) -> PyTree:
        """The prunable weights, those under the mask too; `None` elsewhere."""
        return split_weights(self.student.model, self.student.mask)[0]

    def dense_gradient(self) -> PyTree:
        """The gradient of the transfer loss by every prunable weight, kept or not.

        The model is evaluated at the masked network, where pruned weights are zero, while the
        active kernel keeps summing over the student's mask: the gradient says how the loss changes
        if a pruned weight leaves zero. A custom loss gets this from `outputs_and_kernels`.
        """
        student = eqx.nn.inference_mode(self.student)
        weights, rest = split_weights(student.to_dense(), student.mask)
        ones = jax.tree.map(jnp.ones_like, student.mask)
        teacher = eqx.nn.inference_mode(self.teacher)
        info = StepInfo(self.info.step, self.info.key, self.info.density, metric_mask=student.mask)

        def value(weights: PyTree) -> Array:
            opened = SparseModel(eqx.combine(weights, rest), ones)
            return self.loss(opened, teacher, self.x, info)[0]

        return jax.grad(value)(weights)


class AbstractRefresh(eqx.Module):
    """When the student gets a new mask, and from which scores.

    A refresh returns scores. The transfer's `Sparsity` makes the mask that keeps the highest, so
    counts, allocation and pattern hold for every refresh.
    """

    @abc.abstractmethod
    def due(self, step: Int[Array, ""]) -> Bool[Array, ""] | bool:
        """Whether the mask is refreshed after `step` steps; the constant `False` means never."""

    @abc.abstractmethod
    def scores(self, view: RefreshView) -> ScoreTree:
        """A score for each prunable weight, `None` elsewhere; the highest are kept."""


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

    Under a density schedule this is gradual magnitude pruning.

    Attributes:
        every: steps between two refreshes.
        until: the last ones are before this step; `None` for no end.
    """

    every: int = eqx.field(static=True, default=100)
    until: int | None = eqx.field(static=True, default=None)

    def scores(self, view: RefreshView) -> ScoreTree:
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
    every: int = eqx.field(static=True, default=100)
    until: int | None = eqx.field(static=True, default=None)

    def scores(self, view: RefreshView) -> ScoreTree:
        """The scores; a random score draws with a new key at each refresh."""
        return fresh(self.score, view.info.step)(view.student, view.x)


class RigLRefresh(AbstractPeriodicRefresh):
    """Drop kept weights of small magnitude, grow pruned ones of large gradient (RigL).

    Evci et al., ICML 2020, arXiv 1911.11134, with the transfer loss in place of the supervised one.
    In each layer the share `f_t = fraction / 2 · (1 + cos(π t / until))` with the
    smallest magnitude among the kept weights is dropped (a constant `fraction` if `until` is
    `None`). The weights with the largest gradients replace them; a dropped weight may return. In
    the paper grown weights start at zero: `NeuralTangentTransfer(pruned="zero")`.

    Attributes:
        every: steps between two refreshes.
        until: T_end; `None` for no end.
        fraction: share of kept weights that the first refresh drops, in (0, 1).
    """

    every: int = eqx.field(static=True, default=100)
    until: int | None = eqx.field(static=True, default=None)
    fraction: float = eqx.field(static=True, default=0.3)

    def __check_init__(self) -> None:
        """Reject a fraction outside of (0, 1)."""
        if not 0 < self.fraction < 1:
            raise ValueError(f"RigLRefresh: fraction must be in (0, 1), got {self.fraction!r}.")

    def scores(self, view: RefreshView) -> ScoreTree:
        """Scores in [2, 3] for weights that stay, in [0, 1] for all others."""
        slopes = jax.tree.map(lambda g: jnp.abs(widen(g)), view.dense_gradient())
        steepest = jnp.stack(
            [jnp.max(g).astype(jnp.float32) for g in jax.tree.leaves(slopes)]
        ).max()
        share = jnp.asarray(self.fraction, jnp.float32)
        if self.until is not None:
            time = view.info.step.astype(jnp.float32) / self.until
            share = share / 2 * (1 + jnp.cos(math.pi * time))

        def one(mask: Array, weight: Array, slope: Array) -> Array:
            size = jnp.abs(weight).astype(jnp.float32)
            kept = count_kept(mask)
            dropped = jnp.round(share * kept.astype(jnp.float32)).astype(jnp.int32)
            ranked = jnp.where(mask, size, -jnp.inf).reshape(-1)
            stays, unranked = select(ranked, kept - dropped)
            stays = stays.reshape(mask.shape)
            unit = lambda a, top: a / jnp.maximum(top, jnp.finfo(jnp.float32).tiny)
            grown = unit(slope.astype(jnp.float32), steepest)
            found = jnp.where(stays, 2.0 + unit(size, jnp.max(size)), grown)
            return jnp.where(unranked, jnp.nan, found)  # `Sparsity` rejects NaN scores

        return jax.tree.map(one, view.student.mask, view.weights(), slopes)


class NoRefresh(AbstractRefresh):
    """Keep the first mask."""

    def due(self, step: Int[Array, ""]) -> Bool[Array, ""] | bool:
        """Never."""
        return False

    def scores(self, view: RefreshView) -> ScoreTree:
        """The mask itself."""
        return jax.tree.map(lambda m: m.astype(jnp.float32), view.student.mask)
