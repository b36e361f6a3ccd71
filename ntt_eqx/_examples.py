"""Labelled examples: their types, their checks, and the loss on them."""

from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int, Integer, Shaped

from ._batch import as_array, pair
from ._checks import check_batch, check_finite, sample_of, sample_output
from ._sparse import SparseModel
from ._types import PyTree, at_trace_time

Samples: TypeAlias = Shaped[Array | np.ndarray, "batch ..."]
"""Model inputs, one leading batch axis; jax or numpy."""

Examples: TypeAlias = tuple[Samples, Int[Array | np.ndarray, " batch"]]
"""Model inputs with integer labels; `Batch` is one."""


def softmax_cross_entropy(
    logits: Float[Array, "batch classes"],
    labels: Integer[Array, " batch"],
    smoothing: float = 0.0,
) -> Float[Array, " batch"]:
    """Softmax cross-entropy of every sample, in nats; NaN where a label is out of range.

    With `smoothing` the target is `(1 - smoothing)` at the label and `smoothing` spread evenly
    over all classes, the label among them.
    """
    # Narrow integers may not hold the number of classes, nor negative ones that no label wraps.
    labels = labels if labels.dtype.itemsize >= 4 else labels.astype(jnp.int32)
    known = (labels >= 0) & (labels < logits.shape[1])
    index = jnp.where(known, labels, 0).astype(jnp.int32)
    logs = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(logs, index[:, None], axis=1)[:, 0]
    if smoothing:
        chosen = (1 - smoothing) * chosen + smoothing * jnp.mean(logs, axis=1)
    return jnp.where(known, -chosen, jnp.nan)


def as_inference(model: PyTree) -> PyTree:
    """The plain masked model in inference mode."""
    return eqx.nn.inference_mode(model.to_dense() if isinstance(model, SparseModel) else model)


def check_kind(caller: str, x: Any) -> Array:
    """The inputs as a jax array, by shape and dtype alone, so that their values may be traced.

    **Raises:**

    `ValueError` when there is no sample, or when they are of unsigned integers, which may be raw
    pixels, or of complex numbers. Signed integers may be tokens.
    """
    if hasattr(x, "__array__") and not isinstance(x, jax.Array):
        x = as_array(caller, "x", x)
    check_batch(caller, x)
    taken = (jnp.floating, jnp.signedinteger, jnp.bool_)
    if not any(jnp.issubdtype(x.dtype, kind) for kind in taken):
        raise ValueError(
            f"{caller}: x must be floats, got {x.dtype}; standardise it first, a split "
            "of pixels by ntt.data.as_batch(split, mean=data.mean, std=data.std). Tokens must be "
            "signed integers, such as int32."
        )
    return as_array(caller, "x", x)


def check_samples(caller: str, x: Any) -> Array:
    """`check_kind`, and `ValueError` when a value is known to be NaN or infinite."""
    x = check_kind(caller, x)
    check_finite(caller, "x", x)
    return x


def check_examples(caller: str, model: PyTree, batch: Any) -> tuple[Array, Array]:
    """The inputs and labels as arrays that suit each other and the model.

    **Raises:**

    `ValueError` when they do not; labels are looked at where their values are known.
    """
    x, y = pair(caller, batch)
    x = check_samples(caller, x)
    known = hasattr(y, "dtype") and hasattr(y, "shape")
    if not (known and tuple(y.shape) == x.shape[:1] and jnp.issubdtype(y.dtype, jnp.integer)):
        got = f"{y.dtype} of shape {tuple(y.shape)}" if known else type(y).__name__
        hint = ""
        if known and len(y.shape) == 2 and y.shape[0] == x.shape[0]:
            hint = " Of one-hot labels take argmax(axis=1), and of a column [:, 0]."
        elif isinstance(y, list | tuple):
            hint = " np.asarray makes an array of a list."
        raise ValueError(
            f"{caller}: {x.shape[0]} inputs need integer labels of shape ({x.shape[0]},), "
            f"got {got}.{hint}"
        )
    y = as_array(caller, "y", y)
    check_labels(caller, y, num_classes(caller, model, sample_of(x)))
    return x, y


def check_labels(caller: str, y: Any, classes: int) -> None:
    """Raise `ValueError` when a label is known to lie outside of `[0, classes)`."""
    if isinstance(y, Tracer):
        return
    with at_trace_time():  # labels may be a constant of a traced function
        low, high = int(y.min()), int(y.max())
    if not 0 <= low <= high < classes:
        raise ValueError(f"{caller}: labels must lie in [0, {classes}), got {low} to {high}.")


def num_classes(caller: str, model: PyTree, sample: Any) -> int:
    """The number of logits for one sample, without computing them.

    **Raises:**

    `ValueError` when the model does not map one sample to one vector of logits.
    """
    out = sample_output(caller, as_inference(model), sample)
    if len(out.shape) != 1:
        raise ValueError(
            f"{caller}: the model must map one sample of shape {sample.shape} to a vector of "
            f"logits, got the shape {out.shape}."
        )
    return out.shape[0]
