"""Sparse models in files: a JSON header that names the architecture, then the arrays."""

import hashlib
import io
import json
import struct
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax

from .. import SparseModel, sparsify
from ..models import make_model
from ._errors import ExperimentError
from ._files import check_fields, read_bytes, write_bytes

_MAGIC = b"ntt-eqx model\n"
_VERSION = 2  # masks before weights; in version 1 after them
_LONGEST_HEADER = 1 << 20
_FIELDS = {
    "model": str,
    "arguments": dict,
    **dict.fromkeys(("dataset", "method", "scope"), str | None),
    "density": float | int | None,
    "seed": int | None,
}


class LoadedModel(NamedTuple):
    """A network from a file."""

    model: SparseModel  # the network, dense weights and mask
    header: dict[str, Any]  # what the file says of it: `model`, `arguments`, `dataset` and more


def save_model(path: Path, model: SparseModel, header: dict[str, Any]) -> None:
    """Write `model` to `path` in one step.

    The file is the line `ntt-eqx model`, the length of the header (8 bytes, little-endian), the
    header (JSON), and the arrays as `eqx.tree_serialise_leaves` writes them.
    """
    buffer = io.BytesIO()
    eqx.tree_serialise_leaves(buffer, model)
    payload = buffer.getvalue()
    digest = hashlib.sha256(payload).hexdigest()
    full = {**header, "version": _VERSION, "bytes": len(payload), "sha256": digest}
    text = json.dumps(full).encode()
    write_bytes(path, _MAGIC + struct.pack("<Q", len(text)) + text + payload)


def load_model(path: Path) -> LoadedModel:
    """Read a file that `save_model` wrote. Nothing in the file is executed.

    Raises `ExperimentError` naming the file, when it is missing, not a model file, truncated,
    changed, or written by a newer version.
    """
    header, payload = _split(path, read_bytes(path))
    check_fields(f"{path}: damaged: its header", header, _FIELDS)
    try:
        like = eqx.filter_eval_shape(lambda: _blank(header))
    except Exception as error:  # whatever a constructor makes of arguments that are not its own
        raise ExperimentError(f"{path}: cannot build the model it names: {error}") from error
    fits = f"{path}: its arrays do not fit {header['model']!r}"
    arrays = [leaf for leaf in jax.tree.leaves(like) if isinstance(leaf, jax.ShapeDtypeStruct)]
    if sum(leaf.size * leaf.dtype.itemsize for leaf in arrays) > len(payload):
        raise ExperimentError(f"{fits} (too few bytes).")
    buffer = io.BytesIO(payload)
    try:
        model = _read_arrays(buffer, like, header["version"])
    except Exception as error:
        raise ExperimentError(f"{fits} ({error}).") from error
    if buffer.read(1):
        raise ExperimentError(f"{path}: has more arrays than {header['model']!r}.")
    return LoadedModel(model, header)


def _read_arrays(buffer: io.BytesIO, like: SparseModel, version: int) -> SparseModel:
    if version > 1:
        return eqx.tree_deserialise_leaves(buffer, like)
    model, masks = eqx.tree_deserialise_leaves(buffer, (like.model, like.masks))
    return eqx.tree_at(lambda s: (s.model, s.masks), like, (model, masks))


def _blank(header: dict[str, Any]) -> SparseModel:
    # Only its shapes are used: nothing is drawn, and nothing is allocated for a header that lies.
    arguments = header["arguments"]
    shape = tuple(int(size) for size in arguments["input_shape"])
    key = jax.random.key(0)
    return sparsify(make_model(header["model"], shape, arguments["num_classes"], key=key))


def _split(path: Path, content: bytes) -> tuple[dict[str, Any], bytes]:
    start = len(_MAGIC) + 8
    if not content.startswith(_MAGIC):
        raise ExperimentError(f"{path}: not an ntt-eqx model file.")
    if len(content) < start:
        raise ExperimentError(f"{path}: truncated.")
    (length,) = struct.unpack("<Q", content[len(_MAGIC) : start])
    if length > _LONGEST_HEADER or len(content) < start + length:
        raise ExperimentError(f"{path}: truncated or damaged: its header is not whole.")
    try:
        header = json.loads(content[start : start + length])
    except (ValueError, RecursionError) as error:
        raise ExperimentError(f"{path}: damaged: its header is not JSON ({error}).") from error
    if not isinstance(header, dict) or type(header.get("version")) is not int:
        raise ExperimentError(f"{path}: damaged: its header does not name a version.")
    if header["version"] > _VERSION:
        raise ExperimentError(
            f"{path}: written by a newer version (format {header['version']}, this one reads up "
            f"to {_VERSION}); update ntt-eqx."
        )
    payload = content[start + length :]
    if len(payload) != header.get("bytes"):
        raise ExperimentError(
            f"{path}: truncated: {len(payload)} of {header.get('bytes')} bytes of arrays."
        )
    if hashlib.sha256(payload).hexdigest() != header.get("sha256"):
        raise ExperimentError(f"{path}: damaged: the checksum of its arrays does not match.")
    return header, payload
