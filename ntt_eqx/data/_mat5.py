"""The part of MATLAB's MAT-file format (level 5) that the files of SVHN use.

`scipy.io.loadmat` reads more, but a few changed bytes in a file end its process (SciPy 1.17,
segmentation fault), and here any file gives arrays or an error.
"""

import math
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ._errors import DatasetError

_HEADER = 128  # bytes of text, version and byte order
_LARGEST = 1 << 30  # bytes of one decompressed variable; the largest of SVHN has 225 million
_COMPRESSED, _MATRIX, _INT8, _INT32, _UINT32 = 15, 14, 1, 5, 6
_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8"}
_DOUBLE_CLASS, _LAST_NUMERIC_CLASS = 6, 15
_COMPLEX = 0x08


class _Element(NamedTuple):
    kind: int
    data: memoryview
    end: int


def read_mat5(path: Path) -> dict[str, np.ndarray]:
    """Read the real numeric arrays at the top level of a MAT-file, compressed or not.

    **Arguments:**

    - `path`: the file.

    **Returns:**

    The arrays by name, each in the numeric type in which it is stored.

    **Raises:**

    `DatasetError` that names the file when it cannot be read, is no level-5 MAT-file, is
    truncated or damaged, or holds anything but real numeric arrays.
    """
    try:
        data = memoryview(path.read_bytes())
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({error}).") from error
    order = {b"IM": "<", b"MI": ">"}.get(bytes(data[126:128]))
    if order is None or struct.unpack(f"{order}H", data[124:126])[0] != 0x0100:
        raise DatasetError(f"{path}: wrong magic number, not a MAT-file of level 5.")
    arrays = {}
    position = _HEADER
    try:
        while position < len(data):
            element = _element(data, position, order)
            position = element.end
            if element.kind == _COMPRESSED:
                # a compressed element is not padded to 8 bytes
                position = element.end - (-len(element.data)) % 8
                element = _element(_inflate(element.data), 0, order)
            if element.kind != _MATRIX:
                raise ValueError(f"element of type {element.kind} at the top level")
            name, array = _matrix(element.data, order)
            arrays[name] = array
    except (ValueError, struct.error, zlib.error) as error:
        raise DatasetError(f"{path}: truncated or damaged MAT-file ({error}).") from error
    return arrays


def _element(data: memoryview, position: int, order: str) -> _Element:
    """The element at `position`; its first four bytes hold a small one's type and size."""
    kind, size = struct.unpack_from(f"{order}II", data, position)
    if kind >> 16:
        kind, size, start = kind & 0xFFFF, kind >> 16, position + 4
        if size > 4:
            raise ValueError("small element of more than 4 bytes")
        return _Element(kind, data[start : start + size], position + 8)
    start = position + 8
    if start + size > len(data):
        raise ValueError(f"element of {size:,} bytes in the last {len(data) - start:,}")
    return _Element(kind, data[start : start + size], start + size + (-size) % 8)


def _inflate(data: memoryview) -> memoryview:
    inflater = zlib.decompressobj()
    plain = inflater.decompress(data, _LARGEST)
    if not inflater.eof:
        raise ValueError("compressed variable is truncated or too large")
    return memoryview(plain)


def _matrix(data: memoryview, order: str) -> tuple[str, np.ndarray]:
    """Name and values of a matrix: array flags, dimensions, name, real part."""
    flags = _element(data, 0, order)
    dims = _element(data, flags.end, order)
    name = _element(data, dims.end, order)
    if (flags.kind, dims.kind, name.kind) != (_UINT32, _INT32, _INT8):
        raise ValueError("matrix without flags, dimensions and name")
    (flag,) = struct.unpack_from(f"{order}I", flags.data)
    if not _DOUBLE_CLASS <= flag & 0xFF <= _LAST_NUMERIC_CLASS or flag >> 8 & _COMPLEX:
        raise ValueError(f"variable of class {flag & 0xFF} is not a real numeric array")
    real = _element(data, name.end, order)
    if real.kind not in _NUMBERS:
        raise ValueError(f"values of type {real.kind}")
    shape = struct.unpack(f"{order}{len(dims.data) // 4}i", dims.data)
    values = np.frombuffer(real.data, order + _NUMBERS[real.kind])
    if min(shape, default=-1) < 0 or math.prod(shape) != values.size:
        raise ValueError(f"{values.size} values for the shape {shape}")
    return bytes(name.data).decode("latin-1"), values.reshape(shape, order="F")
