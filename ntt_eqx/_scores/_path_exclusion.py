"""Path eXclusion: keep the paths that carry the data and the kernel."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from .._examples import Samples, as_inference
from .._sparse import SparseModel
from .._types import PyTree, ScoreTree
from ._base import AbstractLabelFreeScore, check_takes_reals, read_inputs, split_weights
from ._paths import activation_pattern, apply_gated, path_network, without_normalisation


class PathExclusion(AbstractLabelFreeScore):
    """θ² ⊙ ∂R/∂θ² (PX; Iurada et al., CVPR 2024, arXiv 2406.01820).

    An upper bound of the trace of the neural tangent kernel splits into what the data do and what
    the weights do along each path:

        R = Σ_n Σ_k g_k(x_n²; 1, a(x_n)) · h_k(1; θ²)

    `g` is the network with every weight 1 and the ReLUs of the real network on x_n (the
    activation pattern a), on squared inputs; `h` is the linear network with squared weights, on
    an all-ones input. The gradient is taken through `h` only; scores are never negative. Biases
    are left out, normalisations scale by their weight in `h` and not at all in `g`. In the code of
    the paper, unlike in its equations, batch norm normalises by the batch in both, and the weights
    of the last layer `fc` enter both as they are. Meant to be iterated: 100 rounds on the
    exponential schedule in the paper, see `prune`.

    Sums over the paths of a deep network (ResNet-20, VGG-19) exceed float32; all scores are 2⁻⁶⁰
    times as large where they would.

    For networks of linear layers, (leaky) ReLUs, pools and sums; others are scored by the same
    rule, their smooth activations applied as they are.
    """

    def __call__(self, model: PyTree, x: Samples | None = None) -> ScoreTree:
        """Score the prunable weights of `model` on inputs `x` of shape `[batch, ...]`."""
        sparse, x = read_inputs("PathExclusion", model, x)
        check_takes_reals("PathExclusion", sparse, x)
        return _path_exclusion(sparse, x)


_LITTLE = 2.0**-60


@eqx.filter_jit
def _path_exclusion(sparse: SparseModel, x: Array) -> ScoreTree:
    network = as_inference(sparse)
    sample = jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
    open_paths = _ones_where_kept(sparse, sample)

    def data_strength(sample: Array) -> Array:
        pattern = activation_pattern(network, sample)
        few = _LITTLE * jnp.square(sample)  # `g` is linear in its inputs
        return apply_gated(without_normalisation(open_paths), few, pattern)

    little = jnp.sum(jax.vmap(data_strength)(x), axis=0)
    carried = jnp.where(jnp.isfinite(little / _LITTLE).all(), little / _LITTLE, little)
    squared, rest = split_weights(path_network(network, sample, jnp.square), sparse.mask)

    def relevance(squared: PyTree) -> Array:
        strengths = without_normalisation(eqx.combine(squared, rest))(jnp.ones_like(x[0]))
        return jnp.sum(carried * strengths)

    slopes = jax.grad(relevance)(squared)
    stored, _ = split_weights(sparse.model, sparse.mask)
    return jax.tree.map(lambda w, g: jnp.square(w) * g, stored, slopes)


def _ones_where_kept(sparse: SparseModel, sample: jax.ShapeDtypeStruct) -> PyTree:
    ones = path_network(eqx.nn.inference_mode(sparse.model), sample, jnp.ones_like)
    return SparseModel(ones, sparse.mask).to_dense()
