"""Which files of a folder are a run's, and what is in them.

A run folder holds `manifest.json`: its kind, and for each file of the run the SHA-256 of its
content. The manifest is there before any other file, created as a whole by one worker alone, in a
folder that was empty. Before a file is written, its new digest is put beside the old one; so
after a kill at any moment each file fits its entry, and whatever does not was changed from outside.
A file that has no entry is somebody else's: it is not read, replaced or removed.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .._files import append, create_whole, force, unfinished, write_whole
from ._errors import ExperimentError
from ._files import encode_json, read_bytes
from .together import by_first

MANIFEST = "manifest.json"
FORMAT = 1
CHECKPOINTS = "checkpoints/"
# Why a folder may stay: somebody else's files are in it, or it is in use, or it is gone.
_MAY_STAY = {
    getattr(errno, n) for n in ("ENOTEMPTY", "EEXIST", "EBUSY", "EACCES", "EPERM", "ENOENT")
}
_PROGRAM = "ntt-eqx"
_DIGEST = re.compile("[0-9a-f]{64}")
_ELSEWHERE = "choose an empty folder, or a new one, with --out."


class Manifest(NamedTuple):
    """The records of a folder's files."""

    kind: str  # `network`, `compare`, `evolution` or `report`
    # by name, with `/` between folders: the digests that a file may have (two while it is
    # replaced), none for one that rows are appended to
    files: dict[str, list[str]]


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """A folder that this worker holds: the one way to write into a run.

    Of several processes with one command all call the same methods, and the first acts.
    """

    path: Path
    check: Callable[[], None]  # raises `Lost` where another worker has the folder by now

    def write(self, files: Mapping[str, bytes], *, growing: bool = False) -> None:
        """Put files in place, each whole or not at all; `growing` ones will have rows appended.

        Raises `ExperimentError` for a name under which the folder has a file that is not the run's.
        """
        by_first(lambda: self._write(files, growing))

    def write_json(self, name: str, value: Any) -> None:
        """`write` for one JSON value; numbers that are not finite become `null`."""
        self.write({name: encode_json(value)})

    def append(self, name: str, content: bytes) -> None:
        """Add to a growing file."""
        by_first(lambda: self._append(name, content))

    def seal(self, name: str, digest: str) -> None:
        """The growing file `name` has its last row, and this digest."""
        by_first(lambda: self._seal(name, digest))

    def remove(self, names: Iterable[str]) -> None:
        """Remove files of the run, and the folders that are empty then."""
        by_first(lambda: self._remove([*names]))

    def names(self, prefix: str = "", *, there: bool = True) -> list[str]:
        """The run's files whose names begin so; `there`: of those that were written."""
        find = files_of if there else lambda folder: [*read_manifest(folder).files]
        return by_first(lambda: [n for n in find(self.path) if n.startswith(prefix)])

    def has(self, name: str) -> bool:
        """Whether the run has a file of this name."""
        return by_first(lambda: holds(self.path, name))

    def read(self, name: str) -> bytes:
        """The content of one of the run's files; see `read_file`."""
        return read_file(self.path, name)

    def check_unchanged(self, names: Iterable[str] = ()) -> None:
        """Check that nobody else has changed the run's files, or put own ones under `names`.

        Checkpoints are left out: a damaged one is passed over. Raises `ExperimentError`.
        """
        by_first(lambda: self._check_unchanged([*names]))

    def _write(self, files: Mapping[str, bytes], growing: bool) -> None:
        self.check()
        kind, entries = read_manifest(self.path)
        todo = {}
        for name, content in files.items():
            here = _digest_of(self.path / name)
            if name not in entries and here is not None:
                raise _foreign(self.path / name)
            new = _sha256(content)
            kept = [digest for digest in entries.get(name, ()) if digest == here]
            entries[name] = [] if growing else list(dict.fromkeys([*kept, new]))
            if here != new:
                todo[name] = content
        self._save(kind, entries)
        for name, content in todo.items():
            path = self.path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, content)

    def _append(self, name: str, content: bytes) -> None:
        self.check()
        append(self.path / name, content)

    def _seal(self, name: str, digest: str) -> None:
        self.check()
        path = self.path / name
        force(path)
        if _digest_of(path) != digest:
            raise _damaged(path)
        kind, entries = read_manifest(self.path)
        self._save(kind, {**entries, name: [digest]})

    def _remove(self, names: list[str]) -> None:
        kind, entries = read_manifest(self.path)
        own = [name for name in names if name in entries]
        if not own:
            return
        self.check()
        for name in own:
            (self.path / name).unlink(missing_ok=True)
        for folder in {(self.path / name).parent for name in own} - {self.path}:
            try:
                folder.rmdir()
            except OSError as error:
                if error.errno not in _MAY_STAY:  # its entries stay, so the next one tries again
                    raise
        self._save(kind, {name: d for name, d in entries.items() if name not in own})

    def _check_unchanged(self, names: list[str]) -> None:
        entries = read_manifest(self.path).files
        for name in names:
            if name not in entries and os.path.lexists(self.path / name):
                raise _foreign(self.path / name)
        for name in entries:
            if not name.startswith(CHECKPOINTS) and (problem := _problem(self.path, name)):
                raise ExperimentError(problem)

    def _save(self, kind: str, entries: dict[str, list[str]]) -> None:
        content = _encode(kind, entries)
        if read_bytes(self.path / MANIFEST) != content:
            write_whole(self.path / MANIFEST, content)

    def sweep(self) -> None:
        """Remove what a worker that was killed was writing; nobody may be writing here now."""
        by_first(self._sweep)

    def _sweep(self) -> None:
        for name in (MANIFEST, *read_manifest(self.path).files):
            for path in unfinished(self.path / name):
                path.unlink(missing_ok=True)


