"""`ntt-eqx compare`."""

import contextlib
import dataclasses
import functools
import platform
import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro

from ... import DivergenceError, LayerCollapseWarning, Progress, sparsify
from .._errors import Diverged
from ..cells import CONFIG, Cell, plan
from ..claims import CLAIM, Lost, Taken, claimed
from ..images import shelf_of
from ..launch import launch
from ..loop import Phase, RunContext, StopRequest
from ..manifest import CHECKPOINTS, RunFolder, check_folder, create, holds, read_manifest
from ..methods import method as look_of
from ..own import find_method
from ..phases import planned_steps, training_phase, transfer_phase
from ..progress import Display, duration
from ..pruning import pruned_at_start
from ..report import REPORT_FILES, write_page, write_tables
from ..results import CELLS, FAILURE, RESULT, Run, read_result
from ..running import check_cells, finished, run_cell, started
from ..settings import PRESETS, CompareSettings, to_json
from ..table import make_rows, table_cells
from ..together import by_first
from ._options import RunOptions, accuracies, checked

_PACKAGES = ("ntt-eqx", "jax", "jaxlib", "equinox", "optax", "grain", "numpy")
_TIMED_STEPS = 5
_POLL = 2.0  # seconds between two looks at what other workers do


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
    # kernel in a fraction of the time, `paper` is the published protocol. `conv-4`, `vgg-19`,
    # `resnet-20` and `ultra-sparse` are protocols on which pruning is compared; table.md has their
    # published numbers. Single options and --config change it
    preset: Literal["quick", "fast", "paper", "conv-4", "vgg-19", "resnet-20", "ultra-sparse"] = (
        "quick"
    )
    # JSON file with fields like those of config.json's `settings`; options override it
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
        cells = plan(checked(self.settings))
        check_folder(self.out, "compare")
        check_cells(cells, shelf_of(self.data_dir))
        create(self.out, "compare")
        worker = dataclasses.replace(self, launch="here")
        with Display() as display:
            jobs = (self.workers, self.launch, self.job, self.out / "jobs")
            return launch(worker.run, *jobs, display.say)

    def make(self) -> int:
        """Run the comparison; returns the exit status."""
        settings = checked(self.settings)
        cells, shelf, out = plan(settings), shelf_of(self.data_dir), self.out
        by_first(lambda: check_folder(out, "compare"))
        check_cells(cells, shelf)
        with Display() as display, StopRequest() as stop:
            context = RunContext(shelf, display, stop, self.checkpoint_every)
            if self.plan_only:
                _show_plan(cells, out, context, timed=False)
                return 0
            with _held(out, context) as run:
                run.check_unchanged((CONFIG, *REPORT_FILES))
                run.write_json(CONFIG, _asked(self.settings))
            _show_plan(cells, out, context, timed=True)
            failed = _run_cells(cells, out, context)
            with _held(out, context) as run:
                by_first(lambda: _finish(cells, run, display))
        return 1 if failed else 0


def _held(out: Path, context: RunContext) -> contextlib.AbstractContextManager[RunFolder]:
    """The folder of the whole comparison, as soon as no other worker writes its tables."""

    def wait() -> None:
        context.stop.check()
        time.sleep(_POLL / 10)

    return claimed(out, "compare", wait)


def _show_plan(cells: Sequence[Cell], out: Path, context: RunContext, *, timed: bool) -> None:
    """Say what will be done, where the results go, and, if it is `timed`, how long it takes."""
    say = context.display.say
    is_done = lambda cell: holds(out / CELLS / cell.folder, RESULT)
    done = by_first(lambda: [is_done(cell) for cell in cells])
    todo = [cell for cell, there in zip(cells, done, strict=True) if not there]
    rest = f", {sum(done)} of them done already" if any(done) else ""
    say(f"Plan: {len(cells)} networks{rest}; results in {out}")
    for name in ("dataset", "model", "method", "scope", "density", "seed"):
        pruned = name in ("scope", "density")  # of which a dense network has none
        values = [
            cell.line.scope if name == "scope" else getattr(cell, name)
            for cell in cells
            if not pruned or cell.method != "dense"
        ]
        words = dict.fromkeys(f"{v:g}" if isinstance(v, float) else str(v) for v in values)
        words.pop("", None)  # of a method that has no scope
        if words:
            say(f"  {name + ':':10}{', '.join(words)}")
    counts = Counter(part for cell in todo for part in planned_steps(cell, context.shelf).items())
    for (name, steps), times in counts.items():
        say(f"  {name + ':':10}{times} x {steps} steps")
    if timed and todo:
        say("  time:     compiling one step of each kind to tell ...")
        seconds, steps = _estimate(todo, context)
        rates = ", ".join(f"{name} step {1000 * step:.3g} ms" for name, step in steps.items())
        memory = _memory()
        used = "" if memory is None else f"; memory about {memory / 1e6:.0f} MB"
        say(f"  time:     about {duration(seconds)} ({rates}){used}")


def _estimate(cells: Sequence[Cell], context: RunContext) -> tuple[float, dict[str, float]]:
    """Seconds that `cells` will take, and those of a step of every kind of phase.

    Of each kind a few steps are made, which compile what the run compiles anyway; their results
    are thrown away.
    """
    known: dict[tuple[object, ...], tuple[float, float, float]] = {}
    compiled, seconds, steps = set(), 0.0, {}
    for cell in cells:
        for name, count in planned_steps(cell, context.shelf).items():
            context.stop.check()
            method = cell.method if name == "transfer" else ""
            kind = (cell.dataset, cell.model, method)
            variant = (*kind, cell.transfer, cell.density, cell.scope) if method else kind
            if kind not in known:
                what = look_of(method).label if method else "training"
                with context.display.busy(f"compiling and timing a step of {what}"):
                    known[kind] = _measure(_build(cell, name, context))
                compiled.add(variant)
            first, step, look = known[kind]
            seconds += count * (step + look) + (0.0 if variant in compiled else first)
            compiled.add(variant)
            steps[look_of(method).label if method else "training"] = step
    return seconds, steps


