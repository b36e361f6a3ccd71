"""Sparse models in files: a JSON header that names the architecture, masks, and kept weights.

A pruned weight is read back as zero. Whatever reads these files computes the same bits with zeros
there: the network's outputs and kernels, and training, whose optimiser sees zeros at pruned weights
and cannot move them; a weight that grows in training starts at zero. A mask made anew from such a
network finds nothing to bring back.
"""

import hashlib
import io
import json
import struct
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .. import SparseModel, sparsify
from .._types import x64_is_enabled
from ._errors import ExperimentError
from ._files import check_fields, check_ranges, read_bytes
from .own import build_model, digest_of, unknown_code

_MAGIC = b"ntt-eqx model 2\n"
_OLD_MAGIC = b"ntt-eqx model\n"  # of version 1, whose checksum is of the arrays alone
_VERSION = 3  # version 2 has a byte for each mask's entry and all weights, 1 weights before masks
_DIGEST = 32  # bytes of a SHA-256
_LONGEST_HEADER = 1 << 20
_FIELDS = {
    "model": str,
    "arguments": dict,
    **dict.fromkeys(("dataset", "method", "scope", "settings_id"), str | None),
    "mask": dict | None,
    "density": float | int | None,
    "seed": int | None,
}
_RANGES = {"density": 1, "seed": (0, 2**31 - 1)}


class LoadedModel(NamedTuple):
    """A network from a file."""

    model: SparseModel  # the network; its pruned weights are zero
    header: dict[str, Any]  # what the file says of it: `model`, `arguments`, `dataset` and more


def encode_model(model: SparseModel, header: dict[str, Any]) -> bytes:
    """The content of a model file.

    It is the line `ntt-eqx model 2`, the length of the header (8 bytes, little-endian), the header
    (JSON), the arrays as `eqx.tree_serialise_leaves` writes them, and the SHA-256 of all of this.
    The arrays are the masks, as bits (`np.packbits`), and the leaves of the model, of a masked one
    the kept entries alone, in row-major order.
    """
    masks = [None if mask is None else np.asarray(mask) for mask in model.masks]
    buffer = io.BytesIO()
    eqx.tree_serialise_leaves(buffer, [m if m is None else np.packbits(m) for m in masks])
    kept = lambda leaf, mask: leaf if mask is None else np.asarray(leaf)[mask]
    eqx.tree_serialise_leaves(buffer, list(map(kept, _leaves(model.model), masks)))
    payload = buffer.getvalue()
    text = json.dumps({**header, "version": _VERSION, "bytes": len(payload)}).encode()
    content = _MAGIC + struct.pack("<Q", len(text)) + text + payload
    return content + hashlib.sha256(content).digest()


def load_model(path: Path) -> LoadedModel:
    """Read a file that `encode_model` made. Nothing in the file is executed.

    A warning is given for a file of version 0.2 or earlier, whose header has no checksum.

    Raises `ExperimentError` naming the file, when it is missing, not a model file, truncated,
    changed, or written by a newer version.
    """
    return decode_model(path, read_bytes(path))


def decode_model(path: Path, content: bytes) -> LoadedModel:
    """`load_model` of a file with this content."""
    try:
        return _decoded(path, content)
    except ExperimentError as error:
        other = not x64_is_enabled()
        try:
            with jax.enable_x64(other):
                _decoded(path, content)
        except ExperimentError:
            raise error from None
        raise ExperimentError(
            f"{path}: its network was made with JAX_ENABLE_X64={other:d}; set it to read the file."
        ) from error


def _decoded(path: Path, content: bytes) -> LoadedModel:
    header, payload = _split(path, content)
    check_fields(f"{path}: damaged: its header", header, _FIELDS)
    check_ranges(f"{path}: damaged: its header", header, _RANGES)
    _check_code(path, header)
    try:
        like = eqx.filter_eval_shape(lambda: _blank(header))
    except Exception as error:  # whatever a constructor makes of arguments that are not its own
        raise ExperimentError(f"{path}: cannot build the model it names: {error}") from error
    fits = f"{path}: its arrays do not fit {header['model']!r}"
    if _fewest_bytes(like, header["version"]) > len(payload):
        raise ExperimentError(f"{fits} (too few bytes).")
    buffer = io.BytesIO(payload)
    try:
        model = _read_arrays(buffer, like, header["version"])
    except Exception as error:
        raise ExperimentError(f"{fits} ({error}).") from error
    if buffer.read(1):
        raise ExperimentError(f"{path}: has more arrays than {header['model']!r}.")
    return LoadedModel(model, header)


