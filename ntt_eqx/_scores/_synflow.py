"""SynFlow: keep the strongest paths, whatever the data."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from .._examples import Samples
from .._masks._collapse import is_traced
from .._parameters import parameters
from .._sparse import SparseModel, sparsify
from .._types import PyTree, ScoreTree, wide_dtype
from ._base import (
    AbstractLabelFreeScore,
    batch_of_shape,
    check_takes_reals,
    in_wide_of_shape,
    split_weights,
)
from ._paths import path_network, without_normalisation

_SHRINK = 2.0**-20
_SMALLEST = 2.0**-120


class SynFlow(AbstractLabelFreeScore):
    """Synaptic flow |w| ⊙ ∂R/∂|w| (Tanaka et al., NeurIPS 2020, arXiv 2006.05467, eq. 4).

    R = 1ᵀ (Π |W_l|) 1 is the sum of the outputs for an all-ones input when every weight has its
    absolute value: the total strength of all paths. Biases are left out and normalisations scale
    by their weight, as batch normalisation does before training. Only the shape of the input is
    used. Meant to be iterated: 100 rounds on the exponential schedule in the paper, see `prune`.

    R grows exponentially with depth. When float32 overflows, the all-ones input and the
    gradient are both scaled down by powers of two, which for networks of linear layers, ReLUs
    and pools changes all scores by one common factor and no mask.
    """

    def __call__(self, model: PyTree, x: Samples | None = None) -> ScoreTree:
        """Score the prunable weights of `model`; of `x` only the shape `[batch, ...]` is used."""
        sparse, shape = sparsify(model), batch_of_shape("SynFlow", x)
        check_takes_reals("SynFlow", sparse, x)
        scores, finite = _synflow(in_wide_of_shape(sparse, shape), shape[1:])
        if not is_traced(finite) and not bool(finite):
            raise ValueError("SynFlow: the scores overflow in spite of scaling; use float64.")
        return scores


@eqx.filter_jit
def _synflow(sparse: SparseModel, shape: tuple[int, ...]) -> tuple[ScoreTree, Array]:
    dense = eqx.nn.inference_mode(sparse.to_dense())
    sample = jax.ShapeDtypeStruct(shape, jnp.result_type(*jax.tree.leaves(parameters(dense))))
    absolute = path_network(dense, sample, jnp.abs)
    weights, rest = split_weights(absolute, sparse.mask)
    stored, _ = split_weights(sparse.model, sparse.mask)
    dtype = jnp.result_type(*jax.tree.leaves(weights))

    def score(scale: Array) -> ScoreTree:
        def strength(weights: PyTree) -> Array:
            network = without_normalisation(eqx.combine(weights, rest))
            return jnp.sum(network(jnp.full(shape, scale, dtype)))

        total, pull = jax.vjp(strength, weights)
        (slopes,) = pull(scale.astype(total.dtype))
        return jax.tree.map(lambda w, g: jnp.abs(w) * g, stored, slopes)

    def unfinished(state: tuple[Array, ScoreTree]) -> Array:
        return ~_all_finite(state[1]) & (state[0] > _SMALLEST)

    def shrink(state: tuple[Array, ScoreTree]) -> tuple[Array, ScoreTree]:
        scale = state[0] * _SHRINK
        return scale, score(scale)

    # begins before the first score, at a scale whose next is 1
    nothing = jax.tree.map(lambda w: jnp.full(w.shape, jnp.inf, w.dtype), stored)
    start = (jnp.asarray(1 / _SHRINK, wide_dtype(dtype)), nothing)
    _, scores = lax.while_loop(unfinished, shrink, start)
    return scores, _all_finite(scores)


def _all_finite(tree: PyTree) -> Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()