def _build(cell: Cell, name: str, context: RunContext) -> Phase:
    images = context.shelf(cell.dataset)
    teacher = started(cell, images)
    if name == "train" or cell.transfer is None:
        start = sparsify(teacher)
        if find_method(cell.method).dynamic is not None:  # its mask decides what it may become
            start = pruned_at_start(cell, teacher, None, cell.key(1))
        return training_phase(cell, start, images, "")
    return transfer_phase(cell, teacher, context.shelf(cell.transfer.dataset or cell.dataset), "")


def _measure(phase: Phase) -> tuple[float, float, float]:
    """Seconds of the first step, of a later step, and of looks for each step (the last has one)."""
    ends = [time.perf_counter()]

    def on_step(at: Progress) -> None:
        jax.block_until_ready(jax.tree.leaves(at.state))
        ends.append(time.perf_counter())

    how: Any = {"num_steps": _TIMED_STEPS, "log_every": None, "on_step": on_step}
    # Both are told when the phase is run.
    with contextlib.suppress(DivergenceError), warnings.catch_warnings():
        warnings.simplefilter("ignore", LayerCollapseWarning)
        phase.run(phase.state, phase.batches, **how)
    first, *steps, last = np.diff(ends + ends[-1:] * _TIMED_STEPS)[:_TIMED_STEPS]
    step = float(np.mean(steps))
    return float(first), step, max(float(last) - step, 0.0) / phase.log_every


def _memory() -> int | None:
    """Bytes that this process has needed so far, `None` where that is not known."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _run_cells(cells: Sequence[Cell], out: Path, context: RunContext) -> bool:
    """Run every cell that is neither done nor another worker's, until all are; tables after each.

    A cell whose loss diverges is left as it is and the others go on. Returns whether there is one.
    """
    begun, failed, waits = time.time(), False, False
    several = len({(cell.dataset, cell.model) for cell in cells}) > 1
    todo = list(enumerate(cells, start=1))
    while todo:
        others: list[tuple[int, Cell]] = []
        for number, cell in todo:
            directory = out / CELLS / cell.folder
            title = f"[{number}/{len(cells)}] {cell.name}"
            title += f" ({cell.dataset}, {cell.model})" if several else ""
            if by_first(functools.partial(_is_left, directory)):
                finished(cell, directory)  # to be read, and checked
                continue
            if by_first(functools.partial(_has_failed, directory, begun)):
                failed = True
                continue
            try:
                with claimed(directory, "network") as run:
                    result = run_cell(cell, run, context, title)
            except (Taken, Lost):
                others.append((number, cell))
                continue
            except Diverged as error:
                failed = True
                context.display.say(str(error))
                continue
            with contextlib.suppress(Taken, Lost), claimed(out, "compare") as whole:
                # one who is at it writes them, or will at the end
                write_tables(_results(cells, out), whole)
            if result["test_accuracy"] is not None:
                context.display.say(f"{title}: {accuracies(result)}")
        if len(others) == len(todo):
            if not waits:
                context.display.say(f"{len(others)} networks are in the hands of other workers")
            waits = True
            context.stop.check()
            time.sleep(_POLL)
        todo = others
    return failed


def _is_left(directory: Path) -> bool:
    """Whether a cell is done and its worker has left it, all cleared away."""
    if not holds(directory, RESULT) or (directory / CLAIM).exists():
        return False
    return not any(name.startswith(CHECKPOINTS) for name in read_manifest(directory).files)


def _has_failed(directory: Path, since: float) -> bool:
    """Whether another worker saw the cell's loss diverge meanwhile."""
    try:
        return holds(directory, FAILURE) and (directory / FAILURE).stat().st_mtime > since
    except OSError:
        return False


def _results(cells: Sequence[Cell], out: Path) -> list[dict[str, Any]]:
    """All results on disk, in the order of the cells, from any worker."""
    found = [read_result(out / CELLS / cell.folder) for cell in cells]
    return [result for result in found if result is not None]


def _finish(cells: Sequence[Cell], run: RunFolder, display: Display) -> None:
    """Write tables, figures and page of the finished cells, and show the table."""
    out = run.path
    write_tables(_results(cells, out), run)
    places = {cell: out / CELLS / cell.folder for cell in cells}
    found = [(cell, place, read_result(place)) for cell, place in places.items()]
    runs = [Run(place, "done", cell.to_json(), done) for cell, place, done in found if done]
    if not runs:
        return
    title = ", ".join(dict.fromkeys(name for c in cells for name in (c.dataset, c.model)))
    figures = write_page(runs, run, title, display)
    display.table(table_cells(make_rows([run.result for run in runs if run.result])))
    display.say(f"results: {out / 'results.json'}, {out / 'table.md'}, {out / 'report.html'}")
    if figures:
        display.say(f"figures: {out / 'figures'} ({', '.join(figures)}; PNG and SVG)")


def _asked(settings: CompareSettings) -> dict[str, Any]:
    """The requested comparison, with the versions of the packages that compute it."""
    return {
        "command": "compare",
        "settings": to_json(settings),
        "versions": {name: _version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": [device.device_kind for device in jax.devices()],
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
