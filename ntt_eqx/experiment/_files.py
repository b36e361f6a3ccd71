"""Files that are whole or absent: atomic writes, JSON in and out, the lock of a run directory."""

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ._errors import ExperimentError

_LOCK = ".lock"


def write_bytes(path: Path, content: bytes) -> None:
    """Put `content` at `path` in one step: a reader sees the old file or the new one, never half.

    The content goes to a temporary file beside `path`, is forced to the disk, and takes its name
    by a rename. On any failure the old file stays and the temporary one is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
    sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` for text in UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """`write_bytes` for a JSON value; numbers that are not finite become `null`."""
    write_text(path, json.dumps(finite(value), indent=2, allow_nan=False) + "\n")


def read_bytes(path: Path) -> bytes:
    """The content of a file; never of a pipe or a device, which may have no end.

    Raises `ExperimentError` naming the file, when it is missing or unreadable.
    """
    try:
        if path.exists() and not path.is_file():
            raise ExperimentError(f"{path}: cannot be read (it is no file).")
        return path.read_bytes()
    except FileNotFoundError:
        raise ExperimentError(f"{path}: no such file.") from None
    except OSError as error:
        raise ExperimentError(f"{path}: cannot be read ({error.strerror}).") from error


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises `ExperimentError` naming the file, when it is missing, unreadable or not JSON.
    """
    content = read_bytes(path)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:  # also for numbers of thousands of digits
        raise ExperimentError(f"{path}: not a JSON file ({error}).") from error


def finite(value: Any) -> Any:
    """`value` with every NaN and infinity in it replaced by `None`."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return value


def sync_folder(folder: Path) -> None:
    """Force a rename inside `folder` to the disk, where the system allows it."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def check_folder(folder: Path) -> None:
    """Check that `folder` is one, or can become one, without making it.

    Raises `ExperimentError` when it cannot be written.
    """
    with contextlib.suppress(OSError):  # a part of the path that is no folder
        place = next(part for part in (folder, *folder.absolute().parents) if part.exists())
        if place.is_dir() and os.access(place, os.W_OK | os.X_OK):
            return
    raise ExperimentError(f"{folder}: cannot be written; choose another folder with --out.")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep every other process out of a run directory while the body runs.

    The lock dies with the process, so that a killed run leaves nothing to clean up.

    Raises `ExperimentError` when another process holds it, or `folder` cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / _LOCK, "a+")  # noqa: SIM115
    except OSError as error:
        raise ExperimentError(
            f"{folder}: cannot be written ({error.strerror}); choose another folder with --out."
        ) from error
    with file:
        _take(file, folder)
        file.seek(0)
        file.truncate()
        file.write(str(os.getpid()))
        file.flush()
        yield


def _take(file: Any, folder: Path) -> None:
    try:
        import fcntl
    except ImportError:  # no advisory locks on this system
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        raise ExperimentError(
            f"{folder}: another process (pid {holder}) works in this directory; wait for it or "
            "choose another folder with --out."
        ) from None
    except OSError:  # a file system without locks
        return


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
