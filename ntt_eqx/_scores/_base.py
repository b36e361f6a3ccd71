"""What every score shares: its type, its view of a model, and the derivative by the mask."""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, Int, PRNGKeyArray, PyTree

from .._checks import sample_of, sample_output
from .._distribute import left_to_xla, replicate, spread
from .._examples import Examples, Samples, as_inference, check_examples, check_samples
from .._sparse import SparseModel, sparsify
from .._stateful import check_warm
from .._types import ScoreTree


class AbstractLabelFreeScore(eqx.Module):
    """A score that never sees a label: `score(model, x)`."""

    @abc.abstractmethod
    def __call__(self, model: PyTree, x: Samples | None = None) -> ScoreTree:
        """Score the prunable weights of `model` on inputs `x` of shape `[batch, ...]`."""


class AbstractSupervisedScore(eqx.Module):
    """A score that needs labels: `score(model, (x, y))`."""

    @abc.abstractmethod
    def __call__(self, model: PyTree, batch: Examples) -> ScoreTree:
        """Score the prunable weights of `model` on inputs `[batch, ...]` with labels `[batch]`."""


class AbstractDrawingScore(eqx.Module):
    """A score that draws: what iterates one gives it a fresh key each time.

    Inherit from this beside `AbstractLabelFreeScore` or `AbstractSupervisedScore`.
    """

    key: eqx.AbstractVar[PRNGKeyArray]

    def redrawn(self, step: Int[Array, ""] | int) -> Any:
        """The score with another key, that of round `step`."""
        return eqx.tree_at(lambda s: s.key, self, jax.random.fold_in(self.key, step))


def fresh(score: Any, step: Int[Array, ""] | int) -> Any:
    """The score for round `step` of an iteration: with draws of its own, if it draws."""
    return score.redrawn(step) if isinstance(score, AbstractDrawingScore) else score


def scored(score: Any, sparse: SparseModel, batch: Any) -> ScoreTree:
    """`score(sparse, batch)`, on meshes of any axes; the scores are sharded as the weights are."""
    weights, _ = split_weights(sparse.model, sparse.mask)
    return left_to_xla(lambda score, *a: score(*a), score, sparse, batch, like=weights)


def mask_derivative(sparse: SparseModel, objective: Callable[[Any], Array]) -> ScoreTree:
    """The derivative of an objective by each entry of the mask.

    With the mask relaxed to real numbers c and the effective weights θ = c ⊙ w,

        ∂L/∂c_j = w_j · ∂L/∂θ_j   at c = mask,

    which is defined at pruned weights too (what bringing them back would do).

    **Arguments:**

    - `sparse`: the point at which to differentiate.
    - `objective`: a scalar function of the plain masked model, in inference mode.

    **Returns:**

    An array for every prunable weight, `None` elsewhere.
    """
    stored, _ = split_weights(sparse.model, sparse.mask)
    effective, rest = split_weights(as_inference(sparse), sparse.mask)
    slopes = jax.grad(lambda weights: objective(eqx.combine(weights, rest)))(effective)
    return jax.tree.map(lambda w, g: w * g, stored, slopes)


def split_weights(model: PyTree, mask: PyTree) -> tuple[PyTree, PyTree]:
    """The prunable weights of a model and all else, each with `None` in the other's places.

    **Arguments:**

    - `model`: any model.
    - `mask`: its mask; where it has an array there is a prunable weight.

    **Returns:**

    Two trees of the structure of `model`; `eqx.combine` of both is the model.
    """
    is_none = lambda leaf: leaf is None
    weights = jax.tree.map(lambda m, w: None if m is None else w, mask, model, is_leaf=is_none)
    rest = jax.tree.map(lambda m, w: w if m is None else None, mask, model, is_leaf=is_none)
    return weights, rest


def sample_shape(caller: str, x: Any) -> tuple[int, ...]:
    """The shape of one sample.

    **Raises:**

    `ValueError` when `x` is no batch.
    """
    if x is None or len(getattr(x, "shape", ())) < 1 or x.shape[0] == 0:
        raise ValueError(
            f"{caller}: needs a batch of inputs for their shape, got "
            f"{getattr(x, 'shape', type(x).__name__)}."
        )
    return tuple(x.shape[1:])


def read_inputs(caller: str, model: PyTree, x: Any) -> tuple[SparseModel, Array]:
    """The model with a mask, and its inputs as a checked array that it takes.

    **Arguments:**

    - `caller`: the name that errors begin with.
    - `model`: any model; without a mask it gets one that keeps everything.
    - `x`: inputs `[batch, ...]`.

    **Returns:**

    The `SparseModel` and the inputs.

    **Raises:**

    `ValueError` for inputs that are none, hold NaN or do not suit the model.
    """
    sparse, x = replicate(sparsify(model)), spread(caller, check_samples(caller, x))
    check_warm(caller, sparse)
    sample_output(caller, as_inference(sparse), sample_of(x))
    return sparse, x


def read_examples(
    caller: str, model: PyTree, batch: Any
) -> tuple[SparseModel, Array, Int[Array, " batch"]]:
    """The model with a mask, its inputs and their labels, checked.

    **Arguments:**

    - `caller`: the name that errors begin with.
    - `model`: any model; without a mask it gets one that keeps everything.
    - `batch`: `(x, y)`, inputs `[batch, ...]` and integer labels `[batch]`.

    **Returns:**

    The `SparseModel`, the inputs and the labels.

    **Raises:**

    `ValueError` for inputs or labels that are none or do not suit the model.
    """
    sparse = sparsify(model)
    check_warm(caller, sparse)
    x, y = spread(caller, check_examples(caller, sparse, batch))
    return replicate(sparse), x, y
