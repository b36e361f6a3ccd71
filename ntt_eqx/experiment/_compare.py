"""`compare`: the command's sweep as a function, which returns a data frame."""

import dataclasses
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from .. import AbstractObserver, Recipe
from ._errors import ExperimentError, Interrupted, check_choice, require
from .comparison import prepare, run_comparison, runs_of
from .environment import as_command
from .images import shelf_of
from .loop import RunContext, StopRequest
from .methods import split_scope
from .own import enter_object
from .presets import PRESETS
from .progress import Display
from .settings import (
    CompareSettings,
    MaskSettings,
    ScoringSettings,
    TrainingSettings,
    TransferSettings,
    from_json,
)
from .table import runs_frame

if TYPE_CHECKING:
    import pandas

_T = TypeVar("_T")


def compare(
    methods: Any = None,
    *,
    models: Any = None,
    datasets: Any = None,
    densities: float | Iterable[Any] | None = None,
    seeds: int | Iterable[Any] | None = None,
    scopes: str | Iterable[str] | None = None,
    transfer: TransferSettings | Mapping[str, Any] | None = None,
    scoring: ScoringSettings | Mapping[str, Any] | None = None,
    mask: MaskSettings | Mapping[str, Any] | None = None,
    training: TrainingSettings | Recipe | Mapping[str, Any] | None = None,
    preset: CompareSettings | str = "quick",
    out: str | Path = "runs/compare",
    data_dir: str | Path | None = None,
    checkpoint_every: float = 60.0,
    progress: bool = True,
    observers: Iterable[AbstractObserver] = (),
) -> "pandas.DataFrame":
    """Make and train sparse networks by several methods, as `ntt-eqx compare` does.

    Every method at every scope, density and seed is a network of its own, stored in `out`. A call
    with the same `out` skips what is finished and continues what was interrupted, bit for bit;
    commands and calls, also at the same time, share the work in a folder. A network's identity has
    its settings and, if the method, model or data are objects of yours, the source of these and of
    all of yours that they use, so changed code makes new networks.

    **Arguments:**

    - `methods`: names such as `"ntt"` or `"random@erk"` (the command's help lists them),
      references to code such as `"./mine.py:Score"`, or objects: a score, a class of scores, or a
      function `(teacher, examples, density, key) -> SparseModel`. One of them, a sequence, or a
      mapping that names objects, `{"mine@global": Score()}`; otherwise their own names are used.
    - `models`: likewise, of names or of callables that build a model from `key` and, if they name
      them, `input_shape` and `num_classes`.
    - `datasets`: likewise, of names or of `Dataset`s.
    - `densities`: shares of weights to keep.
    - `seeds`: each has its own dense initialisation, masks and order of the data.
    - `scopes`: how weights are shared out over layers, for methods without `@SCOPE`.
    - `transfer`: settings of the label-free phase: the fields to change, such as
      `{"epochs": 5.0}`, or a whole `ntt_eqx.experiment.settings.TransferSettings`. Its `dataset`
      may be a `Dataset`.
    - `scoring`: settings of the scores, likewise.
    - `mask`: settings of the masks, likewise.
    - `training`: settings of the supervised phase, likewise; or a `Recipe`.
    - `preset`: what holds for all that is left out: `CompareSettings`, or the name of a preset.
    - `out`: folder of the comparison, with networks, metrics, tables, figures and `report.html`.
    - `data_dir`: folder with datasets.
    - `checkpoint_every`: seconds between two checkpoints.
    - `progress`: whether to print the plan, the progress and the table.
    - `observers`: get the rows of each network's `metrics.jsonl`; rows after the last checkpoint of
      an interrupted network come again. A run is named like the network's folder.

    **Returns:**

    A data frame with one row for each network. `dataset`, `model`, `method`, `scope`, `density`,
    `mask` and `seed` say which it is; `test_accuracy`, `train_accuracy`, `held_out_accuracy`
    (shares of 1), `test_loss`, `train_loss`, `transfer_steps`, `train_steps`, `mask_seconds` (of a
    score's mask or that of a method of one's own, with compilation), `transfer_seconds`,
    `train_seconds`, `seconds` (their sum), `kept_density`, `effective_density` (share of weights on
    a path from inputs to outputs), `units`, `live_units`, `kernel_distance`, `target_distance` and
    `test_images` are its results, NaN where there is none. `settings` tells apart results got under
    different settings, `state` is `done` or `failed`, `note` says why, and `folder` holds the
    network.

    **Raises:**

    `ValueError` (`ExperimentError` or `DatasetError`) for settings that cannot be used, what is no
    method, model or dataset, or a folder of something else; `KeyboardInterrupt` after Ctrl-C, when
    the last step is saved.
    """
    require("pandas")
    base = PRESETS[check_choice("preset", preset, PRESETS)] if isinstance(preset, str) else preset
    if isinstance(transfer, Mapping) and transfer.get("dataset") is not None:
        (name,) = _names("dataset", transfer["dataset"])
        transfer = {**transfer, "dataset": name}
    if isinstance(training, Recipe):
        training = dataclasses.asdict(training)
    lists = {
        "methods": None if methods is None else _names("method", methods),
        "models": None if models is None else _names("model", models),
        "datasets": None if datasets is None else _names("dataset", datasets),
        "densities": None if densities is None else _several(densities),
        "seeds": None if seeds is None else _several(seeds),
        "scopes": None if scopes is None else _several(scopes),
    }
    changes = {name: value for name, value in lists.items() if value is not None}
    settings = dataclasses.replace(
        from_json(CompareSettings, changes, where="compare", base=base),
        transfer=_settings("transfer", transfer, base.transfer),
        scoring=_settings("scoring", scoring, base.scoring),
        mask=_settings("mask", mask, base.mask),
        training=_settings("training", training, base.training),
    )
    shelf, out = shelf_of(None if data_dir is None else Path(data_dir)), Path(out)
    cells = prepare(settings, out, shelf)
    stream = None if progress else io.StringIO()
    with (
        Display(stream) as display,
        StopRequest() as stop,
        as_command("ntt_eqx.experiment.compare"),
    ):
        context = RunContext(shelf, display, stop, checkpoint_every, observers=tuple(observers))
        try:
            run_comparison(cells, settings, out, context)
        except Interrupted:
            raise KeyboardInterrupt(
                "compare: what is done is saved; the same call goes on."
            ) from None
    return runs_frame(runs_of(cells, out))


