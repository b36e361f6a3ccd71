"""Files of the `safetensors` library: every array dense, or indices and values of masked ones."""

import fnmatch
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

from .._files import write_whole
from .._sparse import SparseModel
from .._types import PyTree
from ._arrays import as_numpy, is_array, is_key, named_leaves, named_masks
from ._errors import require

Layout = Literal["sparse", "dense"]
Names = Mapping[str, str] | Callable[[str], str]

_DTYPES = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "U16": np.uint16,
    "I16": np.int16,
    "U32": np.uint32,
    "I32": np.int32,
    "U64": np.uint64,
    "I64": np.int64,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "F32": np.float32,
    "F64": np.float64,
    "C64": np.complex64,
}


def save_safetensors(
    path: str | os.PathLike[str],
    model: PyTree,
    *,
    layout: Layout = "sparse",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the arrays of a model to a `.safetensors` file, which many programs can read.

    Arrays are named by their place in the model, `layers.0.weight`. In the layout `"dense"` each
    is stored whole, with zeros where the mask is `False`. In the layout `"sparse"` a masked weight
    `NAME` is two arrays, of its kept entries in row-major order: `NAME.indices` (`[nnz]`, places in
    the flattened weight, int32 or int64) and `NAME.values` (`[nnz]`); its shape is in the file's
    metadata, under `shapes`, a JSON object. Weights under the mask are not stored.

    **Arguments:**

    - `path`: the file; it is written aside and put in its place when it is whole.
    - `model`: a `SparseModel`; with `layout="dense"` any other Equinox model, too.
    - `layout`: `"sparse"` or `"dense"`.
    - `metadata`: further strings to keep in the file.

    **Raises:**

    `ValueError` for an unknown layout, a plain model with `layout="sparse"`, or metadata under the
    names `layout` and `shapes`. `ImportError` if `safetensors` is not installed.
    """
    caller = "save_safetensors"
    library = require(caller, "safetensors.numpy")
    extra = dict(metadata or {})
    if layout not in ("sparse", "dense"):
        raise ValueError(f"{caller}: layout must be 'sparse' or 'dense', got {layout!r}.")
    if taken := {"layout", "shapes"} & set(extra):
        raise ValueError(f"{caller}: the metadata {min(taken)!r} is the file's own.")
    tensors, shapes = {}, {}
    if layout == "sparse":
        if not isinstance(model, SparseModel):
            raise ValueError(
                f"{caller}: {type(model).__name__} has no mask; give a SparseModel, or "
                "layout='dense'."
            )
        for name, weight, mask in named_masks(caller, model):
            flat = np.flatnonzero(mask)
            tensors[f"{name}.indices"] = flat.astype(np.int32 if mask.size < 2**31 else np.int64)
            tensors[f"{name}.values"] = weight[mask]
            shapes[name] = weight.shape
    plain = model.to_dense() if isinstance(model, SparseModel) else model
    for name, leaf in named_leaves(caller, plain):
        if is_array(leaf) and name not in shapes:
            if name in tensors:
                raise ValueError(f"{caller}: two arrays of the file would be called {name!r}.")
            tensors[name] = as_numpy(leaf)
    about = {**extra, "layout": layout, "shapes": json.dumps(shapes)}
    write_whole(Path(path), library.save(tensors, metadata=about))


def load_safetensors(
    path: str | os.PathLike[str],
    like: PyTree,
    *,
    names: Names | None = None,
    ignore: Sequence[str] = (),
) -> PyTree:
    """Read a file that `save_safetensors` wrote, or with `names` one of another program.

    **Arguments:**

    - `path`: the file.
    - `like`: a plain model of the same structure, with arrays of any values, or with
      `jax.ShapeDtypeStruct` in place of arrays (`eqx.filter_eval_shape`).
    - `names`: for a file of another program, such as a PyTorch `state_dict`: what it calls each
      array of `like`, as a mapping such as `{"hidden1.weight": "fc1.weight"}` or a function; arrays
      that a mapping leaves out have the same name in both (`{}` if all have). Arrays may differ in
      axes of length 1 (a convolution's bias is `[O, 1, 1]` in Equinox), and in a dtype that the
      model's holds exactly (float16 or bfloat16 for float32).
    - `ignore`: arrays of such a file that the model has no place for, as patterns
      (`"*.num_batches_tracked"`).

    **Returns:**

    For the layout `"sparse"` a `SparseModel` with the mask of the file, and zeros under it; for
    `"dense"`, and with `names`, a plain model. Leaves of `like` that are no arrays are kept.

    **Raises:**

    `ValueError` that names the file if it is damaged, or if it does not hold exactly the arrays of
    `like`, in their shapes and dtypes; it lists what is missing and what is left over. `OSError` if
    it cannot be read.
    """
    caller = "load_safetensors"
    require(caller, "safetensors")
    if isinstance(like, SparseModel):
        like = like.model
    tensors, about = _read(Path(path))
    if names is not None:
        return _from_foreign(path, like, tensors, names, ignore)
    if about.get("layout") not in ("sparse", "dense"):
        raise ValueError(
            f"{caller}: {path} was not written by save_safetensors; give names={{...}} for a file "
            "of another program."
        )
    leaves, structure = jtu.tree_flatten(like)
    values, masks = list(leaves), [None] * len(leaves)
    for i, (name, leaf) in enumerate(named_leaves(caller, like)):
        if not is_array(leaf):
            continue
        if name in tensors:
            found = tensors.pop(name)
        elif f"{name}.indices" in tensors and f"{name}.values" in tensors:
            pair = tensors.pop(f"{name}.indices"), tensors.pop(f"{name}.values")
            found, masks[i] = _fill(path, name, leaf.shape, *pair)
        else:
            raise ValueError(f"{caller}: {path} has no array for {name}.")
        values[i] = _fitted(path, name, leaf, found)
    if tensors:
        raise ValueError(f"{caller}: {path} holds {min(tensors)}, for which there is no place.")
    model = structure.unflatten(values)
    if about.get("layout") == "dense":
        return model
    return SparseModel(model, structure.unflatten(masks))


def _from_foreign(
    path: Any,
    like: PyTree,
    tensors: dict[str, np.ndarray],
    names: Names,
    ignore: Sequence[str],
) -> PyTree:
    """`like` with the arrays of a file whose names are another program's."""
    caller = "load_safetensors"
    leaves, structure = jtu.tree_flatten(like)
    named = [name for name, _ in named_leaves(caller, like)]
    held = {name for name, leaf in zip(named, leaves, strict=True) if is_array(leaf)}
    called = {name: names(name) if callable(names) else names.get(name, name) for name in held}
    if not callable(names) and (unknown := set(names) - held):
        raise ValueError(f"{caller}: names: the model has no array {min(unknown)!r}.")
    said = []
    if missing := sorted(f"{called[n]!r} (for {n})" for n in held if called[n] not in tensors):
        said.append(f"it lacks {_some(missing)}")
    rest = set(tensors) - set(called.values())
    rest = {name for name in rest if not any(fnmatch.fnmatchcase(name, p) for p in ignore)}
    if rest:
        said.append(f"it holds {_some(sorted(map(repr, rest)))}, for which there is no place")
    if twice := {name for name in called.values() if list(called.values()).count(name) > 1}:
        said.append(f"several arrays of the model take {min(twice)!r}")
    if said:
        raise ValueError(
            f"{caller}: {path}: {'; '.join(said)}. names maps the model's arrays to the file's, "
            "ignore leaves out those of the file."
        )
    values = [
        _converted(path, name, leaf, tensors[called[name]]) if name in held else leaf
        for name, leaf in zip(named, leaves, strict=True)
    ]
    return structure.unflatten(values)


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


def _converted(path: Any, name: str, leaf: Any, found: np.ndarray) -> Any:
    """A foreign array in the model's shape and dtype, where neither changes a value."""
    whole = lambda shape: [size for size in shape if size != 1]
    if not is_key(leaf):
        if whole(found.shape) == whole(leaf.shape):
            found = found.reshape(leaf.shape)
        floats = all(jnp.issubdtype(dtype, jnp.floating) for dtype in (found.dtype, leaf.dtype))
        if floats and np.can_cast(found.dtype, leaf.dtype, "safe"):
            found = found.astype(leaf.dtype)
    return _fitted(path, name, leaf, found)


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    safetensors = require("load_safetensors", "safetensors")
    content = path.read_bytes()
    try:
        found = safetensors.deserialize(content)
        size = int.from_bytes(content[:8], "little")
        about = json.loads(content[8 : 8 + size]).get("__metadata__") or {}
    except Exception as error:  # the library's own, and what a damaged header may lead to
        raise ValueError(f"load_safetensors: {path} is damaged ({error}).") from error
    tensors = {}
    for name, spec in found:
        if spec["dtype"] not in _DTYPES:
            raise ValueError(f"load_safetensors: {path}: {name} has the dtype {spec['dtype']}.")
        tensors[name] = np.frombuffer(spec["data"], _DTYPES[spec["dtype"]]).reshape(spec["shape"])
    return tensors, about


def _fill(
    path: Any, name: str, shape: tuple[int, ...], indices: np.ndarray, values: np.ndarray
) -> tuple[np.ndarray, Any]:
    size = int(np.prod(shape))
    right = indices.ndim == values.ndim == 1 and len(indices) == len(values)
    if right and len(indices):
        right = bool(0 <= indices[0] and indices[-1] < size and np.all(np.diff(indices) > 0))
    if not right:
        raise ValueError(
            f"load_safetensors: {path}: the indices of {name} do not fit a weight of shape {shape}."
        )
    weight, mask = np.zeros(size, values.dtype), np.zeros(size, bool)
    weight[indices], mask[indices] = values, True
    return weight.reshape(shape), jnp.asarray(mask.reshape(shape))


def _fitted(path: Any, name: str, leaf: Any, found: np.ndarray) -> Any:
    if is_key(leaf):
        return jax.random.wrap_key_data(jnp.asarray(found), impl=jax.random.key_impl(leaf))
    if found.shape != tuple(leaf.shape) or found.dtype != leaf.dtype:
        raise ValueError(
            f"load_safetensors: {path}: {name} is {found.dtype}{list(found.shape)}, but the model "
            f"needs {leaf.dtype}{list(leaf.shape)}."
        )
    return found.copy() if isinstance(leaf, np.ndarray) else jnp.asarray(found)
