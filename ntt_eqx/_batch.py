"""What users bring as a batch, as a PyTree of arrays."""

import collections
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PyTree


def as_arrays(caller: str, batch: Any) -> PyTree[Array]:
    """A batch of any form as a PyTree of JAX arrays.

    Tuples, lists, dicts and Modules keep their form. A plain dataclass becomes a named tuple of its
    fields, and another object with `x` and `y` one of these, for JAX does not look into them.
    Whatever offers its values by `__array__` or by DLPack, as a torch tensor does, becomes an
    array, in the dtypes that JAX has (int64 is int32 unless 64-bit types are enabled).

    **Raises:**

    `ValueError` for a leaf that is no array, naming it.
    """
    return jtu.tree_map_with_path(lambda path, leaf: _array(caller, path, leaf), opened(batch))


def opened(batch: Any) -> PyTree:
    """`batch` with plain dataclasses and other things of `x` and `y` as named tuples."""

    def look(leaf: Any) -> Any:
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            names = tuple(field.name for field in dataclasses.fields(leaf))
        elif hasattr(leaf, "x") and hasattr(leaf, "y") and not hasattr(leaf, "dtype"):
            names = ("x", "y")
        else:
            return leaf
        return opened(_named(type(leaf).__name__, names)(*(getattr(leaf, n) for n in names)))

    return jax.tree.map(look, batch)


def pair(caller: str, batch: Any) -> tuple[Any, Any]:
    """The inputs and targets of a batch.

    They are its `x` and `y`, as attributes or as keys, or the two entries of a tuple or a list.

    **Raises:**

    `ValueError` when there is no such pair.
    """
    if hasattr(batch, "x") and hasattr(batch, "y"):
        return batch.x, batch.y
    if isinstance(batch, Mapping) and {"x", "y"} <= set(batch):
        return batch["x"], batch["y"]
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    raise ValueError(
        f"{caller}: needs labelled examples: a tuple (x, y), or something with `x` and `y`, got "
        f"{type(batch).__name__}. For batches of another form, give an objective of your own."
    )


def batch_size(caller: str, batch: PyTree) -> int:
    """The number of samples: the length of the first axis, which all arrays of a batch share.

    **Raises:**

    `ValueError` when they do not, or there is no sample.
    """
    shapes = {jtu.keystr(p): tuple(np.shape(leaf)) for p, leaf in jtu.tree_leaves_with_path(batch)}
    sizes = {shape[0] if shape else None for shape in shapes.values()}
    if len(sizes) != 1 or None in sizes:
        raise ValueError(
            f"{caller}: all arrays of a batch must have its samples on their first axis, got "
            f"{shapes}."
        )
    (size,) = sizes
    if size == 0:
        raise ValueError(f"{caller}: a batch must hold at least one sample, got {shapes}.")
    return int(size)  # pyright: ignore[reportArgumentType]


def _array(caller: str, path: jtu.KeyPath, leaf: Any) -> Array:
    try:
        if isinstance(leaf, jax.Array | np.ndarray | np.generic | bool | int | float | complex):
            return jnp.asarray(leaf)
        if hasattr(leaf, "__array__"):
            try:
                return jnp.asarray(np.asarray(leaf))
            except TypeError:  # of another device, or of a dtype that numpy has not
                if not hasattr(leaf, "__dlpack__"):
                    raise
        if hasattr(leaf, "__dlpack__"):
            return jnp.from_dlpack(leaf)
    except Exception as error:
        raise ValueError(
            f"{caller}: batch{jtu.keystr(path)} is a {type(leaf).__name__} that cannot be read as "
            f"an array ({type(error).__name__}: {error})."
        ) from error
    raise ValueError(
        f"{caller}: batch{jtu.keystr(path)} must be an array, got {type(leaf).__name__}."
    )


@functools.lru_cache
def _named(name: str, fields: tuple[str, ...]) -> Any:
    # One class for one dataclass: another one would be another structure, and compile again.
    return collections.namedtuple(name, fields)
