"""Options that several commands share, and how one network is made."""

import abc
import contextlib
import dataclasses
from pathlib import Path
from typing import Any, Literal

from ... import distribute
from .._errors import ExperimentError, NetworkFailed
from ..cells import Cell, plan
from ..claims import claimed
from ..comparison import accuracies, checked
from ..compilation import keep_compiled
from ..images import shelf_of
from ..loop import RunContext, StopRequest
from ..manifest import check_folder
from ..methods import Scope
from ..presets import PRESETS
from ..progress import Display
from ..report import REPORT_FILES, write_page, write_tables
from ..results import MODEL, RESULT, find_runs
from ..running import check_cells, check_start, run_cell
from ..settings import (
    CompareSettings,
    ScoringSettings,
    TransferSettings,
)
from ..together import by_first, join, wait


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions(abc.ABC):
    """Options of every command that makes networks.

    Attributes:
        out: directory of the run.
        data_dir: folder with datasets; more places are searched, see `ntt-eqx data`.
        checkpoint_every: seconds between two checkpoints.
        devices: compute on one device, or share every step among all, with `hosts` those of other
            hosts with the same command, too; results agree to rounding.
        compilation_cache: keep no compiled programs in the user's cache folder (512 MiB).
    """

    out: Path = Path("runs")
    data_dir: Path | None = None
    checkpoint_every: float = 60.0
    devices: Literal["one", "all", "hosts"] = "one"
    compilation_cache: bool = True

    def run(self) -> int:
        """Do it on the devices asked for; returns the exit status."""
        if self.compilation_cache:
            keep_compiled()
        if self.devices == "hosts":
            join()
        with contextlib.nullcontext() if self.devices == "one" else distribute():
            status = self.make()
            wait()
        return status

    @abc.abstractmethod
    def make(self) -> int:
        """What the command does, on whatever devices."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkOptions(RunOptions):
    """Options of every command that makes one network.

    Attributes:
        dataset: images to use, fashion-mnist-mini if nothing is said; NAME:0,1:250 takes 250 images
            of two classes.
        model: the dense network's architecture.
        method: how the mask is chosen; `ntt` matches the active kernel, `ntt-ambient` the ambient
            one, `ntt-sketch` a few random directions of the latter. `ntt-eqx compare --help` has
            all methods, and your own.
        scope: rank weights within each layer, over all layers at once, or within ERK shares; as the
            method was published, if nothing is said.
        density: share of weights to keep.
        seed: decides the dense network and the order of the images; 0 if nothing is said.
        transfer: the label-free phase, for `ntt`, `ntt-ambient` and `ntt-sketch`.
        scoring: the scores that choose masks.
    """

    dataset: str | None = None
    model: str = "lenet-300-100"
    method: str = "ntt"
    scope: Scope = "published"
    density: float = 0.03
    seed: int | None = None
    transfer: TransferSettings = PRESETS["quick"].transfer
    scoring: ScoringSettings = ScoringSettings()

    def cell(self, **changes: Any) -> Cell:
        """The network that is asked for, its settings checked."""
        settings = CompareSettings(
            datasets=(self.dataset or "fashion-mnist-mini",),
            models=(self.model,),
            methods=changes.pop("methods", (self.method,)),
            scopes=(self.scope,),
            densities=(self.density,),
            seeds=(self.seed or 0,),
            transfer=changes.pop("transfer", self.transfer),
            scoring=self.scoring,
            **changes,
        )
        cell = plan(checked(settings))[0]
        if self.density not in (cell.density, type(self).density):
            raise ExperimentError(f"--density: {cell.method} keeps every weight; leave it out.")
        return cell


def make_one(cell: Cell, options: RunOptions, start: Path | None = None) -> int:
    """Make the network `cell` in `options.out`; returns the exit status."""
    shelf, out = shelf_of(options.data_dir), options.out
    by_first(lambda: check_folder(out, "network"))
    if start is None:
        check_cells([cell], shelf)
    else:
        check_start(cell, start, shelf)
    with Display() as display, StopRequest() as stop, claimed(out, "network") as run:
        context = RunContext(shelf, display, stop, options.checkpoint_every, start)
        done = run.has(RESULT)
        display.say(f"{cell.dataset}, {cell.model}, {cell.name}; results in {out}")
        run.check_unchanged(REPORT_FILES)
        try:
            result = run_cell(cell, run, context, cell.name)
        except NetworkFailed as error:
            display.say(str(error))
            return 1
        if done:
            display.say("done already; nothing was changed")
        if result["test_accuracy"] is not None:
            display.say(accuracies(result))
            write_tables([result], run)
        elif result["kernel_distance"] is not None:
            distances = (result[f"{name}_distance"] for name in ("kernel", "target"))
            display.say("kernel distance {:.4g}, target distance {:.4g}".format(*distances))
        display.say(f"density {result['kept_density']:.4g}; network: {out / MODEL}")
        title = f"{cell.dataset}, {cell.model}: {cell.name}"
        by_first(lambda: write_page(find_runs(out), run, title, display, cell.to_json()))
    return 0
