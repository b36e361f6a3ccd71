"""The sensitivity of a loss of one's own."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from .._examples import Samples
from .._sparse import SparseModel
from .._types import PyTree, ScoreTree
from ._base import AbstractLabelFreeScore, read_inputs, split_weights


class LossGradient(AbstractLabelFreeScore):
    """Sensitivity |w ⊙ ∂L/∂w| of any label-free loss, such as the NTT loss.

    A loss that compares a network with its unpruned self is flat at the unpruned network, so
    that all first-order scores vanish there. `points` moves the gradient elsewhere on the ray
    from zero to the network: the score is |w ⊙ mean over t of ∂L/∂w at t·w|. With many points
    that fill (0, 1] evenly the signed scores add up to L(w) - L(0) (integrated gradients,
    Sundararajan et al., 2017, arXiv 1703.01365).

    Attributes:
        loss: `loss(sparse, x)`, a scalar function of a `SparseModel` and a batch `[batch, ...]`.
        points: where on the ray to take the gradient; 1 is the network itself.
    """

    loss: Callable[[SparseModel, Array], Array] = eqx.field(static=True)
    points: tuple[float, ...] = eqx.field(static=True, default=(1.0,))

    def __check_init__(self) -> None:
        if not self.points or not all(0 < t <= 1 for t in self.points):
            raise ValueError(f"LossGradient: points must lie in (0, 1], got {self.points}.")

    def __call__(self, model: PyTree, x: Samples | None = None) -> ScoreTree:
        """Score the prunable weights of `model` on inputs `x` of shape `[batch, ...]`."""
        given = read_inputs("LossGradient", model, x, use=self.loss)
        return _loss_gradient(*given, self.loss, self.points)


@eqx.filter_jit
def _loss_gradient(
    sparse: SparseModel,
    x: Array,
    loss: Callable[[SparseModel, Array], Array],
    points: tuple[float, ...],
) -> ScoreTree:
    weights, rest = split_weights(eqx.nn.inference_mode(sparse.model), sparse.mask)

    def at(t: float) -> PyTree:
        scaled = jax.tree.map(lambda w: t * w, weights)
        of = lambda w: loss(SparseModel(eqx.combine(w, rest), sparse.mask), x)
        return jax.grad(of)(scaled)

    slopes = jax.tree.map(lambda *g: sum(g) / len(points), *map(at, points))
    return jax.tree.map(lambda w, g: jnp.abs(w * g), weights, slopes)
