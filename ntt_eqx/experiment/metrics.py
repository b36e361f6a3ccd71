"""`metrics.jsonl`: one JSON object a line, appended while a run goes on."""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from .._files import force
from ._errors import ExperimentError
from ._files import finite
from .manifest import RunFolder, read_file, read_manifest
from .together import by_first

METRICS = "metrics.jsonl"


class Written(NamedTuple):
    """The rows that were written up to some step."""

    rows: int = 0  # how many
    digest: str = hashlib.sha256().hexdigest()  # SHA-256 of them


class MetricsFile:
    """Appends rows to a run's file and can go back to the rows that a checkpoint knows of.

    A run that was killed may have written rows after its last checkpoint; `rewind` drops them, so
    that the resumed run writes each row exactly once.
    """

    def __init__(self, run: RunFolder):
        self.run = run
        self.path = run.path / METRICS
        self._rows, self._sum = 0, hashlib.sha256()

    @property
    def written(self) -> Written:
        """The rows written so far."""
        return Written(self._rows, self._sum.hexdigest())

    def rewind(self, written: Written, *, keep: bool = False) -> None:
        """Go back to where just these rows were written, and drop, or `keep`, those after them.

        Raises `ExperimentError` when the file does not begin with these rows.
        """
        text = by_first(lambda: self._rewind(written, keep))
        self._rows, self._sum = written.rows, hashlib.sha256(text.encode("latin-1"))

    def _rewind(self, written: Written, keep: bool) -> str:
        content = self.run.read(METRICS) if self.run.has(METRICS) else b""
        lines = content.splitlines(keepends=True)[: written.rows]
        first = b"".join(lines)
        if len(lines) < written.rows or hashlib.sha256(first).hexdigest() != written.digest:
            raise ExperimentError(
                f"{self.path}: does not begin with the {written.rows} rows that were written; the "
                "file was changed from outside. Remove its directory to start this part again."
            )
        if not keep:
            self.run.write({METRICS: first}, growing=True)
        return first.decode("latin-1")  # bytes as JSON takes them

    def append(self, row: dict[str, Any]) -> None:
        """Write one row and hand it to the system."""
        line = json.dumps(finite(row), allow_nan=False).encode() + b"\n"
        self.run.append(METRICS, line)
        self._rows += 1
        self._sum.update(line)

    def sync(self) -> None:
        """Force the rows to the disk, before a checkpoint refers to them."""
        by_first(lambda: force(self.path))

    def seal(self) -> None:
        """There will be no more rows: their digest goes into the manifest, to be checked."""
        self.run.seal(METRICS, self.written.digest)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run, none where it has no phases.

    An unfinished last line of a running process is left out.

    Raises `ExperimentError` for a file that is not what the run wrote.
    """
    rows, path = [], folder / METRICS
    if METRICS not in read_manifest(folder).files and not path.exists():
        return rows
    for number, line in enumerate(read_file(folder, METRICS).split(b"\n")[:-1], 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise ExperimentError(f"{path}: line {number} is not a JSON object.")
        rows.append(row)
    return rows
