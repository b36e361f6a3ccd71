"""Wanda: the size of a weight, times the size of what it is multiplied with."""

import jax
import jax.numpy as jnp

from .._examples import Samples
from .._types import PyTree, ScoreTree
from ._base import AbstractLabelFreeScore, read_inputs, split_weights
from ._inputs import input_moments


class Wanda(AbstractLabelFreeScore):
    """|W_ij| · ‖X_j‖₂ (Sun et al., ICLR 2024, arXiv 2306.11695, eq. 1).

    X_j are the inputs of weight W_ij in the masked network, over the batch and over all positions
    at which a layer uses the weight. The paper ranks the weights of each output apart, which is the
    pattern `ConstantFanIn`.

    It needs prunable weights that are weights of linear layers, also shared ones; `ValueError`
    names one that is used otherwise.
    """

    def __call__(self, model: PyTree, x: Samples | None = None) -> ScoreTree:
        """Score the prunable weights of `model` on inputs `x` of shape `[batch, ...]`."""
        sparse, x = read_inputs("Wanda", model, x)
        weights, _ = split_weights(sparse.model, sparse.mask)
        inputs = input_moments("Wanda", sparse, x)
        return jax.tree.map(lambda w, inputs: jnp.abs(w) * inputs.norm, weights, inputs)
