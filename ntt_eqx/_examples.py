"""Labelled examples: their types, their checks, and the loss on them."""

from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int, PyTree, Shaped

from ._sparse import SparseModel

Samples: TypeAlias = Shaped[Array | np.ndarray, "batch ..."]
"""Model inputs, one leading batch axis; jax or numpy."""

Examples: TypeAlias = tuple[Samples, Int[Array | np.ndarray, " batch"]]
"""Model inputs with integer labels; `Batch` is one."""


def softmax_cross_entropy(
    logits: Float[Array, "batch classes"], labels: Int[Array, " batch"]
) -> Float[Array, " batch"]:
    """Softmax cross-entropy of every sample, in nats; NaN where a label is out of range."""
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1, mode="fill")
    return -chosen[:, 0]


def as_inference(model: PyTree) -> PyTree:
    """The plain model in inference mode (`eqx.nn.inference_mode` can't see through a mask)."""
    return eqx.nn.inference_mode(model.to_dense() if isinstance(model, SparseModel) else model)


def check_samples(caller: str, x: Any) -> Array:
    """The inputs as a jax array.

    **Raises:**

    `ValueError` when there is no sample, when they are raw pixels (`uint8`), or, if the values are
    known, when one is NaN or infinite. Signed integers pass: they may be tokens.
    """
    if not hasattr(x, "dtype") or not hasattr(x, "shape"):
        raise ValueError(
            f"{caller}: needs an array of inputs [batch, ...], got {type(x).__name__}."
        )
    if len(x.shape) < 1 or x.shape[0] == 0:
        raise ValueError(f"{caller}: needs at least one sample; x has shape {tuple(x.shape)}.")
    if not jnp.issubdtype(x.dtype, jnp.floating) and not jnp.issubdtype(x.dtype, jnp.signedinteger):
        raise ValueError(f"{caller}: x must be floats, got {x.dtype}; standardise it first.")
    x = jnp.asarray(x)
    if not isinstance(x, Tracer) and not bool(jnp.isfinite(x).all()):
        raise ValueError(f"{caller}: x has NaN or infinite entries.")
    return x


def check_examples(caller: str, model: PyTree, batch: Any) -> tuple[Array, Array]:
    """The inputs and labels as arrays that suit each other and the model.

    **Raises:**

    `ValueError` when they do not; labels are looked at where their values are known.
    """
    if not isinstance(batch, tuple) or len(batch) != 2:
        raise ValueError(f"{caller}: needs labelled examples, a tuple (x, y).")
    x, y = check_samples(caller, batch[0]), batch[1]
    dtype, shape = getattr(y, "dtype", type(y)), tuple(getattr(y, "shape", ()))
    if shape != x.shape[:1] or not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(
            f"{caller}: {x.shape[0]} inputs need integer labels of shape ({x.shape[0]},), "
            f"got {dtype} of shape {shape}."
        )
    y = jnp.asarray(y)
    classes = logits_shape(caller, model, x)[-1]
    if not isinstance(y, Tracer) and not bool(((y >= 0) & (y < classes)).all()):
        raise ValueError(
            f"{caller}: labels must lie in [0, {classes}), got {int(y.min())} to {int(y.max())}."
        )
    return x, y


def logits_shape(caller: str, model: PyTree, x: Array) -> tuple[int, ...]:
    """The shape `[batch, classes]` of the model's outputs, without computing them.

    **Raises:**

    `ValueError` when the model does not map one sample to one vector of logits.
    """
    out = eqx.filter_eval_shape(lambda m, x: jax.vmap(as_inference(m))(x), model, x)
    if not hasattr(out, "shape") or len(out.shape) != 2:
        got = jax.tree.map(lambda leaf: getattr(leaf, "shape", leaf), out)
        raise ValueError(
            f"{caller}: the model must map one sample of shape {x.shape[1:]} to a vector of "
            f"logits, got {got} for the batch."
        )
    return out.shape