def _names(kind: str, given: Any) -> tuple[str, ...]:
    """The names of what a caller gave, who may name objects; these are made known by them."""
    if isinstance(given, Mapping):
        return tuple(_name(kind, thing, name) for name, thing in given.items())
    several = given if isinstance(given, list | tuple | set | frozenset) else [given]
    return tuple(_name(kind, thing) for thing in several)


def _name(kind: str, thing: Any, name: str | None = None) -> str:
    if isinstance(thing, str):
        if name is not None:
            raise ExperimentError(f"compare: {kind} {name!r} is a name already, {thing!r}.")
        return thing
    if name is None or kind != "method":
        return enter_object(kind, thing, name)
    name, scope = split_scope(name)
    return enter_object(kind, thing, name) + ("" if scope is None else f"@{scope}")


def _settings(name: str, given: Any, base: _T) -> _T:
    """`base` with the fields that `given` has, or `given` itself if it is settings."""
    if given is None or isinstance(given, type(base)):
        return base if given is None else given
    changes = dict(given) if isinstance(given, Mapping) else given
    return from_json(type(base), changes, where=f"compare: {name}", base=base)


def _several(value: Any) -> tuple[Any, ...]:
    """The entries of a sequence or an array, or `value` alone, as Python numbers and strings."""
    several = value if isinstance(value, Iterable) and not isinstance(value, str) else (value,)
    return tuple(entry.item() if isinstance(entry, np.generic) else entry for entry in several)
