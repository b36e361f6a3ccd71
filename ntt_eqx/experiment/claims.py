"""Exclusive claims of workers on folders, with a heartbeat, on any shared file system.

A claim is a file that only one worker can create, and that nobody ever sees half. Its time of
change is the worker's heartbeat; one that stands still for a while, or whose process is known to be
gone, is taken over. A worker that was only asleep finds that out before it writes anything more.
"""

import contextlib
import json
import os
import re
import socket
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .._files import create_whole, read_regular, unfinished
from ._errors import ExperimentError
from .manifest import RunFolder, cannot_write, create
from .together import by_first

BEAT = 10.0  # seconds between two heartbeats
STALE = 120.0  # seconds without one after which a claim is anybody's
CLAIM = ".claim"
_HELD: set[str] = set()  # the claims of this process
_ASIDE = re.compile(re.escape(CLAIM) + r"-[0-9a-f]{32}")
_CLOCK = re.compile(re.escape(CLAIM) + r"-clock-[0-9a-f]{32}")


class Taken(ExperimentError):
    """Another worker has this folder."""


class Lost(ExperimentError):
    """Another worker took this folder over, for this one was not heard of."""


class Claim:
    """One worker's hold on a folder."""

    def __init__(self, folder: Path):
        self._folder, self._path = folder, folder / CLAIM
        self._owner = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "system": _system(),
            "id": uuid.uuid4().hex,
        }

    def take(self) -> bool:
        """Try to get hold of the folder."""
        _HELD.add(self._owner["id"])  # before anybody can see it
        taken = False
        try:
            taken = self._take()
        finally:
            if not taken:
                _HELD.discard(self._owner["id"])
        return taken

    def _take(self) -> bool:
        if self._create():
            return True
        found = _read(self._path)
        if not self._is_stale(found, self._path):
            return False
        aside = self._folder / f"{CLAIM}-{self._owner['id']}"
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
        _HELD.discard(self._owner["id"])
        with contextlib.suppress(OSError):
            if _read(self._path) == self._owner:
                self._path.unlink()

    def sweep(self) -> None:
        """Remove what other workers were writing here when they were killed."""
        for name in os.listdir(self._folder):
            path, aside = self._folder / name, _ASIDE.fullmatch(name)
            # a claim set aside may be a living worker's, about to be given back
            if _CLOCK.fullmatch(name) or (aside and self._is_stale(_read(path), path)):
                path.unlink(missing_ok=True)
        for path in unfinished(self._path):
            path.unlink(missing_ok=True)

    def _create(self) -> bool:
        if os.path.lexists(self._path):
            return False
        try:
            return create_whole(self._path, json.dumps(self._owner).encode())
        except FileNotFoundError:  # a quicker worker removed what was about to become the claim
            return False

    def _is_stale(self, owner: dict[str, Any], path: Path) -> bool:
        here = all(owner.get(name) == self._owner[name] for name in ("host", "system"))
        # One of this process that is not held is one that could not be removed when it was let go.
        own = owner.get("pid") == self._owner["pid"] and owner.get("id") not in _HELD
        if here and (own or not _is_alive(owner.get("pid"))):
            return True
        clock = self._folder / f"{CLAIM}-clock-{self._owner['id']}"
        try:
            clock.touch()  # the file system's own time, whatever the clocks of its hosts say
            return clock.stat().st_mtime - path.stat().st_mtime > STALE
        except FileNotFoundError:
            return False
        finally:
            clock.unlink(missing_ok=True)


@contextlib.contextmanager
def claimed(folder: Path, kind: str, wait: Callable[[], None] | None = None) -> Iterator[RunFolder]:
    """Make or open a run folder, and keep every other worker out of it while the body runs.

    What a killed worker was writing there when it died is removed. While another worker has the
    folder, `wait` is called, again and again.

    Raises `Taken` when another one has it and there is no `wait`; `ExperimentError` for a folder
    that is not a run's of this kind, that cannot be written, or whose file system cannot tell who
    was first.
    """
    by_first(lambda: create(folder, kind))
    claim = Claim(folder)
    while (owner := by_first(lambda: _owner_unless_taken(claim, folder))) is not None:
        if wait is None:
            raise Taken(
                f"{folder}: another process (pid {owner.get('pid', 'unknown')} on "
                f"{owner.get('host', 'an unknown host')}) works in this directory; wait for it or "
                "choose another folder with --out."
            )
        wait()
    stop = threading.Event()

    def beats() -> None:
        while not stop.wait(BEAT):
            claim.beat()

    thread = threading.Thread(target=beats, daemon=True)
    thread.start()
    run = RunFolder(folder, claim.check)
    try:
        by_first(claim.sweep)
        run.sweep()
        yield run
    finally:
        stop.set()
        thread.join()
        claim.release()


def _owner_unless_taken(claim: Claim, folder: Path) -> dict[str, Any] | None:
    try:
        return None if claim.take() else _read(folder / CLAIM)
    except OSError as error:
        raise cannot_write(folder, error) from error


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_regular(path))
    except (FileNotFoundError, ValueError, RecursionError):
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
