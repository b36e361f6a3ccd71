"""Files of the `safetensors` library: every array dense, or indices and values of masked ones."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree

from .._files import write_whole
from .._sparse import SparseModel
from ._arrays import as_numpy, is_array, is_key, named_leaves, named_masks
from ._errors import require

Layout = Literal["sparse", "dense"]

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


def load_safetensors(path: str | os.PathLike[str], like: PyTree) -> PyTree:
    """Read a file that `save_safetensors` wrote.

    **Arguments:**

    - `path`: the file.
    - `like`: a plain model of the same structure, with arrays of any values, or with
      `jax.ShapeDtypeStruct` in place of arrays (`eqx.filter_eval_shape`).

    **Returns:**

    For the layout `"sparse"` a `SparseModel` with the mask of the file, and zeros under it; for
    `"dense"` a plain model. Leaves of `like` that are no arrays are kept.

    **Raises:**

    `ValueError` that names the file if it is damaged, or if it does not hold exactly the arrays of
    `like`, in their shapes and dtypes. `OSError` if it cannot be read.
    """
    caller = "load_safetensors"
    require(caller, "safetensors")
    if isinstance(like, SparseModel):
        like = like.model
    tensors, about = _read(Path(path))
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


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    safetensors = require("load_safetensors", "safetensors")
    content = path.read_bytes()
    try:
        found = safetensors.deserialize(content)
        size = int.from_bytes(content[:8], "little")
        about = json.loads(content[8 : 8 + size]).get("__metadata__", {})
    except Exception as error:  # the library's own, and what a damaged header may lead to
        raise ValueError(f"load_safetensors: {path} is damaged ({error}).") from error
    if about.get("layout") not in ("sparse", "dense"):
        raise ValueError(f"load_safetensors: {path} was not written by save_safetensors.")
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
