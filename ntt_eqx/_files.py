"""Write files that are complete or absent.

Everything is done by the plain calls of the system, a temporary file beside the one that is meant:
what a full disk, a killed process or a lost network drive leaves is then the old file or the new.
"""

import contextlib
import io
import os
import re
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path

_BYTES = getattr(os, "O_BINARY", 0)  # or Windows changes the ends of lines


def write_whole(path: Path, content: bytes) -> None:
    """Put `content` at `path` in one step: a reader sees the old file or the new one, never half.

    The content goes to a temporary file beside `path`, is forced to the disk, and takes its name
    by a rename. On any failure the old file stays and the temporary one is removed.
    """
    name = _aside(path, content)
    with _removed_on_failure(name):
        os.replace(name, path)
    _force_names(path.parent)


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[io.BufferedWriter]:
    """`write_whole` for content that is too large to hold: the file that the body writes to."""
    name = path.parent / f".{path.name}.{uuid.uuid4().hex}.tmp"
    with _removed_on_failure(name):
        with open(name, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    _force_names(path.parent)


def create_whole(path: Path, content: bytes) -> bool:
    """`write_whole` for a new file; of several callers one creates it, and gets `True`.

    The file takes its name by a hard link, so that nobody ever sees it empty.
    """
    name = _aside(path, content)
    with _removed_on_failure(name):
        try:
            os.link(name, path)
            created = True
        except (
            FileExistsError
        ):  # said by NFS also of a link that was made, and whose answer was lost
            created = os.stat(name).st_nlink > 1
    with contextlib.suppress(OSError):
        os.unlink(name)
    _force_names(path.parent)
    return created


def append(path: Path, content: bytes) -> None:
    """Append `content` to an existing file."""
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | _BYTES)
    try:
        _write(handle, content)
    finally:
        os.close(handle)


def force(path: Path) -> None:
    """Force appended content of a file to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_regular(path: Path) -> bytes:
    """The content of a file; `OSError` for a pipe, a device or a folder, which have no end."""
    # Without O_NONBLOCK a pipe that nobody writes to would keep us waiting.
    handle = os.open(path, os.O_RDONLY | _BYTES | getattr(os, "O_NONBLOCK", 0))
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(0, "it is no file", str(path))
        parts = []
        while part := os.read(handle, 1 << 22):
            parts.append(part)
        return b"".join(parts)
    finally:
        os.close(handle)


def unfinished(path: Path) -> list[Path]:
    """Unfinished files that killed writers of `path` left beside it."""
    own = re.compile(re.escape(f".{path.name}.") + r"[0-9a-f]{32}\.tmp")
    names = os.listdir(path.parent) if path.parent.is_dir() else []
    return [path.parent / name for name in names if own.fullmatch(name)]


def _aside(path: Path, content: bytes) -> Path:
    """A new file beside `path` with this content, forced to the disk."""
    name = path.parent / f".{path.name}.{uuid.uuid4().hex}.tmp"
    with _removed_on_failure(name):
        handle = os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | _BYTES, 0o666)
        try:
            _write(handle, content)
            os.fsync(handle)
        finally:
            os.close(handle)
    return name


@contextlib.contextmanager
def _removed_on_failure(path: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise


def _write(handle: int, content: bytes) -> None:
    rest = memoryview(content)
    while rest:  # the system may write less than it is given
        rest = rest[os.write(handle, rest) :]


def _force_names(folder: Path) -> None:
    with contextlib.suppress(OSError):  # where the system allows it
        force(folder)
