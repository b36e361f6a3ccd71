"""Logit-SNIP: SNIP without labels."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from .._examples import Samples
from .._sparse import SparseModel
from .._types import PyTree, ScoreTree
from ._base import AbstractLabelFreeScore, mask_derivative, read_inputs


class LogitSnip(AbstractLabelFreeScore):
    """The sensitivity |w · ∂/∂w Σ f_k(x_n)²| of the logits (Liu & Zenke, 2020, arXiv 2006.08228).

    The squared norm of the logits, summed over the batch and the classes, takes the place of
    SNIP's loss. The published code scores 100 examples, 128 for CIFAR and for NTT's first mask.
    """

    def __call__(self, model: PyTree, x: Samples | None = None) -> ScoreTree:
        """Score the prunable weights of `model` on inputs `x` of shape `[batch, ...]`."""
        return _logit_snip(*read_inputs("LogitSnip", model, x))


@eqx.filter_jit
def _logit_snip(sparse: SparseModel, x: Array) -> ScoreTree:
    norm = lambda model: jnp.sum(jnp.square(jax.vmap(model)(x)))
    return jax.tree.map(jnp.abs, mask_derivative(sparse, norm))
