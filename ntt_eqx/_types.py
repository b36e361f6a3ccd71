"""Shared aliases of arrays and PyTrees, and the dtype of sums."""

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, Inexact, Int

if TYPE_CHECKING:
    from optax import GradientTransformation as GradientTransformation

    # jaxtyping hides what it is from type checkers, which would call our functions partly unknown
    PyTree: TypeAlias = Any
else:
    from jaxtyping import PyTree as PyTree

    # optax takes a fifteenth of the time of an import; whoever has an optimiser has imported it
    GradientTransformation: TypeAlias = Any

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

KernelKind: TypeAlias = Literal["active", "ambient"]
"""Whether a kernel sums over kept weights or over all."""

Outputs: TypeAlias = Literal["full", "diagonal", "trace"]
"""Which pairs of outputs a kernel has."""

Implementation: TypeAlias = Literal["factors", "jacobian", "ntk_vector_products"]
"""The engine, or one of its two oracles."""

Where: TypeAlias = Callable[[str, Any, Array], bool]
"""Chooses prunable leaves: `(path, owner, leaf) -> bool`; see `prunable_weights`."""


def at_trace_time() -> contextlib.AbstractContextManager[None]:
    """Compute with constants of a traced function now, by which they have values there.

    Outside of a trace this does nothing, because `jax.ensure_compile_time_eval` makes a program of
    each operation on a constant inside the jitted functions that are called under it.
    """
    traced = isinstance(jnp.zeros(()), Tracer)
    return jax.ensure_compile_time_eval() if traced else contextlib.nullcontext()


def x64_is_enabled() -> bool:
    """Whether JAX has 64-bit types here (`JAX_ENABLE_X64`, `jax.enable_x64`)."""
    return jnp.result_type(float) == jnp.float64


def wide_dtype(dtype: Any) -> Any:
    """The dtype for sums of `dtype`: float64 for float64, float32 for all others."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def widen(x: Array) -> Array:
    """`x` in the dtype of its sums."""
    return x.astype(wide_dtype(x.dtype))


def squared_norm(x: Array) -> Array:
    """The sum of `|x|^2`, real, in the dtype of its sums."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return squared_norm(x.real) + squared_norm(x.imag)
    return jnp.sum(jnp.square(widen(x)))
