"""What is on disk: the state of every cell, and the results of those that are done."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from ._errors import ExperimentError
from ._files import check_fields, read_json

CELLS = "cells"
MODEL = "model.eqx"
TRANSFERRED = "transferred.eqx"
_CONFIG = {
    **dict.fromkeys(("dataset", "model", "method"), str),
    "density": int | float,
    "seed": int,
    "scope": str | None,
}
_RESULT = {
    **_CONFIG,
    "fingerprint": str,
    **dict.fromkeys(("mask", "settings_id"), str | None),
    **dict.fromkeys(("test_accuracy", "train_accuracy", "seconds"), int | float | None),
    **dict.fromkeys(("kernel_distance", "target_distance"), int | float | None),
    "densities": dict | None,
}


@dataclasses.dataclass(frozen=True)
class Run:
    """One cell on disk."""

    directory: Path  # where it is
    # `done`; `failed` (its loss diverged); `unfinished` (to be continued); `broken` (its files
    # cannot be read)
    state: Literal["done", "failed", "unfinished", "broken"]
    config: dict[str, Any]  # its configuration, empty when broken
    result: dict[str, Any] | None = None  # its result when done, else `None`
    note: str = ""  # what failed or broke


def read_result(directory: Path) -> dict[str, Any] | None:
    """The result of a finished cell, `None` when it has none yet."""
    path = directory / "result.json"
    if not path.exists():
        return None
    result = read_json(path)
    if not isinstance(result, dict):
        raise ExperimentError(f"{path}: not a result: expected an object.")
    where = f"{path}: not a result"
    check_fields(where, result, _RESULT)
    shares = result.get("densities") or {}
    check_fields(where, shares, dict.fromkeys(shares, int | float))
    return result


def find_runs(root: Path) -> list[Run]:
    """Every cell below `root` (of a comparison, one cell, or any folder above), by their names."""
    if not root.is_dir():
        raise ExperimentError(f"{root}: no such directory.")
    configs = sorted(root.glob("**/config.json"))
    return [run for run in (_inspect(path.parent) for path in configs) if run is not None]


def model_path(path: Path, names: tuple[str, ...] = (MODEL, TRANSFERRED)) -> Path:
    """A model file: `path`, or the first of `names` in the directory `path`."""
    if not path.is_dir():
        return path
    for name in names:
        if (path / name).is_file():
            return path / name
    raise ExperimentError(f"{path}: no model file in this directory; expected {MODEL}.")


def _inspect(directory: Path) -> Run | None:
    try:
        path = directory / "config.json"
        config = read_json(path)
        if not isinstance(config, dict) or "method" not in config:
            return None  # the configuration of a whole comparison, or of another program
        check_fields(f"{path}: not a configuration", config, _CONFIG)
        result = read_result(directory)
    except ExperimentError as error:
        return Run(directory, "broken", {}, note=str(error))
    if result is not None:
        return Run(directory, "done", config, result)
    failure = directory / "failure.json"
    if not failure.exists():
        return Run(directory, "unfinished", config)
    try:
        note = str(read_json(failure).get("message", ""))
    except (ExperimentError, AttributeError):
        note = f"{failure}: cannot be read"
    return Run(directory, "failed", config, note=note)
