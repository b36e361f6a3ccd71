"""`NeuralTangentTransfer`: a loss, a sparsity, a refresh and an optimiser."""

from typing import Any, Literal

import equinox as eqx
import jax.numpy as jnp
import optax

from .._checks import check_count, check_optimizer
from .._masks import Sparsity
from .._scores import AbstractLabelFreeScore, Magnitude
from ._loss import AbstractTransferLoss
from ._losses import KernelMatching
from ._refreshes import AbstractRefresh, MagnitudeRefresh

Pruned = Literal["free", "frozen", "zero"]
"""What becomes of weights under the mask; see `NeuralTangentTransfer`."""


class NeuralTangentTransfer(eqx.Module):
    """A whole transfer method; `NTTConfig` makes the published one.

    Attributes:
        sparsity: how many weights are kept, where, and in which pattern, throughout.
        loss: what makes the student like its teacher.
        refresh: when the mask is taken again, and from which scores.
        optimizer: any optax transformation.
        initial: the score of the first mask.
        num_steps: length of the whole transfer; `None` where it is not known.
        pruned: what becomes of the weights under the mask, which get no gradient. `"free"`: what
            the optimiser makes of weights without a gradient, as in the published code: after a
            refresh Adam's momentum carries them a little further, and weight decay shrinks them.
            `"frozen"`: they keep their values, whatever the optimiser. `"zero"`: they become 0, so
            that a weight that comes back starts there, as in RigL.
    """

    sparsity: Sparsity
    loss: AbstractTransferLoss
    refresh: AbstractRefresh
    optimizer: optax.GradientTransformation = eqx.field(static=True)
    initial: AbstractLabelFreeScore
    num_steps: int | None = eqx.field(static=True)
    pruned: Pruned = eqx.field(static=True)

    def __init__(
        self,
        *,
        sparsity: Sparsity | Any,
        optimizer: optax.GradientTransformation,
        loss: AbstractTransferLoss | None = None,
        refresh: AbstractRefresh | None = None,
        initial: AbstractLabelFreeScore | None = None,
        num_steps: int | None = None,
        pruned: Pruned = "free",
    ):
        """Put the parts together; a number as `sparsity` is a density.

        Raises:
            ValueError: a part is not of its kind.
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
        check_count("NeuralTangentTransfer: num_steps", num_steps, none=True)
        if pruned not in ("free", "frozen", "zero"):
            raise ValueError(
                "NeuralTangentTransfer: pruned must be one of ('free', 'frozen', 'zero'), got "
                f"{pruned!r}."
            )

    @property
    def refreshes(self) -> bool:
        """Whether the mask may ever be taken again."""
        return self.refresh.due(jnp.ones((), jnp.int32)) is not False

    def keeps_count(self, shape: tuple[int, ...]) -> bool:
        """Whether a weight of this `shape` keeps the same number of entries throughout."""
        sparsity = self.sparsity
        if not self.refreshes:
            return True
        fixed = not callable(sparsity.density) and sparsity.scope == "layer"
        return fixed and (sparsity.pattern is None or sparsity.pattern.keeps_count(shape))