def _fewest_bytes(like: SparseModel, version: int) -> int:
    """The fewest bytes that arrays of these shapes take in a file."""
    bits = version > 2
    pairs = zip(_leaves(like.model), like.masks, strict=True)
    arrays = [(leaf, mask) for leaf, mask in pairs if isinstance(leaf, jax.ShapeDtypeStruct)]
    taken = lambda leaf, mask: (mask is None or not bits) * leaf.size * leaf.dtype.itemsize
    masks = [mask.size for _, mask in arrays if mask is not None]
    return sum(taken(*pair) for pair in arrays) + sum(-(-n // 8) if bits else n for n in masks)


def _read_arrays(buffer: io.BytesIO, like: SparseModel, version: int) -> SparseModel:
    if version > 2:
        return _read_kept(buffer, like)
    if version > 1:
        return eqx.tree_deserialise_leaves(buffer, like)
    model, masks = eqx.tree_deserialise_leaves(buffer, (like.model, like.masks))
    return eqx.tree_at(lambda s: (s.model, s.masks), like, (model, masks))


def _read_kept(buffer: io.BytesIO, like: SparseModel) -> SparseModel:
    packed = [None if m is None else np.empty(-(-m.size // 8), np.uint8) for m in like.masks]
    packed = eqx.tree_deserialise_leaves(buffer, packed)
    masks = [
        None if mask is None else _unpacked(bits, mask.shape)
        for bits, mask in zip(packed, like.masks, strict=True)
    ]
    leaves = _leaves(like.model)
    kept = [
        leaf if mask is None else np.empty(int(mask.sum()), leaf.dtype)
        for leaf, mask in zip(leaves, masks, strict=True)
    ]
    kept = eqx.tree_deserialise_leaves(buffer, kept)
    filled = [
        leaf if mask is None else _filled(mask, leaf)
        for mask, leaf in zip(masks, kept, strict=True)
    ]
    model = jax.tree.structure(like.model, is_leaf=_is_none).unflatten(filled)
    masks = tuple(None if mask is None else jnp.asarray(mask) for mask in masks)
    return eqx.tree_at(lambda s: (s.model, s.masks), like, (model, masks))


def _unpacked(bits: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    size = int(np.prod(shape, dtype=int))
    entries = np.unpackbits(bits)
    if entries[size:].any():
        raise ValueError("a mask has more entries than its weight")
    return entries[:size].astype(bool).reshape(shape)


def _filled(mask: np.ndarray, kept: np.ndarray) -> Array:
    weight = np.zeros(mask.shape, kept.dtype)
    weight[mask] = kept
    return jnp.asarray(weight)


def _leaves(model: Any) -> list[Any]:
    """The leaves of a model as its masks count them: `None` is one."""
    return jax.tree.leaves(model, is_leaf=_is_none)


def _is_none(leaf: Any) -> bool:
    return leaf is None


def _blank(header: dict[str, Any]) -> SparseModel:
    # Only its shapes are used: nothing is drawn, and nothing is allocated for a header that lies.
    arguments = header["arguments"]
    shape = tuple(int(size) for size in arguments["input_shape"])
    key = jax.random.key(0)
    return sparsify(build_model(header["model"], shape, arguments["num_classes"], key=key))


def _check_code(path: Path, header: dict[str, Any]) -> None:
    """Raise `ExperimentError` if the model is a user's own, and not the code that is here now."""
    code, name = header.get("code") or {}, header["model"]
    digest = code.get("model") if isinstance(code, dict) else None
    known = digest_of("model", name)
    if digest is not None and known is None:
        raise ExperimentError(f"{path}: {unknown_code('model', name)}")
    if digest != known:
        raise ExperimentError(f"{path}: its network {name} is of another version of that code.")


def _split(path: Path, content: bytes) -> tuple[dict[str, Any], bytes]:
    old = content.startswith(_OLD_MAGIC)
    magic = _OLD_MAGIC if old else _MAGIC
    start = len(magic) + 8
    if not content.startswith(magic):
        raise ExperimentError(f"{path}: not an ntt-eqx model file.")
    if len(content) < start:
        raise ExperimentError(f"{path}: truncated.")
    (length,) = struct.unpack("<Q", content[len(magic) : start])
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
    end = len(content) - (0 if old else _DIGEST)
    payload = content[start + length : end]
    if len(payload) != header.get("bytes"):
        raise ExperimentError(
            f"{path}: truncated: {len(payload)} of {header.get('bytes')} bytes of arrays."
        )
    summed, wanted = (
        (payload, header.get("sha256")) if old else (content[:end], content[end:].hex())
    )
    if hashlib.sha256(summed).hexdigest() != wanted:
        raise ExperimentError(f"{path}: damaged: its content does not match its checksum.")
    if old:
        warnings.warn(
            f"{path}: written by ntt-eqx 0.2 or earlier; the checksum does not cover what it says "
            "of its model, dataset, density and seed.",
            stacklevel=4,
        )
    return header, payload
