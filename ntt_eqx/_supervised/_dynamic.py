"""Masks that change while a network trains: GMP, RigL, SET, lottery tickets."""

from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from .._batch import pair
from .._checks import check_count
from .._masks import Sparsity
from .._primitives import with_equivalents
from .._refreshes import (
    AbstractRefresh,
    AbstractRefreshView,
    RoundDensity,
    RoundRefresh,
    due_steps,
    refresh_due,
)
from .._scores import split_weights
from .._sparse import SparseModel, map_masked, sparsify
from .._step_info import StepInfo
from .._types import MaskTree, PyTree


class DynamicSparsity(eqx.Module):
    """A mask that changes while its network trains on labels.

    - Gradual magnitude pruning: `MagnitudeRefresh` and `Sparsity(GradualDensity(...))`.
    - RigL: `RigLRefresh` and the density of the first mask, as of `prune(model, Random(key), ...)`.
    - SET: `SETRefresh`, likewise.
    - Lottery tickets: `lottery_ticket`, which puts all three parts together.

    A weight that grows starts at zero, and so does the optimiser's state for it (its momentum), as
    in RigL. The refresh follows the optimiser's step, where RigL's stands in its place.

    Attributes:
        sparsity: how many weights each mask keeps, where, and in which pattern; a schedule may
            change the number.
        refresh: when the mask is taken again, and from which scores.
        rewind: number of steps after which weights and optimiser were where each refresh takes them
            back to, fewer than before the first; `None` to go on.
    """

    sparsity: Sparsity
    refresh: AbstractRefresh
    rewind: int | None = eqx.field(static=True, default=None)

    def __check_init__(self) -> None:
        """Reject parts of another type, and a schedule that no refresh follows."""
        for name, kind in (("sparsity", Sparsity), ("refresh", AbstractRefresh)):
            if not isinstance(getattr(self, name), kind):
                raise ValueError(
                    f"DynamicSparsity: {name} must be of type {kind.__name__}, got "
                    f"{getattr(self, name)!r}."
                )
        check_count("DynamicSparsity: rewind", self.rewind, 0, none=True)
        never = self.refresh.due(jnp.ones((), jnp.int32)) is False
        if callable(self.sparsity.density) and never:
            raise ValueError(
                "DynamicSparsity: density is a schedule, but the mask is never taken again: give a "
                "refresh that is due, or a number as density."
            )


def lottery_ticket(
    density: float,
    *,
    steps: int,
    rounds: int,
    rewind: int = 0,
    scope: Literal["layer", "global"] = "layer",
) -> DynamicSparsity:
    """Iterative magnitude pruning with rewinding, all trainings in one run.

    The network trains for `steps` steps, its smallest weights are pruned, the others and the
    optimiser go back to where they were after `rewind` steps, and so on; the last mask is trained,
    too. Train for `refresh.num_steps` steps, `steps + rounds (steps - rewind)`, with the optimiser
    of a run of `steps`: its schedule is rewound with it. Each round keeps the share
    `density^(1 / rounds)` of what was left: with five rounds about 63 % for a density of 0.1.

    Frankle & Carbin (2019), who prune the last layer half as fast; Frankle et al. (2020).

    **Arguments:**

    - `density`: share of weights that the last mask keeps.
    - `steps`: length of one training.
    - `rounds`: how often weights are pruned.
    - `rewind`: where each further training starts, less than `steps`.
    - `scope`: `"layer"` prunes each layer alike, `"global"` ranks all layers together.

    **Returns:**

    The `DynamicSparsity`, for `TrainConfig` and a dense model.

    **Raises:**

    `ValueError` for a density outside of (0, 1], or counts out of range.
    """
    refresh = RoundRefresh(steps, rounds, rewind)
    return DynamicSparsity(Sparsity(RoundDensity(density, refresh), scope), refresh, rewind)


class TrainView(AbstractRefreshView):
    """The inputs of a refresh in training.

    Attributes:
        student: the model after the step; pruned weights are zero.
        batch: the step's batch.
        info: number of steps done, a key for this refresh, the density.
        loss: the training loss of a model on this batch.
    """

    student: SparseModel
    batch: PyTree
    info: StepInfo
    loss: Callable[[PyTree], Array]

    @property
    def x(self) -> Array:
        """The inputs of the batch, which must be a pair."""
        return pair("refresh", self.batch)[0]

    def dense_gradient(self) -> PyTree:
        """The gradient of the training loss by every prunable weight, kept or not.

        It is taken at the masked network, where pruned weights are zero.
        """
        weights, rest = split_weights(self.student.model, self.student.mask)
        ones = jax.tree.map(jnp.ones_like, self.student.mask)

        @with_equivalents
        def value(weights: PyTree) -> Array:
            return self.loss(SparseModel(eqx.combine(weights, rest), ones))

        return jax.grad(value)(weights)


