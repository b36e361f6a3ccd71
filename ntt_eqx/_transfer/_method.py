"""`NeuralTangentTransfer`: a loss, a sparsity, a refresh and an optimiser."""

from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from .._checks import check_count, check_optimizer
from .._masks import Sparsity
from .._refreshes import (
    AbstractPeriodicRefresh,
    AbstractRefresh,
    MagnitudeRefresh,
    refresh_due,
)
from .._scores import AbstractLabelFreeScore, Magnitude
from .._types import GradientTransformation
from ._loss import AbstractTransferLoss
from ._matching import KernelMatching

Pruned = Literal["free", "frozen", "zero"]
"""What happens to weights under the mask; see `NeuralTangentTransfer`."""


def check_arrival(
    caller: str, sparsity: Sparsity, refresh: AbstractRefresh, num_steps: int | None
) -> None:
    """Raise `ValueError` if the last mask would not have the final density of a schedule.

    The mask is refreshed at the `end` of a schedule, if it has one, and after the last step. A
    schedule must reach its final density by the last step: at its `end`, or where it stops
    changing. If the last step is unknown, a periodic refresh without an end follows the schedule,
    and `transfer` checks the step at which it stops.
    """
    schedule = sparsity.density
    if not callable(schedule):
        return
    if refresh.due(jnp.ones((), jnp.int32)) is False:
        raise ValueError(
            f"{caller}: density is a schedule, but the mask is never taken again: give mask_every, "
            "a refresh that is due, or a number as density."
        )
    end = sparsity.end
    if num_steps is None:
        follows = isinstance(refresh, AbstractPeriodicRefresh) and refresh.until is None
        if end is None and not follows:
            raise ValueError(
                f"{caller}: density is a schedule: give num_steps, the length of the transfer, "
                "after which the mask is taken for the last time."
            )
        return
    if end is not None and end > num_steps:
        raise ValueError(
            f"{caller}: the density's schedule ends at step {end}, after the last step, "
            f"{num_steps}: make its end at most {num_steps}, or num_steps at least {end}."
        )
    rest = sparsity.resting()
    try:
        last = sparsity.at(num_steps)
    except Exception:  # told when the step is reached, with what the schedule says itself
        return
    if rest is not None and abs(last - rest) > 1e-6 * rest:
        raise ValueError(
            f"{caller}: the density's schedule comes to rest at {rest:g}, but is at {last:g} after "
            f"the last step, {num_steps}: make it end by step {num_steps}, or num_steps larger."
        )


def check_last_step(caller: str, method: "NeuralTangentTransfer", num_steps: int) -> None:
    """`check_arrival` for a last step that only the run knows."""
    sparsity, refresh = method.sparsity, method.refresh
    if method.num_steps is not None or not callable(sparsity.density):
        return
    end = sparsity.end
    if not isinstance(refresh, AbstractPeriodicRefresh) or end is not None and end <= num_steps:
        return
    taken = num_steps - num_steps % refresh.every
    wanted, found = sparsity.at(num_steps), sparsity.at(taken)
    if abs(wanted - found) > 1e-6 * wanted:
        raise ValueError(
            f"{caller}: the density's schedule is at {wanted:g} after the last step, {num_steps}, "
            f"but the mask is last taken after step {taken}, at {found:g}: give num_steps to "
            "NTTConfig or NeuralTangentTransfer, so that the mask is taken after the last step."
        )


class NeuralTangentTransfer(eqx.Module):
    """A whole transfer method; `NTTConfig` makes the published one.

    Attributes:
        sparsity: how many weights every mask keeps, where, and in which pattern.
        loss: the distance between student and teacher.
        refresh: when the mask is taken again, and from which scores.
        optimizer: any optax transformation.
        initial: the score of the first mask.
        num_steps: length of the whole transfer; `None` if unknown. With a schedule of the density
            the last refresh is after this step.
        pruned: what happens to the weights under the mask, which get no gradient. `"free"`: the
            optimiser updates them as it updates any weight without a gradient, as in the published
            code: after a refresh Adam's momentum moves them a little further, and weight decay
            shrinks them. `"frozen"`: they keep their values. `"zero"`: they are set to 0, so that a
            weight that comes back starts there, as in RigL.
    """

    sparsity: Sparsity
    loss: AbstractTransferLoss
    refresh: AbstractRefresh
    optimizer: GradientTransformation = eqx.field(static=True)
    initial: AbstractLabelFreeScore
    num_steps: int | None = eqx.field(static=True)
    pruned: Pruned = eqx.field(static=True)

    def __init__(
        self,
        *,
        sparsity: Sparsity | Any,
        optimizer: GradientTransformation,
        loss: AbstractTransferLoss | None = None,
        refresh: AbstractRefresh | None = None,
        initial: AbstractLabelFreeScore | None = None,
        num_steps: int | None = None,
        pruned: Pruned = "free",
    ):
        """Put the parts together; a number as `sparsity` is a density.

        Raises:
            ValueError: an argument has the wrong type.
        """
        self.sparsity = sparsity if isinstance(sparsity, Sparsity) else Sparsity(sparsity)
        self.loss = KernelMatching() if loss is None else loss
        self.refresh = MagnitudeRefresh() if refresh is None else refresh
        self.initial = Magnitude() if initial is None else initial
        self.optimizer = optimizer
        self.num_steps = num_steps
        self.pruned = pruned
        kinds = (
            ("loss", AbstractTransferLoss),
            ("refresh", AbstractRefresh),
            ("initial", AbstractLabelFreeScore),
        )
        for name, kind in kinds:
            if not isinstance(getattr(self, name), kind):
                raise ValueError(
                    f"NeuralTangentTransfer: {name} must be an {kind.__name__}, got "
                    f"{getattr(self, name)!r}."
                )
        check_optimizer("NeuralTangentTransfer", optimizer)
        check_arrival("NeuralTangentTransfer", self.sparsity, self.refresh, num_steps)
        check_count("NeuralTangentTransfer: num_steps", num_steps, none=True)
        if pruned not in ("free", "frozen", "zero"):
            raise ValueError(
                "NeuralTangentTransfer: pruned must be one of ('free', 'frozen', 'zero'), got "
                f"{pruned!r}."
            )

    @property
    def refreshes(self) -> bool:
        """Whether the mask is ever refreshed."""
        found: list[bool] = []
        step = jax.ShapeDtypeStruct((), jnp.int32)
        # No program; the answer itself may be a tracer, which must not outlive its trace.
        jax.eval_shape(lambda step: found.append(self.refresh.due(step) is not False), step)
        return found[0]

    def due(self, step: Int[Array, ""]) -> Bool[Array, ""] | bool:
        """Whether the mask is refreshed after `step` steps; see `refresh_due`."""
        return refresh_due(self.refresh, self.sparsity, step, self.num_steps)

    def keeps_count(self, shape: tuple[int, ...]) -> bool:
        """Whether a weight of this `shape` keeps the same number of entries throughout."""
        sparsity = self.sparsity
        if not self.refreshes:
            return True
        fixed = not callable(sparsity.density) and sparsity.scope == "layer"
        return fixed and sparsity.pattern.keeps_count(shape)