# Folders


def check_folder(folder: Path, kind: str | None = None) -> None:
    """Check that a run of this kind can be made in `folder`, without changing anything.

    That is: it is absent, empty, or a run folder of this kind; for `None`, of any.

    Raises `ExperimentError` for any other, or one that cannot be written.
    """
    with contextlib.suppress(OSError):  # a part of the path that is no folder
        place = next(part for part in (folder, *folder.absolute().parents) if part.exists())
        if place.is_dir() and os.access(place, os.W_OK | os.X_OK):
            if place == folder:
                _check_own_or_empty(folder, kind)
            return
    raise ExperimentError(f"{folder}: cannot be written; choose another folder with --out.")


def create(folder: Path, kind: str) -> None:
    """Make `folder` a run folder of this kind, if it is not one yet.

    Raises `ExperimentError` as `check_folder` does, and where the file system has no hard links.
    """
    try:
        for _ in range(100):
            if _check_own_or_empty(folder, kind):
                return
            folder.mkdir(parents=True, exist_ok=True)
            # another worker may be quicker, and remove what this one was about to link
            with contextlib.suppress(FileNotFoundError):
                create_whole(folder / MANIFEST, _encode(kind, {}))
    except OSError as error:
        raise cannot_write(folder, error) from error
    raise ExperimentError(f"{folder}: loses files as they are written; {_ELSEWHERE}")


def cannot_write(folder: Path, error: OSError) -> ExperimentError:
    """The message for a folder in which no file could be created."""
    where = "choose another folder with --out"
    if error.errno in _NO_LINKS and getattr(error, "filename2", None) is not None:
        where += ", on a file system with hard links, by which one worker alone creates a file"
    return ExperimentError(f"{folder}: cannot be written ({error.strerror}); {where}.")


_NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


def _check_own_or_empty(folder: Path, kind: str | None) -> bool:
    """Whether `folder` is a run folder of this kind; if not, it is absent or empty."""
    if not folder.exists():
        return False
    # The manifest is looked for in the listing, for it is the first file of a run: where it is not
    # yet there, nothing else of a run can be either.
    names = sorted(os.listdir(folder))
    if MANIFEST not in names:
        others = [name for name in names if not _was_never_linked(folder / name)]
        if not others:
            return False
        if not (folder / MANIFEST).exists():
            raise ExperimentError(f"{folder}: {_whose(folder, others)}")
    found = read_manifest(folder).kind
    if kind not in (found, None):
        raise ExperimentError(
            f"{folder}: is the directory of an `ntt-eqx {_command(found)}`; nothing in it was "
            f"changed. To use another, {_ELSEWHERE}"
        )
    return True


def _whose(folder: Path, names: list[str]) -> str:
    if older_run(folder) is not None:
        return (
            f"{OLDER} Nothing in it was changed; {_ELSEWHERE} Its networks (model.eqx) can still "
            "be read."
        )
    more = ", ..." if len(names) > 3 else ""
    return (
        f"holds files that are not an ntt-eqx run's ({', '.join(names[:3])}{more}). Nothing in it "
        f"was changed; {_ELSEWHERE}"
    )


OLDER = (
    "was made by ntt-eqx 0.2 or earlier, which kept no manifest: its files cannot be told from "
    "others, or checked."
)


def older_run(folder: Path) -> dict[str, Any] | None:
    """The configuration in a folder of version 0.2 or earlier, `None` if that is what it is not."""
    try:
        config = json.loads(read_bytes(folder / "config.json"))
    except (ExperimentError, ValueError, RecursionError):
        return None
    if not isinstance(config, dict):
        return None
    network = isinstance(config.get("format"), int) and "method" in config
    return config if network or config.get("command") in ("compare", "evolution") else None


