"""Read a run folder: the state of every cell, and the results of finished ones."""

import dataclasses
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from ._errors import ExperimentError
from ._files import check_fields, check_object, check_ranges, decode_object
from .cells import CONFIG
from .manifest import (
    MANIFEST,
    OLDER,
    has_manifest,
    holds,
    is_foreign,
    older_run,
    problems,
    read_file,
    read_manifest,
)

CELLS = "cells"
RESULT = "result.json"
FAILURE = "failure.json"
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
_SHARE, _POSITIVE = (0, 1), (0, sys.float_info.max)
RANGES: dict[str, Any] = {
    "density": 1,
    "seed": (0, 2**31 - 1),
    **dict.fromkeys(("test_accuracy", "train_accuracy", "held_out_accuracy"), _SHARE),
    **dict.fromkeys(("kept_density", "effective_density"), _SHARE),
    **dict.fromkeys(("seconds", "mask_seconds", "transfer_seconds", "train_seconds"), _POSITIVE),
    **dict.fromkeys(("test_loss", "train_loss"), _POSITIVE),
    **dict.fromkeys(("kernel_distance", "target_distance"), _POSITIVE),
    **dict.fromkeys(("transfer_steps", "train_steps"), (0, 2**62)),
    "test_images": (1, 2**62),
    **dict.fromkeys(("units", "live_units"), (0, 2**62)),
}
"""The possible numbers of a result."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One cell on disk."""

    directory: Path  # where it is
    # `done`; `failed` (no mask, or a loss that diverged); `unfinished` (to be continued); `broken`
    # (its files cannot be read)
    state: Literal["done", "failed", "unfinished", "broken"]
    config: dict[str, Any]  # its configuration, empty when broken
    result: dict[str, Any] | None = None  # its result when done, else `None`
    note: str = ""  # what failed or broke


def read_result(directory: Path) -> dict[str, Any] | None:
    """The result of a finished cell, `None` when it has none yet.

    Raises `ExperimentError` for one that is damaged, or has a number that no result can have.
    """
    if not holds(directory, RESULT):
        return None
    path = directory / RESULT
    result = decode_object(path, read_file(directory, RESULT), "a result")
    where = f"{path}: not a result"
    check_fields(where, result, _RESULT)
    check_fields(where, result, {n: int | float for n in RANGES if result.get(n) is not None})
    check_ranges(where, result, RANGES)
    shares = check_object(f"{where}: field 'densities'", result.get("densities") or {})
    check_fields(where, shares, dict.fromkeys(shares, int | float))
    check_ranges(where, shares, dict.fromkeys(shares, _SHARE))
    return result


def standard_error(result: Mapping[str, Any]) -> float | None:
    """Standard error of a test accuracy p on n images, `sqrt(p (1 - p) / n)`.

    It is that of another draw of test images, which all networks of a comparison share; `None`
    where the number of images is not known.
    """
    p, images = result.get("test_accuracy"), result.get("test_images")
    return None if p is None or images is None else math.sqrt(p * (1 - p) / images)


def keeps_another_share(kept: float | None, density: float) -> bool:
    """Whether a mask keeps another share of the weights than its density says.

    That counts groups, whose sizes differ between layers, or a pattern leaves layers whole.
    """
    return kept is not None and abs(kept / density - 1) > 0.02


def find_runs(root: Path, *, verify: bool = False) -> list[Run]:
    """Every cell below `root` (of a comparison, one cell, or any folder above), by their names.

    With `verify` every file of every run is compared with its digest.
    """
    if not root.is_dir():
        raise ExperimentError(f"{root}: no such directory.")
    found = {path.parent for name in (MANIFEST, CONFIG) for path in root.glob(f"**/{name}")}
    return [run for folder in sorted(found) if (run := _inspect(folder, verify)) is not None]


def read_run(directory: Path) -> Run:
    """The cell in `directory`; `broken` where there is none."""
    return _inspect(directory, verify=False) or Run(directory, "broken", {}, note="no run is here")


def model_path(path: Path, names: tuple[str, ...] = (MODEL, TRANSFERRED)) -> Path:
    """A model file: `path`, or the first of `names` in the directory `path`.

    In a run's folder that is a file of the run, compared with its digest.
    """
    if not path.is_dir():
        return path
    for name in names:
        if has_manifest(path):
            if holds(path, name):
                read_file(path, name)
                return path / name
        elif (path / name).is_file():
            return path / name
    raise ExperimentError(f"{path}: no model file in this directory; expected {MODEL}.")


def _inspect(directory: Path, verify: bool) -> Run | None:
    if not has_manifest(directory):
        note = f"{directory}: {OLDER} Make it again in another folder."
        older = "method" in (older_run(directory) or {})
        return Run(directory, "broken", {}, note=note) if older else None
    if is_foreign(directory):
        return None
    try:
        manifest = read_manifest(directory)
        if manifest.kind != "network":
            wrong = problems(directory) if verify else []
            return Run(directory, "broken", {}, note="\n".join(wrong)) if wrong else None
        config: dict[str, Any] = {}
        if CONFIG in manifest.files:
            path = directory / CONFIG
            config = decode_object(path, read_file(directory, CONFIG), "a configuration")
            check_fields(f"{path}: not a configuration", config, _CONFIG)
            check_ranges(f"{path}: not a configuration", config, RANGES)
        result = read_result(directory)
        if wrong := problems(directory) if verify else []:
            raise ExperimentError("\n".join(wrong))
    except ExperimentError as error:
        return Run(directory, "broken", {}, note=str(error))
    if result is not None:
        return Run(directory, "done", config, result)
    if not holds(directory, FAILURE):
        return Run(directory, "unfinished", config)
    try:
        path = directory / FAILURE
        note = str(decode_object(path, read_file(directory, FAILURE), "a failure")["message"])
    except (ExperimentError, KeyError):
        note = f"{directory / FAILURE}: cannot be read"
    return Run(directory, "failed", config, note=note)
