"""Base classes of the scores, their checks of a model and a batch, and the mask derivative."""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray

from .._batch import inputs_of
from .._checks import check_key, sample_of, sample_output
from .._distribute import left_to_xla, replicate, spread
from .._examples import Examples, Samples, as_inference, check_examples, check_samples
from .._sparse import SparseModel, sparsify
from .._stateful import check_warm
from .._types import PyTree, ScoreTree, widen


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
    """A score that draws random numbers; iterative pruning gives it a new key in each round.

    Inherit from this beside `AbstractLabelFreeScore` or `AbstractSupervisedScore`.
    """

    key: eqx.AbstractVar[PRNGKeyArray]

    def __check_init__(self) -> None:
        """Reject what is no key."""
        check_key(type(self).__name__, self.key)

    def redrawn(self, step: Int[Array, ""] | int) -> Any:
        """The score with the key of round `step`."""
        return eqx.tree_at(lambda s: s.key, self, jax.random.fold_in(self.key, step))


def fresh(score: Any, step: Int[Array, ""] | int) -> Any:
    """The score for round `step` of an iteration, with a new key if it draws."""
    return score.redrawn(step) if isinstance(score, AbstractDrawingScore) else score


def scored(score: Any, sparse: SparseModel, batch: Any) -> ScoreTree:
    """`score(sparse, batch)`, on any mesh; the scores are sharded like the weights."""
    weights, _ = split_weights(sparse.model, sparse.mask)
    return left_to_xla(lambda score, *a: score(*a), score, sparse, batch, like=weights)


def mask_derivative(sparse: SparseModel, objective: Callable[[Any], Array]) -> ScoreTree:
    """The derivative of an objective by each entry of the mask.

    With the mask relaxed to real numbers c and the effective weights θ = c ⊙ w,

        ∂L/∂c_j = w_j · ∂L/∂θ_j   at c = mask,

    which is defined at pruned weights too (the effect of bringing them back).

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
    """Split a model into its prunable weights and all other leaves, as `eqx.partition` does.

    **Arguments:**

    - `model`: any model.
    - `mask`: its mask, with an array at each prunable weight.

    **Returns:**

    Two trees of the structure of `model`; `eqx.combine` of both is the model.
    """
    is_none = lambda leaf: leaf is None
    weights = jax.tree.map(lambda m, w: None if m is None else w, mask, model, is_leaf=is_none)
    rest = jax.tree.map(lambda m, w: w if m is None else None, mask, model, is_leaf=is_none)
    return weights, rest


def batch_of_shape(caller: str, x: Any) -> tuple[int, ...]:
    """The shape of a batch of inputs.

    **Raises:**

    `ValueError` when `x` is no batch.
    """
    x = x if x is None else inputs_of(caller, x)
    shape = tuple(getattr(x, "shape", ()))
    if len(shape) < 1 or shape[0] == 0:
        raise ValueError(
            f"{caller}: needs a batch of inputs for their shape, got "
            f"{getattr(x, 'shape', type(x).__name__)}."
        )
    return shape


def check_takes_reals(caller: str, sparse: SparseModel, x: Any) -> None:
    """Raise `ValueError` if `x` are whole numbers and the model takes no others, as token ids.

    Scores by paths, and those of random inputs, give it real numbers of their shape.
    """
    x = inputs_of(caller, x)
    if not jnp.issubdtype(getattr(x, "dtype", jnp.float32), jnp.integer):
        return
    weights, _ = split_weights(sparse.model, sparse.mask)
    dtype = jnp.result_type(*jax.tree.leaves(weights))
    try:
        sample_output(caller, as_inference(sparse), jax.ShapeDtypeStruct(x.shape[1:], dtype))
    except ValueError as error:
        raise ValueError(
            f"{caller}: gives the model real numbers of the inputs' shape, which it does not take; "
            f"its inputs are {x.dtype}, as token ids. Score a model that begins behind the "
            "embedding, or take Magnitude, LAMP, Snip or LogitSnip."
        ) from error


def read_inputs(
    caller: str, model: PyTree, x: Any, use: Callable[[SparseModel, Array], Any] | None = None
) -> tuple[SparseModel, Array]:
    """Give the model a mask and check its inputs; both become float32 if they are narrower.

    **Arguments:**

    - `caller`: the name that errors begin with.
    - `model`: any model; without a mask it gets one that keeps everything.
    - `x`: inputs `[batch, ...]`, with or without labels.
    - `use`: `(sparse, x) -> ...`, what the score computes, if not the model's outputs.

    **Returns:**

    The `SparseModel` and the inputs.

    **Raises:**

    `ValueError` if the inputs are missing, contain NaN or do not fit the model.
    """
    sparse = sparsify(model)
    check_warm(caller, sparse)
    x = check_samples(caller, None if x is None else inputs_of(caller, x))
    sample_output(caller, as_inference(sparse), sample_of(x))
    sparse, x = _in_wide(sparse, x, use)
    return replicate(sparse), spread(caller, x)


def read_examples(
    caller: str, model: PyTree, batch: Any
) -> tuple[SparseModel, Array, Int[Array, " batch"]]:
    """Give the model a mask and check inputs and labels; floats become float32 if narrower.

    **Arguments:**

    - `caller`: the name that errors begin with.
    - `model`: any model; without a mask it gets one that keeps everything.
    - `batch`: `(x, y)`, inputs `[batch, ...]` and integer labels `[batch]`.

    **Returns:**

    The `SparseModel`, the inputs and the labels.

    **Raises:**

    `ValueError` if inputs or labels are missing or do not fit the model.
    """
    sparse = sparsify(model)
    check_warm(caller, sparse)
    x, y = check_examples(caller, sparse, batch)
    sparse, x = _in_wide(sparse, x)
    x, y = spread(caller, (x, y))
    return replicate(sparse), x, y


def _in_wide(
    sparse: SparseModel, x: Array, use: Callable[[SparseModel, Array], Any] | None = None
) -> tuple[SparseModel, Array]:
    """A model and its inputs in float32 if they are narrower and the model accepts it."""
    # In 16 bits, second derivatives (GraSP) underflow to zero, and the scores cannot rank.
    if not any(map(_is_narrow, jax.tree.leaves((sparse, x)))):
        return sparse, x
    wide, inputs = widened((sparse, x))
    use = (lambda sparse, x: jax.vmap(sparse)(x)) if use is None else use
    try:
        eqx.filter_eval_shape(use, eqx.nn.inference_mode(wide), inputs)
    except Exception:  # a model that casts to 16 bits itself may raise anything here
        return sparse, x
    return wide, inputs


def in_wide_of_shape(sparse: SparseModel, shape: tuple[int, ...]) -> SparseModel:
    """A model in float32 if it is narrower and takes real inputs of this `shape` then."""
    weights, _ = split_weights(sparse.model, sparse.mask)
    x = jnp.zeros(shape, jnp.result_type(*jax.tree.leaves(weights)))
    return _in_wide(sparse, x)[0]


def widened(tree: PyTree) -> PyTree:
    """A model with its floating-point leaves in float32, where they are narrower."""
    return jax.tree.map(lambda leaf: widen(leaf) if _is_narrow(leaf) else leaf, tree)


def _is_narrow(leaf: Any) -> bool:
    real = eqx.is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)
    return real and jnp.finfo(leaf.dtype).bits < 32
