"""The interface of a transfer loss."""

import abc

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from .._sparse import SparseModel, kept_weights
from .._step_info import StepInfo
from .._types import PyTree, squared_norm


class AbstractTransferLoss(eqx.Module):
    """A scalar distance between student and teacher on an unlabelled batch."""

    @abc.abstractmethod
    def __call__(
        self,
        student: SparseModel,
        teacher: PyTree,
        x: Shaped[Array, "batch ..."],
        info: StepInfo,
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """The loss, and its terms by name.

        **Arguments:**

        - `student`, `teacher`: models of one sample, in inference mode; gradients flow through the
          kept weights and all else of the student.
        - `x`: `[batch, ...]`, an even number of samples.
        - `info`: what the step tells: its number, its key, the density.

        **Returns:**

        The loss and its terms, all scalars. Terms that `NTTMetrics` has a field for fill it, the
        others are its `terms`.
        """


def l2_penalty(
    weight: float, student: SparseModel, info: StepInfo
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The L2 term of a loss, `weight / density · Σ ‖m ⊙ W‖²`, and the sum in it.

    **Arguments:**

    - `weight`: lambda_2.
    - `student`: its kept prunable weights are summed.
    - `info`: tells the density of the step.

    **Returns:**

    The term and the sum of squares, both scalars.
    """
    norm = jnp.asarray(sum(squared_norm(w) for w in kept_weights(student)))
    density = info.density
    if not isinstance(density, float):  # of a schedule, or by layer: float32
        density = density.astype(norm.dtype)  # first, for a quotient of float32 is rounded to it
    return weight / density * norm, norm
