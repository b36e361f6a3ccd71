"""Read and write JSON, and check its fields."""

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .._files import read_regular
from ._errors import ExperimentError


def encode_json(value: Any) -> bytes:
    """The content of a JSON file; numbers that are not finite become `null`."""
    return json.dumps(finite(value), indent=2, allow_nan=False).encode() + b"\n"


def read_bytes(path: Path) -> bytes:
    """The content of a file, never of a pipe or a device; `ExperimentError` if it has none."""
    try:
        return read_regular(path)
    except FileNotFoundError:
        raise ExperimentError(f"{path}: no such file.") from None
    except OSError as error:
        raise ExperimentError(f"{path}: cannot be read ({error.strerror}).") from error


def read_json(path: Path) -> Any:
    """Read a JSON file; `ExperimentError` names one that is missing, unreadable or not JSON."""
    return decode_json(path, read_bytes(path))


def decode_json(path: Path, content: bytes) -> Any:
    """The JSON value of a file with this content; `ExperimentError` names one that is not JSON."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:  # also for numbers of thousands of digits
        raise ExperimentError(f"{path}: not a JSON file ({error}).") from error


def decode_object(path: Path, content: bytes, what: str) -> dict[str, Any]:
    """The JSON object of a file with this content; `ExperimentError` where it is not `what`."""
    return check_object(f"{path}: not {what}", decode_json(path, content))


def check_object(where: str, value: Any) -> dict[str, Any]:
    """`value` if it is a JSON object; `ExperimentError` otherwise."""
    if not isinstance(value, dict):
        raise ExperimentError(f"{where}: expected an object.")
    return value


def check_fields(where: str, value: Mapping[str, Any], kinds: Mapping[str, Any]) -> None:
    """Raise `ExperimentError` unless `value` has fields of these types, no number too large."""
    for name, kind in kinds.items():
        entry = value.get(name)
        number = isinstance(entry, int | float)
        wrong = not isinstance(entry, kind) or isinstance(entry, bool)
        if wrong or number and not abs(entry) <= sys.float_info.max:
            raise ExperimentError(f"{where}: field {name!r} is missing or mistyped.")


def check_ranges(where: str, value: Mapping[str, Any], ranges: Mapping[str, Any]) -> None:
    """Raise `ExperimentError` unless the numbers in `value` lie in these ranges, where given.

    A range is the least and the greatest number, or the greatest alone of numbers above 0.
    """
    for name, bounds in ranges.items():
        entry = value.get(name)
        if entry is None:
            continue
        low, high = bounds if isinstance(bounds, tuple) else (0, bounds)
        if not (low <= entry <= high) or (entry == 0 and not isinstance(bounds, tuple)):
            what = f"{low} to {high}" if isinstance(bounds, tuple) else f"above 0 and up to {high}"
            raise ExperimentError(f"{where}: field {name!r} is {entry}, which is not {what}.")


def finite(value: Any) -> Any:
    """`value` with every NaN and infinity in it replaced by `None`."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    return [finite(entry) for entry in value] if isinstance(value, list | tuple) else value
