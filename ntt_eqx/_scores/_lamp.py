"""LAMP: squared magnitudes beside what a layer would still have without smaller weights."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .._examples import Samples
from .._sparse import sparsify
from .._types import PyTree, ScoreTree, widen
from ._base import AbstractLabelFreeScore, split_weights


class LAMP(AbstractLabelFreeScore):
    """Layer-adaptive magnitudes, w_u² / Σ_v w_v² (Lee et al., ICLR 2021, arXiv 2010.07611, eq. 3).

    The sum is over the weights of the layer that are not smaller than w_u, so that the largest
    weight of every layer scores 1 and no layer becomes empty. Within a layer the order is that of
    magnitudes; it is a score for `scope="global"`. Weights of equal magnitude score alike.

    Of a `SparseModel` it scores the dense weights: a kept one among those that are kept, a pruned
    one as if it came back. A layer that has lost all its weights scores like a dense one, since
    each would be the largest if it alone came back. Inputs are not used.
    """

    def __call__(self, model: PyTree, x: Samples | None = None) -> ScoreTree:
        """Score the prunable weights of `model`; `x` is not looked at."""
        sparse = sparsify(model)
        return _scores(split_weights(sparse.model, sparse.mask)[0], sparse.mask)


@jax.jit
def _scores(weights: PyTree, masks: PyTree) -> PyTree:
    return jax.tree.map(_of_layer, weights, masks)


def _of_layer(weight: Float[Array, "..."], kept: Bool[Array, "..."]) -> Float[Array, "..."]:
    sizes = widen(jnp.abs(weight))
    largest = jnp.max(sizes, initial=0.0)
    # A ratio of squares does not change with the scale, and squares of small weights underflow.
    squares = jnp.square(sizes / jnp.where(largest > 0, largest, jnp.ones_like(largest)))
    kept = kept | ~jnp.any(kept)
    ascending = jnp.sort(jnp.where(kept, squares, jnp.zeros_like(squares)).reshape(-1))
    sums = jnp.cumsum(ascending[::-1])[::-1]
    # The first of equal magnitudes stands for all of them, so that no order of entries decides.
    first = jnp.searchsorted(ascending, squares.reshape(-1)).reshape(squares.shape)
    sums = jnp.concatenate([sums, jnp.zeros_like(sums[:1])])
    not_smaller = jnp.take(sums, first, mode="clip") + jnp.where(kept, 0.0, squares)
    return squares / jnp.where(not_smaller > 0, not_smaller, jnp.ones_like(not_smaller))
