"""Observers: where the numbers of a run go beside its history."""

import abc
import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from ._fit import Row


class AbstractObserver(abc.ABC):
    """Passes the numbers of runs on: to a file, TensorBoard, Weights & Biases, MLflow.

    Within `with observer.watch(name, settings):` an observer is an `on_log` of `transfer`,
    `train_steps` and `fit`; `ntt.experiment.compare(observers=[...])` watches each network. An
    exception in an observer stops the run.
    """

    @abc.abstractmethod
    def begin(self, run: str, settings: Mapping[str, Any]) -> None:
        """A run starts or goes on; `settings` are JSON values."""

    @abc.abstractmethod
    def log(self, step: int, values: Mapping[str, float]) -> None:
        """The numbers after `step` steps, by names such as `train/loss`."""

    @abc.abstractmethod
    def end(self) -> None:
        """The run ended, was stopped or failed."""

    @contextlib.contextmanager
    def watch(self, run: str, settings: Mapping[str, Any] | None = None) -> Iterator[None]:
        """While the body runs, rows belong to `run`; `end` is called whatever happens in it."""
        self.begin(run, {} if settings is None else settings)
        try:
            yield
        finally:
            self.end()

    def __call__(self, state: Any, row: Row) -> None:
        """Log a row; its `phase`, where it has one, stands before the names of its numbers."""
        parts = {name: value for name, value in row.items() if name not in ("step", "phase")}
        begin = f"{row['phase']}/" if "phase" in row else ""
        self.log(row["step"], {begin + name: value for name, value in _flat(parts)})


class JSONLines(AbstractObserver):
    """Appends to a file: a JSON object for each row, and one with the settings of each run.

    Rows are `{"run": "...", "step": 100, "train/loss": 0.5}`, with `null` for what is not finite,
    and are in the file as soon as they are logged.
    """

    def __init__(self, path: str | Path):
        """**Arguments:** `path`, the file; it is made, and an existing one grows."""
        self._path = Path(path)
        self._file: TextIO | None = None
        self._run = ""

    def begin(self, run: str, settings: Mapping[str, Any]) -> None:
        """Open the file and write the settings."""
        self._run, self._file = run, self._path.open("a", buffering=1)
        self._write({"settings": dict(settings)})

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write a row."""
        finite = {name: v if math.isfinite(v) else None for name, v in values.items()}
        self._write({"step": step, **finite})

    def end(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def _write(self, fields: dict[str, Any]) -> None:
        if self._file is None:
            raise ValueError("JSONLines: no run; log within `with observer.watch(name):`.")
        self._file.write(json.dumps({"run": self._run, **fields}) + "\n")


def _flat(parts: Mapping[str, Any], begin: str = "") -> Iterator[tuple[str, float]]:
    for name, value in parts.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{begin}{name}/")
        else:
            yield begin + name, float(value)