def with_first_mask(caller: str, model: PyTree, dynamic: DynamicSparsity | None) -> PyTree:
    """The model with a mask, if it is to change; a dense model gets one that keeps everything.

    **Raises:**

    `ValueError` when the mask is not one that the sparsity makes before the first step, the refresh
    cannot rank the groups of its pattern, or it goes back to what is not there yet.
    """
    if dynamic is None:
        return model
    sparse = sparsify(model)
    dynamic.sparsity.check_end(sparse.mask)
    dynamic.refresh.check_pattern(dynamic.sparsity, sparse.mask)
    early = due_steps(dynamic.refresh, dynamic.sparsity, 1, dynamic.rewind or 0)
    if early:
        raise ValueError(
            f"{caller}: a refresh follows step {early[0]}, and goes back to the weights after "
            f"rewind={dynamic.rewind} steps, which are not there yet; rewind to an earlier step."
        )
    if not bool(dynamic.sparsity.holds(sparse.mask, 0)):
        raise ValueError(
            f"{caller}: the model's mask does not have the counts of the DynamicSparsity before "
            "the first step; make it with the same Sparsity, as prune(model, score, sparsity), or "
            "take sparsity.of_mask(model.mask)."
        )
    return sparse


def refreshed(
    dynamic: DynamicSparsity,
    view: TrainView,
    model: SparseModel,
    opt_state: PyTree,
    rewound: PyTree,
) -> tuple[SparseModel, PyTree, Bool[Array, ""] | None]:
    """Model and optimiser after the refresh, if one is due, and whether that made no mask.

    The scores, and with them a dense gradient, are computed at steps that have a refresh alone.
    `rewound` has the arrays of both to go back to, or is `None`.
    """
    step, sparsity = view.info.step, dynamic.sparsity
    due = refresh_due(dynamic.refresh, sparsity, step)
    if due is False:
        return model, opt_state, None
    arrays, rest = eqx.partition((model, opt_state), eqx.is_array)

    def again() -> tuple[PyTree, Any]:
        mask, lost = sparsity.mask_or_lost(dynamic.refresh.scores(view), step)
        if rewound is None:
            after = _grown_from_zero(model, opt_state, mask)
        else:
            back, state = eqx.combine(rewound, rest)
            after = back.with_mask(mask), state
        return eqx.filter(after, eqx.is_array), lost

    stays = lambda: (arrays, jnp.zeros((), bool))
    arrays, lost = jax.lax.cond(due, again, stays)
    return *eqx.combine(arrays, rest), lost


def remembered(
    dynamic: DynamicSparsity, rewound: PyTree, now: tuple[Any, PyTree], step: Int[Array, ""]
) -> PyTree:
    """What refreshes go back to: `now` if this is the step, else what there was."""
    if not dynamic.rewind:  # never, or the state before the first step
        return rewound
    arrays = eqx.filter(now, eqx.is_array)
    return jax.lax.cond(step == dynamic.rewind, lambda: arrays, lambda: rewound)


def _grown_from_zero(
    model: SparseModel, opt_state: PyTree, mask: MaskTree
) -> tuple[SparseModel, PyTree]:
    """The model with another mask; weights that it did not keep before start anew, at zero.

    Nor does the optimiser remember those that it drops: an update that is scaled by the norm of
    all updates would be by theirs, too.
    """
    grown = jax.tree.map(lambda new, old: new & ~old, mask, model.mask)
    changed = jax.tree.map(lambda new, old: new ^ old, mask, model.mask)
    anew = lambda tree, places: map_masked(_zero_where, tree, places)
    # The optimiser's trees like the parameters, such as momenta, are SparseModels, as those are.
    like_parameters = lambda node: isinstance(node, SparseModel)
    opt_state = jax.tree.map(
        lambda node: (
            eqx.tree_at(lambda s: s.model, node, anew(node.model, changed))
            if like_parameters(node)
            else node
        ),
        opt_state,
        is_leaf=like_parameters,
    )
    return SparseModel(anew(model.model, grown), mask), opt_state


def _zero_where(leaf: Any, places: Bool[Array, "..."]) -> Any:
    """`leaf` with zeros at some places; placeholders of optax are left as they are."""
    same = eqx.is_array(leaf) and leaf.shape == places.shape
    return jnp.where(places, jnp.zeros_like(leaf), leaf) if same else leaf
