"""Weighted random: a draw that knows which inputs vary, and nothing else."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from .._examples import Samples
from .._types import PyTree, ScoreTree
from ._base import AbstractDrawingScore, AbstractLabelFreeScore, read_inputs
from ._inputs import InputMoments, input_moments

_NO_CHANCE = 1e-20  # of weights that are drawn last, and among themselves at random
_LEAST = 1e-8  # of an exponential draw, which float32 rounds to 0 once in millions


class WeightedRandom(AbstractLabelFreeScore, AbstractDrawingScore):
    """Random, and the more a weight's input varies over the batch, the greater its chance.

    In layers that see the samples themselves, through no prunable weight before them, chances are
    in proportion to the variance v_j of what weight W_ij is multiplied with: the length-squared
    sampling of Frieze, Kannan & Vempala (2004), of centred inputs. The highest of `v_j / E`, with E
    of the standard exponential distribution, are such a draw without replacement (Efraimidis &
    Spirakis, 2006). A weight whose input never varies, as that of a pixel at the border, is kept
    last. In all other layers chances are equal.

    It is the control for scores and transfers that look at data: all it takes from these is which
    inputs vary. It needs prunable weights that are weights of linear layers, also shared
    ones; `ValueError` names one that is used otherwise.

    Attributes:
        key: the PRNG key; every leaf draws from its own fold of it.
    """

    key: PRNGKeyArray

    def __call__(self, model: PyTree, x: Samples | None = None) -> ScoreTree:
        """Score the prunable weights of `model` on inputs `x` of shape `[batch, ...]`."""
        sparse, x = read_inputs("WeightedRandom", model, x)
        is_leaf = lambda node: isinstance(node, InputMoments)
        found = input_moments("WeightedRandom", sparse, x)
        leaves, treedef = jax.tree.flatten(found, is_leaf=is_leaf)
        scores = [_draw(jax.random.fold_in(self.key, i), leaf) for i, leaf in enumerate(leaves)]
        return jax.tree.unflatten(treedef, scores)


@eqx.filter_jit
def _draw(key: PRNGKeyArray, inputs: InputMoments) -> Float[Array, "..."]:
    variance = jnp.square(inputs.spread)
    chances = jnp.ones_like(variance)
    if inputs.of_sample:
        # Beside the mean of the layer, so that a ranking over all layers prefers none.
        mean = jnp.mean(variance)
        chances = jnp.maximum(variance / jnp.where(mean > 0, mean, jnp.ones_like(mean)), _NO_CHANCE)
    return chances / jnp.maximum(jax.random.exponential(key, chances.shape, chances.dtype), _LEAST)
