"""A disk that goes wrong at one of the operations of a run, and workers that take turns on it.

All in this process: a killed worker is a thread whose every later operation fails, and turns are
drawn from a seed at each operation, so that the same seed gives the same run.
"""

import contextlib
import errno
import itertools
import os
import random
import threading
import time
from pathlib import Path

import pytest

from ntt_eqx.experiment import claims, comparison, report
from ntt_eqx.experiment.cli import main

_BY_PATH = ("open", "replace", "rename", "link", "unlink", "mkdir", "rmdir")
_BY_HANDLE = ("write", "read", "fsync")
_CHANGES = ("write", "replace", "rename", "link", "unlink", "mkdir", "rmdir")
_LASTING = ("ENOSPC", "EROFS")  # a full disk, one that was mounted anew
_PIDS = itertools.count(10_000_000, 100)  # above those that a system gives


class Killed(BaseException):
    """The worker was killed: nothing that it would do is done any more."""


def faults_of(operation, creates):
    """What can go wrong with an operation."""
    found = ["kill", "EIO"]
    if operation == "open":
        found += ["EMFILE", *(["ENOSPC", "EROFS"] if creates else [])]
    if operation == "write":
        found += ["torn", "short", "ENOSPC"]
    if operation == "read":
        found += ["short"]
    if operation in ("replace", "rename", "link", "mkdir"):
        found += ["ENOSPC", "EROFS"]
    if operation in ("unlink", "rmdir"):
        found += ["EROFS"]
    return found


class Disk:
    """Sees each operation on files below `root`; the one at `position` of worker 0 goes wrong."""

    def __init__(self, root, position=None, fault=None, turns=None):
        self.root, self.position, self.fault, self.turns = Path(root), position, fault, turns
        self.seen = []  # operation, file and whether it creates one, of worker 0
        self.struck = False
        self._handles, self._dead = {}, set()
        self._first_pid = next(_PIDS)

    def attach(self, patch):
        for name in (*_BY_PATH, *_BY_HANDLE):
            patch.setattr(os, name, self._watched(name, getattr(os, name)))
        close = os.close
        patch.setattr(os, "close", lambda handle: (self._handles.pop(handle, 0), close(handle))[1])

    def pid(self):
        return self._first_pid + getattr(_WORKER, "number", 0)

    def alive(self, pid):
        number = int(pid) - self._first_pid
        gone = number in self._dead or (self.turns is not None and not self.turns.has(number))
        return 0 <= number < 100 and not gone

    def _watched(self, name, function):
        def call(*arguments, **options):
            first = arguments[0]
            if name in _BY_HANDLE:
                path = self._handles.get(first)
            else:
                path = Path(first) if str(first).startswith(str(self.root)) else None
            if path is None:
                return function(*arguments, **options)
            found = self._act(name, function, path, arguments, options)
            if name == "open":
                self._handles[found] = path
            return found

        return call

    def _act(self, name, function, path, arguments, options):
        worker = getattr(_WORKER, "number", 0)
        if self.turns is not None:
            self.turns.hand_on(worker)
        if worker in self._dead:
            raise Killed
        writes = name in _CHANGES or (name == "open" and arguments[1] & os.O_ACCMODE)
        if worker == 0:
            creates = name == "open" and bool(arguments[1] & os.O_CREAT)
            self.seen.append((name, path.name, creates))
            if len(self.seen) - 1 == self.position:
                self.struck = True
                return self._strike(name, function, arguments, options)
            if self.struck and self.fault in _LASTING and writes:
                if self.fault == "EROFS" or name not in ("unlink", "rmdir"):
                    raise _error(self.fault, arguments)
        return function(*arguments, **options)

    def _strike(self, name, function, arguments, options):
        if self.fault in ("torn", "short") or (name, self.fault) == ("write", "ENOSPC"):
            handle, what = arguments
            half = what // 2 if name == "read" else what[: len(what) // 2]
            if half or not isinstance(half, int):
                done = function(handle, half)
                if self.fault == "short" and done:
                    return done
        if self.fault == "short":  # nothing to cut
            return function(*arguments, **options)
        if self.fault in ("kill", "torn"):
            self._dead.add(0)
            raise Killed
        raise _error(self.fault, arguments)


def _error(name, arguments):
    number = getattr(errno, name)
    names = [str(a) for a in arguments[:2] if isinstance(a, str | os.PathLike)]
    more = () if not names else (names[0],) if len(names) == 1 else (names[0], None, names[1])
    return OSError(number, os.strerror(number), *more)


class Turns:
    """One worker acts at a time; who is next is drawn at each operation."""

    def __init__(self, seed, workers):
        self._rng, self._there = random.Random(seed), list(range(workers))
        self._now, self._changed = self._rng.choice(self._there), threading.Condition()

    def hand_on(self, worker):
        with self._changed:
            self._now = self._rng.choice(self._there)
            self._changed.notify_all()
        self.wait(worker)

    def wait(self, worker):
        with self._changed:
            assert self._changed.wait_for(lambda: self._now == worker, timeout=300)

    def has(self, worker):
        return worker in self._there

    def leave(self, worker):
        with self._changed:
            self._there.remove(worker)
            self._now = self._rng.choice(self._there) if self._there else None
            self._changed.notify_all()


_WORKER = threading.local()


@contextlib.contextmanager
def watched(disk):
    """The commands that the body gives work on `disk`; nothing is drawn or timed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "draw_figures", lambda runs, say: {"accuracy.png": b"P" * 40})
        patch.setattr(comparison, "_estimate", lambda cells, context: (0.0, {}))
        patch.setattr(claims, "BEAT", 1e9)
        patch.setattr(claims, "_is_alive", disk.alive)
        patch.setattr(os, "getpid", disk.pid)
        if disk.turns is not None:
            patch.setattr(time, "sleep", lambda _: disk.turns.hand_on(_WORKER.number))
        disk.attach(patch)
        yield


def work(disk, words):
    """Give a command; returns its exit status, `None` where it was killed."""
    with watched(disk):
        try:
            return main(words)
        except Killed:
            return None


def work_together(disk, words, workers=2):
    """Give a command to several workers that take turns; returns their exit statuses."""
    ends = [None] * workers

    def one(number):
        _WORKER.number = number
        disk.turns.wait(number)
        try:
            ends[number] = main(words)
        except Killed:
            pass
        except BaseException as error:
            ends[number] = error
        finally:
            disk.turns.leave(number)

    with watched(disk):
        threads = [threading.Thread(target=one, args=(n,), daemon=True) for n in range(workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=500)
    return ends
