"""What every score shares: its type, its view of a model, and the derivative by the mask."""

import abc
from collections.abc import Callable
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Inexact, Int, PyTree

from .._masks._collapse import is_traced
from .._sparse import SparseModel, sparsify
from .._types import ScoreTree

Samples: TypeAlias = Inexact[Array | np.ndarray, "batch ..."]
"""Model inputs, one leading batch axis; jax or numpy."""

Examples: TypeAlias = tuple[Samples, Int[Array | np.ndarray, " batch"]]
"""Model inputs with integer labels; `Batch` is one."""


class LabelFreeScore(eqx.Module):
    """A score that never sees a label: `score(model, x)`."""

    @abc.abstractmethod
    def __call__(self, model: PyTree, x: Samples | None = None) -> ScoreTree:
        """Score the prunable weights of `model` on inputs `x` of shape `[batch, ...]`."""


class SupervisedScore(eqx.Module):
    """A score that needs labels: `score(model, (x, y))`."""

    @abc.abstractmethod
    def __call__(self, model: PyTree, batch: Examples) -> ScoreTree:
        """Score the prunable weights of `model` on inputs `[batch, ...]` with labels `[batch]`."""


def mask_derivative(sparse: SparseModel, objective: Callable[[Any], Array]) -> ScoreTree:
    """The derivative of an objective by each entry of the mask.

    With the mask relaxed to real numbers c and the effective weights θ = c ⊙ w,

        ∂L/∂c_j = w_j · ∂L/∂θ_j   at c = mask,

    which is defined at pruned weights too (what bringing them back would do).

    **Arguments:**

    - `sparse`: the point at which to differentiate.
    - `objective`: a scalar function of the plain masked model, in inference mode.
    """
    stored, _ = split_weights(sparse.model, sparse.mask)
    effective, rest = split_weights(eqx.nn.inference_mode(sparse.to_dense()), sparse.mask)
    slopes = jax.grad(lambda weights: objective(eqx.combine(weights, rest)))(effective)
    return jax.tree.map(lambda w, g: w * g, stored, slopes)


def split_weights(model: PyTree, mask: PyTree) -> tuple[PyTree, PyTree]:
    """The prunable weights of `model` and all else, each with `None` in the other's places."""
    is_none = lambda leaf: leaf is None
    weights = jax.tree.map(lambda m, w: None if m is None else w, mask, model, is_leaf=is_none)
    rest = jax.tree.map(lambda m, w: w if m is None else None, mask, model, is_leaf=is_none)
    return weights, rest


def read_inputs(caller: str, model: PyTree, x: Samples | None) -> tuple[SparseModel, Array]:
    """The model with a mask, and its inputs as a checked array.

    **Raises:**

    `ValueError` when there is no sample, or, if concrete, an input is NaN or infinite.
    """
    if x is None:
        raise ValueError(f"{caller}: needs a batch of inputs, shape [batch, ...]; got None.")
    x = jnp.asarray(x)
    if x.ndim < 1 or x.shape[0] == 0:
        raise ValueError(f"{caller}: needs at least one sample; x has shape {x.shape}.")
    if not is_traced(x) and not bool(jnp.isfinite(x).all()):
        raise ValueError(f"{caller}: x has NaN or infinite entries.")
    return sparsify(model), x


def read_examples(
    caller: str, model: PyTree, batch: Examples
) -> tuple[SparseModel, Array, Int[Array, " batch"]]:
    """The model with a mask, its inputs and their labels, checked.

    **Raises:**

    `ValueError` when inputs and labels do not fit each other or the model's number of classes.
    """
    if not isinstance(batch, tuple) or len(batch) != 2:
        raise ValueError(f"{caller}: needs labelled examples, a tuple (x, y).")
    sparse, x = read_inputs(caller, model, batch[0])
    y = jnp.asarray(batch[1])
    if y.shape != x.shape[:1] or not jnp.issubdtype(y.dtype, jnp.integer):
        raise ValueError(
            f"{caller}: {x.shape[0]} inputs need integer labels of shape ({x.shape[0]},), "
            f"got {y.dtype}{list(y.shape)}."
        )
    classes = logits_shape(caller, sparse, x)[-1]
    if not is_traced(y) and not bool(((y >= 0) & (y < classes)).all()):
        raise ValueError(
            f"{caller}: labels must lie in [0, {classes}), got {int(y.min())} to {int(y.max())}."
        )
    return sparse, x, y


def logits_shape(caller: str, model: PyTree, x: Array) -> tuple[int, ...]:
    """The shape `[batch, classes]` of the model's outputs, without computing them.

    **Raises:**

    `ValueError` when the model does not map one sample to one vector of logits.
    """
    out = eqx.filter_eval_shape(lambda m, x: jax.vmap(eqx.nn.inference_mode(m))(x), model, x)
    if not hasattr(out, "shape") or len(out.shape) != 2:
        raise ValueError(
            f"{caller}: the model must map one sample of shape {x.shape[1:]} to a vector of "
            f"logits, got {jax.tree.map(lambda a: getattr(a, 'shape', a), out)} for the batch."
        )
    return out.shape


def cross_entropy(
    logits: Float[Array, "batch classes"], y: Int[Array, " batch"]
) -> Float[Array, ""]:
    """Softmax cross-entropy, the mean over the batch."""
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], axis=1)
    return -jnp.mean(chosen)
