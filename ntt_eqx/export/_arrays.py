"""The arrays of a model by name."""

from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

from .._kept import check_masked_form
from .._sparse import SparseModel
from .._types import PyTree


def named_leaves(caller: str, model: PyTree) -> list[tuple[str, Any]]:
    """Every leaf of `model` (not `None`) with its name, such as `layers.0.weight`."""
    leaves = [(_name(path), leaf) for path, leaf in jtu.tree_leaves_with_path(model)]
    names = [name for name, _ in leaves]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"{caller}: two arrays of the model are called {min(twice)!r}.")
    return leaves


def named_masks(caller: str, sparse: Any) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Name, weight and mask of every masked array, as NumPy arrays."""
    if not isinstance(sparse, SparseModel):
        raise ValueError(f"{caller}: needs a SparseModel, got {type(sparse).__name__}.")
    check_masked_form(caller, sparse)
    leaves = jtu.tree_leaves_with_path(sparse.model, is_leaf=_is_none)
    return [
        (_name(path), as_numpy(leaf), np.asarray(mask))
        for (path, leaf), mask in zip(leaves, sparse.masks, strict=True)
        if mask is not None
    ]


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an array, or stands for one (`jax.ShapeDtypeStruct`)."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def is_key(leaf: Any) -> bool:
    """Whether an array holds typed random keys."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def as_numpy(leaf: Any) -> np.ndarray:
    """The values of an array in row-major order; of random keys, their bits."""
    return np.array(jax.random.key_data(leaf) if is_key(leaf) else leaf, order="C")


def _name(path: jtu.KeyPath) -> str:
    return jtu.keystr(path, simple=True, separator=".")


def _is_none(leaf: Any) -> bool:
    return leaf is None
