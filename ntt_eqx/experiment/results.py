"""What is on disk: the state of every cell, and the results of those that are done."""

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from ._errors import ExperimentError
from ._files import read_json

CELLS = "cells"
MODEL = "model.eqx"
TRANSFERRED = "transferred.eqx"
_NUMBER = (int, float)
_CONFIG = {"dataset": str, "model": str, "method": str, "density": _NUMBER, "seed": int}
_REQUIRED = {**_CONFIG, "fingerprint": str}
_OPTIONAL = {
    **dict.fromkeys(("scope", "mask", "settings_id"), str),
    **dict.fromkeys(("test_accuracy", "train_accuracy", "seconds"), _NUMBER),
    **dict.fromkeys(("kernel_distance", "target_distance"), _NUMBER),
    "densities": dict,
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
    """The result of a finished cell, `None` when it has none yet.

    Raises `ExperimentError` when the file is not a result.
    """
    path = directory / "result.json"
    if not path.exists():
        return None
    result = read_json(path)
    if not isinstance(result, dict):
        raise ExperimentError(f"{path}: not a result: expected an object.")
    _check_fields(path, "a result", result, _REQUIRED, _OPTIONAL)
    shares = result.get("densities") or {}
    _check_fields(path, "a result", shares, dict.fromkeys(shares, _NUMBER), {})
    return result


def find_runs(root: Path) -> list[Run]:
    """Every cell below `root`, in the order of their names.

    `root` may be the directory of a comparison, of one cell, or any folder above.

    Raises `ExperimentError` when `root` is not a directory.
    """
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
        usual = not isinstance(entry, _NUMBER) or abs(entry) <= sys.float_info.max
        if not isinstance(entry, kind) or isinstance(entry, bool) or not usual:
            raise ExperimentError(f"{path}: not {what}: field {name!r} is missing or mistyped.")


def _inspect(directory: Path) -> Run | None:
    try:
        config = read_json(directory / "config.json")
        if not isinstance(config, dict) or "method" not in config:
            return None  # the configuration of a whole comparison, or of another program
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
