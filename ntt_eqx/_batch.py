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
    array, in the dtypes that JAX has (int64 is int32 unless 64-bit types are enabled); see
    `as_array`.

    **Raises:**

    `ValueError` for a leaf that is no array, naming it.
    """
    return jtu.tree_map_with_path(
        lambda path, leaf: as_array(caller, f"batch{jtu.keystr(path)}", leaf), opened(batch)
    )


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


_INPUTS = ("x", "image", "pixel_values", "input")


def inputs_of(caller: str, batch: Any) -> Any:
    """The inputs of a batch, with or without targets.

    They are its `x`, as an attribute, its `x`, `image`, `pixel_values` or `input`, as a key, the
    first entry of a tuple or a list, or the batch itself.

    **Raises:**

    `ValueError` for a mapping without such a key, an empty tuple or list.
    """
    if isinstance(batch, Mapping):
        found = [name for name in _INPUTS if name in batch]
        if not found:
            raise ValueError(
                f"{caller}: a dict of examples needs inputs under one of {_INPUTS}, got the keys "
                f"{list(batch)[:9]}."
            )
        return batch[found[0]]
    if isinstance(batch, tuple | list):
        if not batch:
            raise ValueError(
                f"{caller}: needs a batch of inputs, got an empty {type(batch).__name__}."
            )
        return batch[0]
    return batch.x if hasattr(batch, "x") and not hasattr(batch, "dtype") else batch


def shape_of_inputs(batch: Any) -> jax.ShapeDtypeStruct | None:
    """Shape and dtype of the inputs of a batch, `None` where it does not tell them."""
    try:
        x = inputs_of("", batch)
        return jax.ShapeDtypeStruct(tuple(x.shape), jnp.dtype(x.dtype))
    except Exception:  # an objective or a score of one's own may read batches of any form
        return None


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


def as_array(caller: str, name: str, value: Any) -> Array:
    """The one door for arrays that come from outside: `value` as a JAX array of the same numbers.

    JAX arrays and tracers pass as they are. NumPy arrays come in native byte order, for XLA reads
    the bytes of any other as if they were native. What JAX would change in silence is refused:
    integers that do not fit the 32 bits that JAX has without 64-bit types, `longdouble`, and
    entries that a masked array hides.

    **Arguments:**

    - `caller`, `name`: begin the message of an error, as in `"ntk: x1"`.
    - `value`: an array, a number, or what offers its values by `__array__` or by DLPack.

    **Raises:**

    `ValueError` for what is no array of numbers or booleans.
    """
    if isinstance(value, jax.Array):
        return value
    what = f"{caller}: {name}"
    try:
        held = _held(value)
    except Exception as error:
        raise ValueError(
            f"{what} is a {type(value).__name__} that cannot be read as an array "
            f"({type(error).__name__}: {error})."
        ) from error
    if held is None:
        raise ValueError(f"{what} must be an array, got {type(value).__name__}.")
    if isinstance(held, np.ma.MaskedArray):
        raise ValueError(f"{what} is a masked array; give it numbers for its masked entries first.")
    if isinstance(held, np.ndarray):
        return jnp.asarray(_native(what, held))
    return held


def _held(value: Any) -> Array | np.ndarray | None:
    """`value` as an array of JAX or NumPy; `None` where it is none."""
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, np.generic | bool | int | float | complex):
        return np.asarray(value) if isinstance(value, np.generic) else jnp.asarray(value)
    if hasattr(value, "__array__"):
        try:
            return np.asarray(value)
        except TypeError:  # of another device, or of a dtype that numpy has not
            if not hasattr(value, "__dlpack__"):
                raise
    return jnp.from_dlpack(value) if hasattr(value, "__dlpack__") else None


def _native(what: str, array: np.ndarray) -> np.ndarray:
    dtype = array.dtype
    if not (jnp.issubdtype(dtype, jnp.number) or dtype.kind == "b"):
        raise ValueError(f"{what} must be an array of numbers, got one of {dtype}.")
    if dtype.char in "gG":
        raise ValueError(f"{what} is {dtype}, which JAX does not have; cast it to float64 first.")
    if not dtype.isnative:
        array = array.astype(dtype.newbyteorder("="))
    held = jax.dtypes.canonicalize_dtype(array.dtype)
    if jnp.issubdtype(held, jnp.integer) and held != array.dtype and array.size:
        low, high, limits = array.min(), array.max(), jnp.iinfo(held)
        if low < limits.min or high > limits.max:
            raise ValueError(
                f"{what} holds {dtype} numbers from {low} to {high}, which JAX would wrap to "
                f"{held}; enable 64-bit types (jax.enable_x64) or map them to smaller numbers."
            )
    return array


@functools.lru_cache
def _named(name: str, fields: tuple[str, ...]) -> Any:
    # One class for one dataclass: another one would be another structure, and compile again.
    return collections.namedtuple(name, fields)
