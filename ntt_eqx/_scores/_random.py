"""Random: the baseline that knows nothing."""

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from .._examples import Samples
from .._sparse import sparsify
from .._types import PyTree, ScoreTree
from ._base import AbstractDrawingScore, AbstractLabelFreeScore


class Random(AbstractLabelFreeScore, AbstractDrawingScore):
    """Independent uniform scores in `[0, 1)`, of `key` alone. Inputs and weights are not used.

    Attributes:
        key: the PRNG key; every leaf draws from its own fold of it.
    """

    key: PRNGKeyArray

    def __call__(self, model: PyTree, x: Samples | None = None) -> ScoreTree:
        """Score the prunable weights of `model`; `x` is not looked at."""
        leaves, treedef = jax.tree.flatten(sparsify(model).mask)
        scores = [
            jax.random.uniform(jax.random.fold_in(self.key, i), leaf.shape, jnp.float32)
            for i, leaf in enumerate(leaves)
        ]
        return jax.tree.unflatten(treedef, scores)
