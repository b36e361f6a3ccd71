"""Who works in a folder: an exclusive claim with a heartbeat, on any file system that is shared.

A claim is a file that only one worker can create. Its time of change is the worker's heartbeat; one
that stands still for a while, or whose process is known to be gone, is taken over. A worker that
was only asleep finds that out before it writes anything more.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .._files import remove_unfinished
from ._errors import ExperimentError
from .together import by_first

BEAT = 10.0  # seconds between two heartbeats
STALE = 120.0  # seconds without one after which a claim is anybody's
_NAME = ".claim"


class Taken(ExperimentError):
    """Another worker has this folder."""


class Lost(ExperimentError):
    """Another worker took this folder over, for this one was not heard of."""


class Claim:
    """One worker's hold on a folder."""

    def __init__(self, folder: Path):
        self._folder, self._path = folder, folder / _NAME
        self._owner = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "system": _system(),
            "id": uuid.uuid4().hex,
        }

    def take(self) -> bool:
        """Try to get hold of the folder."""
        if self._create():
            return True
        found = _read(self._path)
        if not self._is_stale(found):
            return False
        aside = self._folder / f"{_NAME}-{self._owner['id']}"
        try:
            os.rename(self._path, aside)
        except FileNotFoundError:  # another worker was quicker
            return False
        if _read(aside) != found:  # the claim of one that was quicker
            with contextlib.suppress(OSError):
                os.link(aside, self._path)
            aside.unlink(missing_ok=True)
            return False
        aside.unlink(missing_ok=True)
        return self._create()

    def check(self) -> None:
        """Raise `Lost` if the folder is another worker's by now."""
        if by_first(lambda: _read(self._path) != self._owner):
            raise Lost(f"{self._folder}: another worker took it over; this one was not heard of.")

    def beat(self) -> None:
        """Say that this worker is alive."""
        with contextlib.suppress(OSError):
            if _read(self._path) == self._owner:
                os.utime(self._path)

    def release(self) -> None:
        """Let the folder go."""
        with contextlib.suppress(OSError):
            if _read(self._path) == self._owner:
                self._path.unlink()

    def _create(self) -> bool:
        try:
            handle = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return False
        with os.fdopen(handle, "w") as file:
            json.dump(self._owner, file)
        return True

    def _is_stale(self, owner: dict[str, Any]) -> bool:
        here = all(owner.get(name) == self._owner[name] for name in ("host", "system"))
        if here and not _is_alive(owner.get("pid")):
            return True
        clock = self._folder / f"{_NAME}-clock-{self._owner['id']}"
        try:
            clock.touch()  # the file system's own time, whatever the clocks of its hosts say
            return clock.stat().st_mtime - self._path.stat().st_mtime > STALE
        except FileNotFoundError:
            return False
        finally:
            clock.unlink(missing_ok=True)


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[Claim]:
    """Keep every other worker out of a folder while the body runs.

    What a killed worker was writing there when it died is removed.

    Raises `Taken` when another one has it; `ExperimentError` for a folder that cannot be written,
    or whose file system cannot tell who was first.
    """
    check_exclusive(folder)
    claim = Claim(folder)
    owner = by_first(lambda: None if claim.take() else _read(folder / _NAME))
    if owner is not None:
        raise Taken(
            f"{folder}: another process (pid {owner.get('pid', 'unknown')} on "
            f"{owner.get('host', 'an unknown host')}) works in this directory; wait for it or "
            "choose another folder with --out."
        )
    by_first(lambda: remove_unfinished(folder))
    stop = threading.Event()

    def beats() -> None:
        while not stop.wait(BEAT):
            claim.beat()

    thread = threading.Thread(target=beats, daemon=True)
    thread.start()
    try:
        yield claim
    finally:
        stop.set()
        thread.join()
        claim.release()


def check_exclusive(folder: Path) -> None:
    """Make a folder; `ExperimentError` where that fails, or two can create one file in it."""
    by_first(lambda: _check_exclusive(folder))


def _check_exclusive(folder: Path) -> None:
    probe, flags = folder / f"{_NAME}-probe-{uuid.uuid4().hex}", os.O_CREAT | os.O_EXCL
    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.close(os.open(probe, flags | os.O_WRONLY))
        try:
            os.close(os.open(probe, flags | os.O_WRONLY))
        except FileExistsError:
            return
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise ExperimentError(
            f"{folder}: cannot be written ({error.strerror}); choose another folder with --out."
        ) from error
    raise ExperimentError(
        f"{folder}: this file system cannot tell which of two workers came first; choose another "
        "folder with --out."
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):  # not there, or not written yet
        return {}
    return found if isinstance(found, dict) else {}


def _system() -> str:
    """The running system and the processes that it shows, where containers may show others."""
    with contextlib.suppress(OSError):
        started = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{started} {os.readlink('/proc/self/ns/pid')}"
    return sys.platform


def _is_alive(pid: Any) -> bool:
    try:
        os.kill(int(pid), 0)
    except (TypeError, ValueError, ProcessLookupError):
        return False
    except OSError:  # somebody else's process
        return True
    return True
