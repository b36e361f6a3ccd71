"""`ntt-eqx compare`."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..comparison import prepare, run_comparison, show_plan
from ..images import shelf_of
from ..launch import launch
from ..loop import RunContext, StopRequest
from ..manifest import create
from ..presets import PRESETS
from ..progress import Display
from ..settings import CompareSettings
from ._options import RunOptions

Preset = Literal[
    "quick",
    "fast",
    "gradual",
    "few-channels",
    "paper",
    "conv-4",
    "vgg-19",
    "resnet-20",
    "ultra-sparse",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compare(RunOptions):
    """Make and train sparse networks by several methods, and compare them.

    Every method at every scope, density and seed is a unit of its own: finished ones are skipped
    and an interrupted one is continued when the same command is given again with the same --out.
    Given several times at once, on one machine or on many that share the folder, the commands share
    the work; networks of one that died are taken over by the others.
    Ends with a table, figures and report.html. The defaults shown are those of the chosen preset.
    """

    # what is compared
    settings: Annotated[CompareSettings, tyro.conf.arg(name="")] = PRESETS["quick"]
    # where defaults come from: `quick` ends within minutes, `fast` transfers by a sketch of the
    # kernel in a fraction of the time, `gradual` lets the density fall in a short transfer,
    # `few-channels` does so with masks on a sixth of the units, `paper` is the published protocol.
    # `conv-4`, `vgg-19`, `resnet-20` and `ultra-sparse` are protocols on which pruning is compared;
    # table.md has their published numbers. Single options and --config change it
    preset: Preset = "quick"
    # JSON file of settings, or the config.json of another comparison; options override it
    config: Path | None = None
    out: Path = Path("runs/compare")
    plan_only: bool = False  # show what would be done, and stop
    # where the work is done: in this process, by processes of this machine, or by jobs of Slurm
    launch: Literal["here", "local", "slurm"] = "here"
    workers: int = 2  # how many are launched
    # parameters of submitit for them, as slurm_partition=gpu gpus_per_node=1 timeout_min=600
    job: tuple[str, ...] = ()

    def run(self) -> int:
        """Work here, or launch workers that do; returns the exit status."""
        if self.launch == "here" or self.plan_only:
            return super().run()
        prepare(self.settings, self.out, shelf_of(self.data_dir))
        create(self.out, "compare")
        worker = dataclasses.replace(self, launch="here")
        with Display() as display:
            jobs = (self.workers, self.launch, self.job, self.out / "jobs")
            return launch(worker.run, *jobs, display.say)

    def make(self) -> int:
        """Run the comparison; returns the exit status."""
        shelf = shelf_of(self.data_dir)
        cells = prepare(self.settings, self.out, shelf)
        with Display() as display, StopRequest() as stop:
            context = RunContext(shelf, display, stop, self.checkpoint_every)
            if self.plan_only:
                show_plan(cells, self.out, context, timed=False)
                return 0
            return 0 if run_comparison(cells, self.settings, self.out, context) else 1
