"""`metrics.jsonl`: one JSON object a line, appended while a run goes on."""

import json
import os
from pathlib import Path
from typing import Any

from ._errors import ExperimentError
from ._files import finite, read_bytes, write_bytes
from .together import by_first, is_first


class MetricsFile:
    """Appends rows to a file and can go back to the rows that a checkpoint knows of.

    A run that was killed may have written rows after its last checkpoint; `rewind` drops them, so
    that the resumed run writes each row exactly once.
    """

    def __init__(self, path: Path):
        self.path = path
        self.rows = 0

    def rewind(self, rows: int) -> None:
        """Keep the first `rows` rows; `ExperimentError` when there are fewer whole ones."""
        by_first(lambda: self._keep(rows))
        self.rows = rows

    def _keep(self, rows: int) -> None:
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        whole = [line for line in lines if line.endswith(b"\n")]
        if len(whole) < rows:
            raise ExperimentError(
                f"{self.path}: has {len(whole)} rows, but {rows} were written; the file was "
                "changed from outside. Remove its directory to start this part again."
            )
        if lines != whole[:rows]:
            write_bytes(self.path, b"".join(whole[:rows]))

    def append(self, row: dict[str, Any]) -> None:
        """Write one row and hand it to the system."""
        self.rows += 1
        if is_first():
            with open(self.path, "ab") as file:
                file.write(json.dumps(finite(row), allow_nan=False).encode() + b"\n")

    def sync(self) -> None:
        """Force the rows to the disk, before a checkpoint refers to them."""
        if is_first() and self.path.exists():
            with open(self.path, "rb") as file:
                os.fsync(file.fileno())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; an unfinished last line of a running process is left out."""
    rows = []
    for number, line in enumerate(read_bytes(path).split(b"\n")[:-1] if path.exists() else (), 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise ExperimentError(f"{path}: line {number} is not a JSON object.")
        rows.append(row)
    return rows
