"""GraSP: keep the weights that the gradient flow needs."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from .._examples import Examples, as_inference, softmax_cross_entropy
from .._sparse import SparseModel
from .._types import PyTree, ScoreTree
from ._base import AbstractSupervisedScore, read_examples, split_weights


class GraSP(AbstractSupervisedScore):
    """Gradient signal preservation w ⊙ Hg (Wang et al., ICLR 2020, arXiv 2002.07376, eq. 8).

    The paper's S(-w) = -w ⊙ Hg estimates how much the squared norm of the gradient gains when a
    weight is taken out, and removes the *highest* S first. Scores here are to be kept when they
    are high, so the sign is turned: w ⊙ Hg. Scores have both signs; weights with negative ones
    are those without which the gradient flow would be larger.

    `g` is the gradient of the softmax cross-entropy of `logits / temperature`, averaged over the
    batch, by the prunable weights that the mask keeps, and `H` the Hessian by the same.

    Attributes:
        temperature: divides the logits; 200 in the published code.
    """

    temperature: float = eqx.field(static=True, default=200.0)

    def __check_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"GraSP: temperature must be above 0, got {self.temperature}.")

    def __call__(self, model: PyTree, batch: Examples) -> ScoreTree:
        """Score the prunable weights of `model` on inputs `[batch, ...]` with labels `[batch]`."""
        return _grasp(*read_examples("GraSP", model, batch), self.temperature)


@eqx.filter_jit
def _grasp(sparse: SparseModel, x: Array, y: Int[Array, " batch"], temperature: float) -> ScoreTree:
    effective, rest = split_weights(as_inference(sparse), sparse.mask)

    def loss(weights: PyTree) -> Array:
        logits = jax.vmap(eqx.combine(weights, rest))(x)
        return jnp.mean(softmax_cross_entropy(logits / temperature, y))

    # pruned weights do not move: they are no part of the gradient flow
    flow = lambda weights: jax.tree.map(
        lambda m, g: jnp.where(m, g, jnp.zeros_like(g)), sparse.mask, jax.grad(loss)(weights)
    )
    g = flow(effective)
    _, hessian_g = jax.jvp(jax.grad(loss), (effective,), (g,))
    stored, _ = split_weights(sparse.model, sparse.mask)
    return jax.tree.map(lambda w, hg: w * hg, stored, hessian_g)
