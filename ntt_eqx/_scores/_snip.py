"""SNIP: the sensitivity of the training loss to each connection."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from .._examples import Examples, softmax_cross_entropy
from .._sparse import SparseModel
from .._types import PyTree, ScoreTree
from ._base import AbstractSupervisedScore, mask_derivative, read_examples


class Snip(AbstractSupervisedScore):
    """Connection sensitivity |w · ∂L/∂w| (Lee et al., ICLR 2019, arXiv 1810.02340, eq. 6).

    `L` is the softmax cross-entropy, averaged over one batch of labelled examples; the paper
    divides by the sum over all weights, which changes no mask. Of a `SparseModel` the gradient is
    taken at the masked network, as iterative pruning asks for.
    """

    def __call__(self, model: PyTree, batch: Examples) -> ScoreTree:
        """Score the prunable weights of `model` on inputs `[batch, ...]` with labels `[batch]`."""
        return _snip(*read_examples("Snip", model, batch))


@eqx.filter_jit
def _snip(sparse: SparseModel, x: Array, y: Int[Array, " batch"]) -> ScoreTree:
    loss = lambda model: jnp.mean(softmax_cross_entropy(jax.vmap(model)(x), y))
    return jax.tree.map(jnp.abs, mask_derivative(sparse, loss))
