"""JSON in and out, the fields of what was read, and folders that can be written."""

import contextlib
import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .._files import write_whole
from ._errors import ExperimentError
from .together import is_first


def write_bytes(path: Path, content: bytes) -> None:
    """Put `content` at `path`, whole or not at all, in a folder that is made if need be.

    Of several processes with one command only the first writes.
    """
    if not is_first():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content)


def write_json(path: Path, value: Any) -> None:
    """`write_bytes` for a JSON value; numbers that are not finite become `null`."""
    write_bytes(path, json.dumps(finite(value), indent=2, allow_nan=False).encode() + b"\n")


def read_bytes(path: Path) -> bytes:
    """The content of a file, never of a pipe or a device; `ExperimentError` if it has none."""
    try:
        if path.exists() and not path.is_file():
            raise ExperimentError(f"{path}: cannot be read (it is no file).")
        return path.read_bytes()
    except FileNotFoundError:
        raise ExperimentError(f"{path}: no such file.") from None
    except OSError as error:
        raise ExperimentError(f"{path}: cannot be read ({error.strerror}).") from error


def read_json(path: Path) -> Any:
    """Read a JSON file; `ExperimentError` names one that is missing, unreadable or not JSON."""
    content = read_bytes(path)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:  # also for numbers of thousands of digits
        raise ExperimentError(f"{path}: not a JSON file ({error}).") from error


def check_fields(where: str, value: Mapping[str, Any], kinds: Mapping[str, Any]) -> None:
    """Raise `ExperimentError` unless `value` has fields of these types, no number too large."""
    for name, kind in kinds.items():
        entry = value.get(name)
        number = isinstance(entry, int | float)
        wrong = not isinstance(entry, kind) or isinstance(entry, bool)
        if wrong or number and not abs(entry) <= sys.float_info.max:
            raise ExperimentError(f"{where}: field {name!r} is missing or mistyped.")


def finite(value: Any) -> Any:
    """`value` with every NaN and infinity in it replaced by `None`."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    return [finite(entry) for entry in value] if isinstance(value, list | tuple) else value


def check_folder(folder: Path) -> None:
    """Check that `folder` is one, or can become one, without making it."""
    with contextlib.suppress(OSError):  # a part of the path that is no folder
        place = next(part for part in (folder, *folder.absolute().parents) if part.exists())
        if place.is_dir() and os.access(place, os.W_OK | os.X_OK):
            return
    raise ExperimentError(f"{folder}: cannot be written; choose another folder with --out.")
