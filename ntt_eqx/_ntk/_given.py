"""Checks and conversions of the arguments of the kernel's public functions."""

from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array

from .._batch import as_array
from .._checks import check_batch, is_count
from .._parameters import parameters
from .._types import PyTree


def given_model(caller: str, model: PyTree) -> PyTree:
    """Convert the NumPy arrays of a model that XLA would misread, such as foreign byte orders.

    **Raises:**

    `ValueError` if it has no parameters, or an array of a type that JAX lacks.
    """
    if not jax.tree.leaves(parameters(model)):
        raise ValueError(
            f"{caller}: the model has no floating-point parameters. A function that closes over "
            "its parameters hides them, and f(params, x) takes them first: make a model of either "
            "by eqx.Partial(f, params), and call it with the samples alone, "
            f"{caller}(eqx.Partial(f, params), x)."
        )
    return given_leaves(caller, "model", model)


def given_leaves(caller: str, name: str, tree: PyTree) -> PyTree:
    """Convert the NumPy arrays of a tree with `as_array`; keep all other leaves."""
    held = lambda leaf: isinstance(leaf, np.ndarray | np.generic)
    if not any(map(held, jax.tree.leaves(tree))):
        return tree

    def one(path: Any, leaf: Any) -> Any:
        if not held(leaf) or not (jnp.issubdtype(leaf.dtype, jnp.number) or leaf.dtype == bool):
            return leaf
        found = as_array(caller, f"{name}{jtu.keystr(path)}", leaf)
        # A model may read an array of NumPy while it is traced: only another byte order needs one.
        return leaf if leaf.dtype.isnative else found

    return jtu.tree_map_with_path(one, tree)


def given_batch(caller: str, name: str, x: Any) -> Array:
    """A batch as a JAX array.

    **Raises:**

    `ValueError` unless it is an array of numbers with at least one sample.
    """
    check_batch(f"{caller}: {name}", x := as_array(caller, name, x))
    return x


def given_batches(caller: str, x1: Any, x2: Any) -> tuple[Array, Array | None]:
    """Check two batches with samples of one shape and dtype; `None` repeats the first."""
    x1 = given_batch(caller, "x1", x1)
    x2 = None if x2 is None else given_batch(caller, "x2", x2)
    if x2 is not None and (x1.shape[1:] != x2.shape[1:] or x1.dtype != x2.dtype):
        raise ValueError(
            f"{caller}: x1 holds samples {x1.dtype}{list(x1.shape[1:])} but x2 holds "
            f"{x2.dtype}{list(x2.shape[1:])}; both must suit the model."
        )
    return x1, x2


def given_directions(caller: str, directions: Any) -> tuple[Array, Array] | None:
    """Output directions as JAX arrays `(V[R, K], W[S, K])`."""
    if directions is None:
        return None
    if not isinstance(directions, tuple | list) or len(directions) != 2:
        raise ValueError(
            f"{caller}: directions must be a pair (V[R, K], W[S, K]), got "
            f"{type(directions).__name__}."
        )
    one, two = (as_array(caller, f"directions[{n}]", side) for n, side in enumerate(directions))
    for side in (one, two):
        if side.ndim != 2 or not jnp.issubdtype(side.dtype, jnp.floating):
            raise ValueError(
                f"{caller}: directions must be two floating-point arrays [R, K] and [S, K], got "
                f"{side.dtype}{list(side.shape)}."
            )
    return one, two


def check_side(caller: str, name: str, x: Any) -> None:
    """`given_batch` of a first sample, for a batch that stays on the host."""
    if hasattr(x, "shape") and len(x.shape):
        as_array(caller, name, x[:1])
        check_batch(f"{caller}: {name}", x)
    else:
        given_batch(caller, name, x)


def check_tile(caller: str, tile: Any) -> None:
    """Raise `ValueError` unless `tile` is two positive integers."""
    if not isinstance(tile, tuple | list) or len(tile) != 2 or not all(map(is_count, tile)):
        raise ValueError(
            f"{caller}: tile must be two positive integers, the most rows and columns of a tile, "
            f"such as (256, 256), got {tile!r}."
        )
