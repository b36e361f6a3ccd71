"""Magnitude: the size of the weights themselves."""

import jax
import jax.numpy as jnp

from .._examples import Samples
from .._sparse import sparsify
from .._types import PyTree, ScoreTree
from ._base import AbstractLabelFreeScore, split_weights


class Magnitude(AbstractLabelFreeScore):
    """The absolute value of each weight, |w| (Han et al., NeurIPS 2015, arXiv 1506.02626).

    Of a `SparseModel` it scores the dense weights that are kept under the mask, so that a pruned
    weight may come back: this is the score of NTT's mask refresh. Inputs are not used.
    """

    def __call__(self, model: PyTree, x: Samples | None = None) -> ScoreTree:
        """Score the prunable weights of `model`; `x` is not looked at."""
        sparse = sparsify(model)
        return _magnitudes(split_weights(sparse.model, sparse.mask)[0])


@jax.jit
def _magnitudes(weights: PyTree) -> PyTree:
    return jax.tree.map(jnp.abs, weights)
