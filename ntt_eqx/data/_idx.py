"""The IDX format of MNIST and Fashion-MNIST, gzipped or not."""

import gzip
import hashlib
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from ._errors import DatasetError

_LARGEST = 1 << 30  # bytes; no published file comes near it, and gzip would inflate to it


def read_idx(path: Path, num_axes: int, *, sha256: str | None = None) -> np.ndarray:
    """Read a whole IDX file of unsigned bytes.

    The format: the magic number `0x00, 0x00, 0x08, num_axes`, the sizes of the axes as big-endian
    uint32, then the bytes in row-major order.

    **Arguments:**

    - `path`: the file; gzip is recognised by its first two bytes.
    - `num_axes`: 3 for images, 1 for labels.
    - `sha256`: the digest of the uncompressed file, or `None` not to check.

    **Returns:**

    A uint8 array with `num_axes` axes.

    **Raises:**

    `DatasetError` that names the file when it cannot be read, has another magic number, is
    truncated, too long, or has another digest.
    """
    try:
        with path.open("rb") as raw:
            zipped = raw.read(2) == b"\x1f\x8b"
        with gzip.open(path) if zipped else path.open("rb") as file:
            header = file.read(4 + 4 * num_axes)
            shape = _shape(path, header, num_axes)
            size = math.prod(shape)
            body = file.read(size)
            rest = file.read(1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DatasetError(f"{path}: truncated or damaged gzip file ({error}).") from error
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({error}).") from error
    if len(body) < size:
        raise DatasetError(f"{path}: truncated, {len(body):,} of {size:,} bytes after the header.")
    if rest:
        raise DatasetError(f"{path}: longer than the {size:,} bytes that its header announces.")
    digest = hashlib.sha256(header)
    digest.update(body)
    if sha256 is not None and digest.hexdigest() != sha256:
        raise DatasetError(
            f"{path}: wrong checksum; the SHA-256 of the uncompressed file is "
            f"{digest.hexdigest()}, expected {sha256}."
        )
    return np.frombuffer(body, np.uint8).reshape(shape)


def _shape(path: Path, header: bytes, num_axes: int) -> tuple[int, ...]:
    magic = bytes([0, 0, 8, num_axes])
    if header[:4] != magic[: len(header[:4])]:
        raise DatasetError(
            f"{path}: wrong magic number 0x{header[:4].hex()}, expected 0x{magic.hex()} "
            f"(IDX, unsigned bytes, {num_axes} axes)."
        )
    if len(header) < 4 + 4 * num_axes:
        raise DatasetError(f"{path}: truncated within the header.")
    shape = struct.unpack(f">{num_axes}I", header[4:])
    if math.prod(shape) > _LARGEST:
        raise DatasetError(f"{path}: the header announces an impossible shape {shape}.")
    return shape
