"""NTK-SAP: keep what the spectrum of the neural tangent kernel depends on."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray

from .._examples import Samples
from .._masks import is_traced
from .._sparse import SparseModel, map_masked, sparsify
from .._stateful import warm_up
from .._types import PyTree, ScoreTree
from ._base import (
    AbstractDrawingScore,
    AbstractLabelFreeScore,
    batch_of_shape,
    check_takes_reals,
    in_wide_of_shape,
    split_weights,
)


class NTKSAP(AbstractLabelFreeScore, AbstractDrawingScore):
    """|∂/∂m E ‖f(x; m ⊙ θ) - f(x; m ⊙ (θ + Δθ))‖²| (Wang et al., ICLR 2023, arXiv 2304.02840).

    With Δθ ~ N(0, ε² I) the expectation is, up to ε², the trace of the neural tangent kernel,
    the sum of its eigenvalues. Each round draws new inputs from N(0, I) and new weights θ, so
    that the score depends neither on the data nor on the initial weights; the absolute value is
    taken of the sum over rounds. Batch norm uses the statistics of these inputs in the masked
    network of these weights, held fixed, as in the published code. Only the shape of `x` is used.
    Meant to be iterated: 20 rounds of pruning on the exponential schedule in the paper, see
    `prune`.

    Attributes:
        key: source of all draws.
        rounds: number of draws (R; 5 for CIFAR-10 in the published code).
        epsilon: standard deviation ε of the perturbation (0.01 in the published code).
        initialise: `key -> model`, fresh weights for each round. Without one every prunable weight
            is drawn from all those of its layer, which for weights that were drawn independently
            is another draw.
    """

    key: PRNGKeyArray
    rounds: int = eqx.field(static=True, default=5)
    epsilon: float = eqx.field(static=True, default=0.01)
    initialise: Callable[[PRNGKeyArray], Any] | None = eqx.field(static=True, default=None)

    def __check_init__(self) -> None:
        if self.rounds < 1 or not self.epsilon > 0:
            raise ValueError(
                "NTKSAP: needs at least one round and epsilon above 0, "
                f"got rounds={self.rounds} and epsilon={self.epsilon}."
            )

    def __call__(self, model: PyTree, x: Samples | None = None) -> ScoreTree:
        """Score the prunable weights of `model`; of `x` only the shape `[batch, ...]` is used."""
        shape = batch_of_shape("NTKSAP", x)
        sparse = sparsify(model)
        check_takes_reals("NTKSAP", sparse, x)
        sparse = in_wide_of_shape(sparse, shape)
        total, numbers = _zeros(sparse), np.arange(self.rounds, dtype=np.int32)
        if is_traced(total):
            add = lambda total, number: (_add_round(total, number, self, sparse, shape), None)
            total, _ = jax.lax.scan(add, total, numbers)
        else:
            # On a CPU XLA computes convolutions within a loop on one thread, several times slower.
            for number in numbers:
                total = _add_round(total, number, self, sparse, shape)
        return _magnitudes(total)


@eqx.filter_jit
def _zeros(sparse: SparseModel) -> ScoreTree:
    return jax.tree.map(jnp.zeros_like, split_weights(sparse.model, sparse.mask)[0])


@eqx.filter_jit
def _add_round(
    total: ScoreTree,
    number: Int[Array | np.integer, ""],
    score: NTKSAP,
    sparse: SparseModel,
    shape: tuple[int, ...],
) -> ScoreTree:
    """`total` and the derivative of the draw with this number."""
    keys = jax.random.split(jax.random.split(score.key, score.rounds)[number], 3)
    epsilon, initialise = score.epsilon, score.initialise
    drawn = _redraw(sparse, keys[0]) if initialise is None else initialise(keys[0])
    drawn = in_wide_of_shape(SparseModel(drawn, sparse.mask), shape).model
    dtype = jnp.result_type(*jax.tree.leaves(split_weights(drawn, sparse.mask)[0]))
    x = jax.random.normal(keys[1], shape, dtype)
    # The running statistics are those of other weights on other inputs.
    drawn = warm_up(SparseModel(drawn, sparse.mask), x).model
    theta, rest = split_weights(drawn, sparse.mask)
    rest = eqx.nn.inference_mode(rest)
    noise = jax.random.split(keys[2], len(jax.tree.leaves(theta)))
    noise = jax.tree.unflatten(jax.tree.structure(theta), list(noise))
    moved = jax.tree.map(
        lambda w, k: w + epsilon * jax.random.normal(k, w.shape, w.dtype), theta, noise
    )
    masked = lambda weights: jax.tree.map(
        lambda m, w: jnp.where(m, w, jnp.zeros_like(w)), sparse.mask, weights
    )
    outputs = lambda weights: jax.vmap(eqx.combine(weights, rest))(x)

    def distance(first: PyTree, second: PyTree) -> Array:
        return jnp.sum(jnp.square(outputs(first) - outputs(second)))

    # c scales both networks: ∂/∂c_j = θ_j ∂/∂first_j + (θ_j + Δθ_j) ∂/∂second_j
    slopes = jax.grad(distance, (0, 1))(masked(theta), masked(moved))
    change = jax.tree.map(lambda w, v, g, h: w * g + v * h, theta, moved, slopes[0], slopes[1])
    return jax.tree.map(jnp.add, total, change)


@jax.jit
def _magnitudes(total: PyTree) -> PyTree:
    return jax.tree.map(jnp.abs, total)


def _redraw(sparse: SparseModel, key: PRNGKeyArray) -> PyTree:
    keys = iter(jax.random.split(key, len(jax.tree.leaves(sparse.mask))))

    def redraw(w: Array, m: Array) -> Array:
        index = jax.random.randint(next(keys), w.shape, 0, w.size, jnp.int32)
        return w.reshape(-1)[index]

    return map_masked(redraw, sparse.model, sparse.mask)
