"""What is on disk: the state of every cell, and the results of those that are done."""

import dataclasses
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from ._errors import ExperimentError
from ._files import read_json, write_json

CELLS = "cells"
MODEL = "model.eqx"
TRANSFERRED = "transferred.eqx"
State = Literal["done", "failed", "unfinished", "broken"]
_REQUIRED = {
    "dataset": str,
    "model": str,
    "method": str,
    "density": (int, float),
    "seed": int,
    "fingerprint": str,
}
_OPTIONAL = {
    "scope": str,
    "mask": str,
    "settings_id": str,
    "test_accuracy": (int, float),
    "train_accuracy": (int, float),
    "kernel_distance": (int, float),
    "target_distance": (int, float),
    "seconds": (int, float),
    "densities": dict,
}
_CONFIG = {name: kind for name, kind in _REQUIRED.items() if name != "fingerprint"}


@dataclasses.dataclass(frozen=True)
class Run:
    """One cell on disk.

    Attributes:
        directory: where it is.
        state: `done`; `failed` (its loss diverged); `unfinished` (to be continued); `broken`
            (its files cannot be read).
        config: its configuration, empty when broken.
        result: its result when done, else `None`.
        note: what failed or broke.
    """

    directory: Path
    state: State
    config: dict[str, Any]
    result: dict[str, Any] | None = None
    note: str = ""


def write_result(directory: Path, result: dict[str, Any]) -> None:
    """Mark a cell as done: the last file that a cell writes."""
    write_json(directory / "result.json", result)


def read_result(directory: Path) -> dict[str, Any] | None:
    """The result of a finished cell, `None` when it has none yet.

    **Raises:**

    `ExperimentError`: when the file is not a result.
    """
    path = directory / "result.json"
    if not path.exists():
        return None
    result = read_json(path)
    if not isinstance(result, dict):
        raise ExperimentError(f"{path}: not a result: expected an object.")
    shares = result.get("densities") or {}
    _check_fields(path, "a result", result, _REQUIRED, _OPTIONAL)
    _check_fields(path, "a result", shares, dict.fromkeys(shares, (int, float)), {})
    return result


def find_runs(root: Path) -> list[Run]:
    """Every cell below `root`, in the order of their names.

    `root` may be the directory of a comparison, of one cell, or any folder above.

    **Raises:**

    `ExperimentError`: when `root` is not a directory.
    """
    if not root.is_dir():
        raise ExperimentError(f"{root}: no such directory.")
    configs = sorted(root.glob("**/config.json"))
    return [run for run in (_inspect(path.parent) for path in configs) if run is not None]


def results_of(runs: Iterable[Run]) -> list[dict[str, Any]]:
    """The results of the finished cells among `runs`."""
    return [run.result for run in runs if run.result is not None]


def save_results(path: Path, results: list[dict[str, Any]]) -> None:
    """Write `results.json`: a list of objects, one for each finished cell."""
    write_json(path, results)


def _check_fields(
    path: Path,
    what: str,
    value: dict[str, Any],
    required: Mapping[str, Any],
    optional: Mapping[str, Any],
) -> None:
    for name, kind in {**required, **optional}.items():
        entry = value.get(name)
        if entry is None and name in optional:
            continue
        if not isinstance(entry, kind) or isinstance(entry, bool) or not _is_usual(entry):
            raise ExperimentError(f"{path}: not {what}: field {name!r} is missing or mistyped.")


def _is_usual(entry: Any) -> bool:
    """Whether a number is one that a float holds; true of all else."""
    return not isinstance(entry, int | float) or abs(entry) <= sys.float_info.max


def _inspect(directory: Path) -> Run | None:
    try:
        config = read_json(directory / "config.json")
    except ExperimentError as error:
        return Run(directory, "broken", {}, note=str(error))
    if not isinstance(config, dict) or "method" not in config:
        return None  # the configuration of a whole comparison, or of another program
    try:
        _check_fields(directory / "config.json", "a configuration", config, _CONFIG, {"scope": str})
        result = read_result(directory)
    except ExperimentError as error:
        return Run(directory, "broken", {}, note=str(error))
    if result is not None:
        return Run(directory, "done", config, result)
    failure = directory / "failure.json"
    if failure.exists():
        try:
            note = str(read_json(failure).get("message", ""))
        except (ExperimentError, AttributeError):
            note = f"{failure}: cannot be read"
        return Run(directory, "failed", config, note=note)
    return Run(directory, "unfinished", config)
