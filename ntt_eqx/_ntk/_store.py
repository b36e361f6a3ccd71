"""Write kernels that fit neither a device nor memory to a Zarr array, tile by tile."""

import hashlib
import os
import pathlib
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, Shaped

from .._batch import as_array
from .._errors import require
from .._types import PyTree
from ._given import given_model
from ._ntk import ntk
from ._tiles import check_tiles, tile_shape, tiles_between

_READ = 2**24  # bytes of the samples, which may be mapped from a disk, that are read at a time


def ntk_to_zarr(
    folder: str | os.PathLike[str],
    model: PyTree,
    x1: Shaped[Array, "n ..."] | np.ndarray,
    x2: Shaped[Array, "m ..."] | np.ndarray | None = None,
    *,
    tile: tuple[int, int] = (256, 256),
    **options: Any,
) -> Any:
    """Write the kernel of two batches to a Zarr array, or continue an unfinished one.

    Each tile is one chunk, written whole or not at all: a run that was stopped, however it was, is
    called again and computes what is missing. Any reader of Zarr (version 3) opens the folder.

    **Arguments:**

    - `folder`: where the array is, or will be.
    - `model`, `x1`, `x2`: those of `ntk`; batches may be NumPy arrays, memory-mapped ones too.
    - `tile`: most rows and columns of a tile; see `ntk_tiles`.
    - `options`: those of `ntk`.

    **Returns:**

    The array as an open `tensorstore.TensorStore`, `[N, M, ...]`: `store[:9].read().result()` is
    a NumPy array of that part.

    **Raises:**

    `ValueError` where the folder holds the kernel of another model, of other samples or options, or
    something else; `MissingExtra` without tensorstore (the extra `store`); what `ntk_tiles` raises.
    """
    check_tiles("ntk_to_zarr", x1, x2, tile, options)
    model = given_model("ntk_to_zarr", model)
    shape = tile_shape(x1, x2, tile)
    one = lambda x: jax.ShapeDtypeStruct(
        (1, *x.shape[1:]), as_array("ntk_to_zarr", "x", x[:1]).dtype
    )
    sides = (x1, x1 if x2 is None else x2)
    entry = eqx.filter_eval_shape(ntk, model, *map(one, sides), **options)
    lengths = [len(x) for x in sides]
    place, identity = pathlib.Path(folder), _identity(model, sides, x2 is None, options)
    store = _opened(place, (*lengths, *entry.shape[2:]), shape, str(entry.dtype), identity)
    rest = ["0"] * (store.rank - 2)

    def missing(rows: slice, columns: slice) -> bool:
        chunk = (rows.start // shape[0], columns.start // shape[1])
        return not place.joinpath("c", *map(str, chunk), *rest).is_file()

    for rows, columns, theta in tiles_between(model, x1, x2, shape, options, missing):
        store[rows, columns].write(theta).result()
    return store


def _opened(
    place: pathlib.Path,
    shape: tuple[int, ...],
    tile: tuple[int, int],
    dtype: str,
    identity: str,
) -> Any:
    tensorstore = require("ntk_to_zarr", "tensorstore", "store")
    begun = (place / "zarr.json").is_file()
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{place}{os.sep}"},
        "metadata": {
            "shape": shape,
            "data_type": dtype,
            "fill_value": "NaN",
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": (*tile, *shape[2:])},
            },
            "attributes": {"kernel": identity},
        },
    }
    if not begun:
        if place.exists() and any(place.iterdir()):
            raise ValueError(f"ntk_to_zarr: {place} holds something else than a kernel.")
        return tensorstore.open(spec, create=True).result()
    try:
        return tensorstore.open(spec, open=True).result()
    except ValueError as error:
        raise ValueError(
            f"ntk_to_zarr: {place} holds the kernel of another model, of other samples, or with "
            "other options or tiles."
        ) from error


def _identity(model: PyTree, sides: tuple[Any, Any], same: bool, options: Any) -> str:
    """A digest of everything that the kernel depends on."""
    digest = hashlib.sha256(repr(sorted(options)).encode())
    arrays, rest = eqx.partition((model, sides[: 1 if same else 2], options), eqx.is_array)
    digest.update(str(jax.tree.structure(arrays)).encode() + repr(jax.tree.leaves(rest)).encode())
    for leaf in jax.tree.leaves(arrays):
        values = np.asarray(leaf)
        native = values.dtype.newbyteorder("=")  # numbers, not bytes
        digest.update(f"{native}{values.shape}".encode())
        rows = np.atleast_1d(values)
        size = max(1, _READ * len(rows) // max(1, rows.nbytes))
        for start in range(0, len(rows), size):
            digest.update(rows[start : start + size].astype(native, copy=False).tobytes())
    return digest.hexdigest()
