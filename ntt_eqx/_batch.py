"""Convert the batches that users pass to PyTrees of arrays."""

import collections
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array

from ._types import PyTree


def as_arrays(caller: str, batch: Any) -> PyTree:
    """Convert a batch of any form to a PyTree of JAX arrays.

    Tuples, lists, dicts and Modules keep their form. Plain dataclasses, and other objects with `x`
    and `y`, become named tuples, because JAX does not traverse them. Anything with `__array__` or
    DLPack, such as a torch tensor, becomes an array, in the dtypes that JAX has (int64 is int32
    unless 64-bit types are enabled); see `as_array`.

    **Raises:**

    `ValueError` for a leaf that is no array, naming it.
    """
    if type(batch) is tuple and all(isinstance(leaf, jax.Array) for leaf in batch):
        return batch  # as it is in every step of most runs
    return jtu.tree_map_with_path(
        lambda path, leaf: as_array(caller, f"batch{jtu.keystr(path)}", leaf), opened(batch)
    )


def opened(batch: Any) -> PyTree:
    """Convert plain dataclasses, and other objects with `x` and `y`, to named tuples."""

    def look(leaf: Any) -> Any:
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            names = tuple(field.name for field in dataclasses.fields(leaf))
        elif hasattr(leaf, "x") and hasattr(leaf, "y") and not hasattr(leaf, "dtype"):
            names = ("x", "y")
        else:
            return leaf
        return opened(_named(type(leaf).__name__, names)(*(getattr(leaf, n) for n in names)))

    return jax.tree.map(look, batch)


INPUTS = (
    "x", "image", "images", "img", "pixel_values", "input", "inputs", "input_ids", "features"
)  # fmt: skip
"""Keys under which a dict may hold its inputs: ours, torch's and those of Hugging Face."""

TARGETS = ("y", "label", "labels", "target", "targets")
"""Keys under which a dict may hold its labels or targets."""


def pair(caller: str, batch: Any) -> tuple[Any, Any]:
    """The inputs and targets of a batch.

    They are its `x` and `y`, as attributes or as keys, the one of the keys `INPUTS` that it has
    with the one of `TARGETS`, or the two entries of a tuple or a list.

    **Raises:**

    `ValueError` when there is no such pair, or more than one.
    """
    if hasattr(batch, "x") and hasattr(batch, "y"):
        return batch.x, batch.y
    if isinstance(batch, Mapping):
        return _of_names(caller, batch, INPUTS), _of_names(caller, batch, TARGETS)
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    length = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
    raise ValueError(
        f"{caller}: needs labelled examples: a tuple (x, y), or something with `x` and `y`, got "
        f"{type(batch).__name__}{length}. For batches of another form, give an objective of your "
        "own."
    )


def inputs_of(caller: str, batch: Any) -> Any:
    """The inputs of a batch, with or without targets: an array itself, the first of a tuple."""
    if isinstance(batch, Mapping):
        return _of_names(caller, batch, INPUTS)
    if hasattr(batch, "x") and not hasattr(batch, "dtype"):
        return batch.x
    return batch[0] if isinstance(batch, tuple | list) and batch else batch


def shape_of_inputs(batch: Any) -> jax.ShapeDtypeStruct | None:
    """Shape and dtype of the inputs of a batch, `None` if unknown."""
    try:
        x = inputs_of("", batch)
        return jax.ShapeDtypeStruct(tuple(x.shape), jnp.dtype(x.dtype))
    except Exception:  # an objective or a score of one's own may read batches of any form
        return None


def _of_names(caller: str, batch: Mapping, names: tuple[str, ...]) -> Any:
    """The entry of a dict that has one of these names; the first of them goes before the others."""
    found = [name for name in names if name in batch]
    if len(found) == 1 or names[0] in found:
        return batch[found[0]]
    raise ValueError(
        f"{caller}: a batch that is a dict must have {'only ' if found else ''}one of the keys "
        f"{', '.join(names)}; this one has {', '.join(map(str, found or batch)) or 'none'}. Hand "
        "over {'x': ..., 'y': ...}, or give an objective of your own."
    )


def as_stream(caller: str, data: Any, *, labels: bool = True, again: bool = False) -> Any:
    """An iterable of batches, from data in any form: one batch, or many; see `is_batch`.

    **Arguments:**

    - `caller`: begins the message of an error, as in `"train: batches"`.
    - `data`: one batch or many.
    - `labels`: whether batches are read with their targets.
    - `again`: whether the batches are read more than once, which excludes iterators.

    **Raises:**

    `ValueError` for what is neither, and for an iterator that would have to be gone through again.
    """
    if is_batch(data, labels=labels):
        return [data]
    if not hasattr(data, "__iter__") or isinstance(data, str | bytes):
        call = "; call it, if it makes them" if callable(data) else ""
        raise ValueError(
            f"{caller} must be one batch, or something that yields batches (a list, an iterator, a "
            f"DataLoader), got {type(data).__name__}{call}."
        )
    if again and isinstance(data, Iterator):
        raise ValueError(
            f"{caller} is an iterator, which can be gone through only once, and every row needs "
            "it; hand over a list, a DataLoader, or one batch."
        )
    return data


def is_batch(data: Any, *, labels: bool = True) -> bool:
    """Whether `data` is one batch, and not an iterable of batches.

    One batch is an array, a dict, what has fields (a dataclass, a named tuple, a Module, something
    of `x` and `y`), and a tuple of arrays. Many are what else can be gone through (an iterator, a
    `DataLoader`), and a tuple or a list whose entries all are batches of several arrays. Of a list
    of arrays two are one batch, the pair `[x, y]`; any other number are batches of one array each.

    Without `labels` arrays of one dtype whose samples have one shape are many batches, be they in
    a tuple or in a list, two or more, and all others are one, the inputs before their labels.
    """
    if not isinstance(data, tuple | list) or hasattr(data, "_fields"):
        return _is_array(data) or _has_fields(data)
    if all(isinstance(entry, tuple | list) or _has_fields(entry) for entry in data):
        return False
    if not all(map(_is_array, data)):
        return True
    if labels:
        return isinstance(data, tuple) or len(data) == 2
    shapes = [tuple(getattr(entry, "shape", ())) for entry in data]
    kinds = {
        (str(getattr(entry, "dtype", "")), shape[1:])
        for entry, shape in zip(data, shapes, strict=True)
    }
    return len(kinds) != 1 or not all(shapes)


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype") or hasattr(value, "__array__")


def _has_fields(value: Any) -> bool:
    if isinstance(value, Mapping) or hasattr(value, "_fields"):
        return True
    if hasattr(value, "x") and hasattr(value, "y"):
        return True
    plain = dataclasses.is_dataclass(value) and not isinstance(value, type)
    return plain and not hasattr(value, "__iter__")


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
    """Convert an array from outside to a JAX array with the same numbers.

    JAX arrays and tracers pass unchanged. NumPy arrays get native byte order, because XLA would
    misread any other. Conversions in which JAX silently changes values are errors:
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
    """`value` as an array of JAX or NumPy; `None` if it is not an array."""
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
