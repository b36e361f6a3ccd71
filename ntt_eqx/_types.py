"""Array and PyTree aliases, and the dtype of sums, that several rooms share."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact, Int, PyTree

Inputs: TypeAlias = Inexact[Array, "batch ..."]
"""A batch of model inputs: one leading batch axis, then the shape of one sample."""

Labels: TypeAlias = Int[Array, " batch"]
"""Integer class labels in `[0, num_classes)`."""

Logits: TypeAlias = Float[Array, "batch classes"]
"""Model outputs for a batch."""

Kernel: TypeAlias = Float[Array, "n m k l"]
"""A finite-width neural tangent kernel over full logits."""

MaskTree: TypeAlias = PyTree
"""The structure of a model with a boolean array at every prunable weight and `None` elsewhere."""

ScoreTree: TypeAlias = PyTree
"""The structure of a model with a float array at every prunable weight and `None` elsewhere."""

Where: TypeAlias = Callable[[str, Any, Array], bool]
"""Chooses prunable leaves: `(path, owner, leaf) -> bool`; see `prunable_weights`."""


def widen(x: Array) -> Array:
    """`x` in float32, or in float64 where it is that: the dtype in which sums are taken."""
    return x.astype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)