def _was_never_linked(path: Path) -> bool:
    """Whether a worker was killed just before the first file of its folder got its name."""
    if not re.fullmatch(rf"\.{re.escape(MANIFEST)}\.[0-9a-f]{{32}}\.tmp", path.name):
        return False
    try:
        content = read_bytes(path)
    except ExperimentError:
        return not os.path.lexists(path)  # it just got its name, and lost this one
    return any(_encode(kind, {}).startswith(content) for kind in _COMMANDS)


_COMMANDS = {"network": "train", "compare": "compare", "evolution": "evolution", "report": "report"}


def _command(kind: str) -> str:
    return "transfer` or `ntt-eqx train" if kind == "network" else _COMMANDS[kind]


# Reading


def has_manifest(folder: Path) -> bool:
    """Whether `folder` is a run folder, whole or damaged."""
    return os.path.lexists(folder / MANIFEST)


def is_foreign(folder: Path) -> bool:
    """Whether the `manifest.json` of a folder is another program's, which many have."""
    with contextlib.suppress(ExperimentError):
        ours = _PROGRAM.encode() in read_bytes(folder / MANIFEST)
        return not ours and older_run(folder) is None
    return False


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a run folder.

    Raises `ExperimentError` for one that is missing, damaged, of another program, or newer.
    """
    path = folder / MANIFEST
    content = read_bytes(path)
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict) or value.get("program") != _PROGRAM:
        raise ExperimentError(
            f"{path}: not the manifest of an ntt-eqx run; it is another program's, or damaged. "
            f"Nothing in this folder was changed; {_ELSEWHERE}"
        )
    if type(value.get("format")) is int and value["format"] > FORMAT:
        raise ExperimentError(
            f"{path}: written by a newer version (format {value['format']}, this one reads up to "
            f"{FORMAT}); update ntt-eqx or choose another folder with --out."
        )
    kind: Any = value.get("kind")
    files: Any = value.get("files")
    if not _is_whole(kind, files) or _encode(kind, files) != content:
        raise ExperimentError(
            f"{path}: damaged: it does not match its own digest. Nothing in this folder was "
            f"changed; {_ELSEWHERE}"
        )
    return Manifest(kind, files)


def files_of(folder: Path) -> list[str]:
    """The names of the run's files, of those that are there."""
    return [n for n in read_manifest(folder).files if os.path.lexists(folder / n)]


def holds(folder: Path, name: str) -> bool:
    """Whether a folder has a manifest, and a file of this name that is the run's."""
    return has_manifest(folder) and name in files_of(folder)


def read_file(folder: Path, name: str) -> bytes:
    """The content of one of the run's files.

    Raises `ExperimentError` for one that is missing, not the run's, or not what the run wrote.
    """
    path, before = folder / name, None
    while True:
        entries = read_manifest(folder).files
        if name not in entries:
            if path.exists():
                raise _foreign(path)
            raise ExperimentError(f"{path}: no such file.")
        content = read_bytes(path)
        if not entries[name] or _sha256(content) in entries[name]:
            return content
        if before == entries[name]:
            raise _damaged(path)
        before = entries[name]  # a worker may have replaced the file between the two looks


def problems(folder: Path) -> list[str]:
    """A sentence for each of the run's files that is not what the run wrote."""
    try:
        names = files_of(folder)
    except ExperimentError as error:
        return [str(error)]
    return [problem for name in names if (problem := _problem(folder, name))]


def _problem(folder: Path, name: str) -> str | None:
    try:
        if os.path.lexists(folder / name):
            read_file(folder, name)
    except ExperimentError as error:
        return str(error)
    return None


def _is_whole(kind: Any, files: Any) -> bool:
    # A name must stay below its folder, whoever wrote the manifest.
    return (
        isinstance(kind, str)
        and kind in _COMMANDS
        and isinstance(files, dict)
        and all(
            set(name.split("/")).isdisjoint(("", ".", ".."))
            and not re.search(r"[\\\0]", name)
            and isinstance(digests, list)
            and all(isinstance(d, str) and _DIGEST.fullmatch(d) for d in digests)
            for name, digests in files.items()
        )
    )


def _encode(kind: str, files: Mapping[str, list[str]]) -> bytes:
    value = {"program": _PROGRAM, "format": FORMAT, "kind": kind, "files": files}
    digest = _sha256(json.dumps(value).encode())
    return json.dumps({**value, "digest": digest}, indent=2).encode() + b"\n"


def _digest_of(path: Path) -> str | None:
    return _sha256(read_bytes(path)) if os.path.lexists(path) else None


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _foreign(path: Path) -> ExperimentError:
    return ExperimentError(
        f"{path}: not this run's file (its {MANIFEST} does not name it), so it is neither read nor "
        "replaced; move it away, or choose another folder with --out."
    )


def _damaged(path: Path) -> ExperimentError:
    return ExperimentError(
        f"{path}: damaged or changed: its content does not match its digest in {MANIFEST}. Put "
        "back what the run wrote (a table or figure that is removed is made anew), or make the run "
        "again in another folder."
    )
