"""A comparison: the networks that its settings ask for, made by any number of workers."""

import contextlib
import dataclasses
import functools
import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from .. import DivergenceError, LayerCollapseWarning, Progress, prune, scores, sparsify
from .._sparse_layers import is_large
from ._errors import NetworkFailed
from .cells import CONFIG, Cell, plan
from .claims import CLAIM, Lost, Taken, claimed
from .environment import environment
from .images import Shelf, check_dataset
from .loop import Phase, RunContext
from .manifest import CHECKPOINTS, RunFolder, check_folder, holds, read_manifest
from .methods import method as look_of, split_scope
from .own import check_model, enter, find_method
from .part import part_in_training, part_in_transfer
from .phases import planned_steps, training_phase, transfer_phase
from .progress import Display, duration
from .pruning import pruned_at_start, sparsity_of
from .report import REPORT_FILES, show_table, write_page, write_tables
from .results import CELLS, FAILURE, RESULT, Run, read_result, read_run, standard_error
from .running import check_cells, dense_initialisation, finished, run_cell, started
from .settings import CompareSettings, check, to_json
from .together import by_first

_TIMED_STEPS = 5
_POLL = 2.0  # seconds between two looks at what other workers do


def prepare(settings: CompareSettings, out: Path, shelf: Shelf) -> list[Cell]:
    """The cells of a comparison, in the order in which they run, all of them checked.

    Raises `ExperimentError` for settings that cannot be used, or a folder of something else.
    """
    cells = plan(checked(settings))
    by_first(lambda: check_folder(out, "compare"))
    check_cells(cells, shelf)
    return cells


def run_comparison(
    cells: Sequence[Cell], settings: CompareSettings, out: Path, context: RunContext
) -> bool:
    """Make the networks that `prepare` found for `settings`; write tables, figures and a page.

    Finished networks are skipped, and interrupted ones continued. Returns whether all are made: a
    loss that diverges, or a score that fails, stops its own network alone.
    """
    with _held(out, context) as run:
        run.check_unchanged((CONFIG, *REPORT_FILES))
        run.write_json(CONFIG, _asked(settings))
    show_plan(cells, out, context, timed=True)
    failed = _run_cells(cells, out, context)
    with _held(out, context) as run:
        by_first(lambda: _finish(cells, settings, run, context.display))
    return not failed


def checked(settings: CompareSettings) -> CompareSettings:
    """`settings` with each value checked, and code of a user's own found and called by its name.

    Raises `ExperimentError` for what cannot be used, or is not there.
    """
    named = {
        f"{kind}s": tuple(enter(kind, name) for name in getattr(settings, f"{kind}s"))
        for kind in ("dataset", "model")
    }
    methods = [split_scope(text) for text in settings.methods]
    named["methods"] = tuple(
        enter("method", name) + ("" if scope is None else f"@{scope}") for name, scope in methods
    )
    other = settings.transfer.dataset
    transfer = dataclasses.replace(
        settings.transfer, dataset=None if other is None else enter("dataset", other)
    )
    settings = check(dataclasses.replace(settings, transfer=transfer, **named))
    for name in (*settings.datasets, settings.transfer.dataset):
        if name is not None:
            check_dataset(name)
    for name in settings.models:
        check_model(name)
    return settings


def accuracies(result: dict[str, Any]) -> str:
    """The accuracy of a trained network, in words; of the tested one, with its standard error."""
    error = standard_error(result)
    beside = "" if error is None else f" ± {100 * error:.2f}"
    return (
        f"test accuracy {100 * result['test_accuracy']:.2f}{beside} %, "
        f"train accuracy {100 * result['train_accuracy']:.2f} %"
    )


def _held(out: Path, context: RunContext) -> contextlib.AbstractContextManager[RunFolder]:
    """The folder of the whole comparison, as soon as no other worker writes its tables."""

    def wait() -> None:
        context.stop.check()
        time.sleep(_POLL / 10)

    return claimed(out, "compare", wait)


def show_plan(cells: Sequence[Cell], out: Path, context: RunContext, *, timed: bool) -> None:
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

    A few steps of each kind are made and their results thrown away; they compile what the run
    compiles anyway.
    """
    known: dict[tuple[object, ...], tuple[float, float, float]] = {}
    first_of = {cell.model: cell for cell in reversed(cells)}
    dense = lambda cell: dense_initialisation(cell, context.shelf(cell.dataset))
    wide = {model: _is_wide(dense(cell)) for model, cell in first_of.items()}
    compiled, seconds, steps = set(), 0.0, {}
    for cell in cells:
        for name, count in planned_steps(cell, context.shelf).items():
            context.stop.check()
            method = cell.method if name == "transfer" else ""
            kind = (cell.dataset, cell.model, method)
            if wide[cell.model]:  # a step takes the time of its kept weights
                kind = (*kind, cell.density, find_method(cell.method).dynamic is not None)
            variant = (*kind, cell.transfer, cell.density, cell.scope) if method else kind
            if kind not in known:
                what = look_of(method).label if method else "training"
                with context.display.busy(f"compiling and timing a step of {what}"):
                    try:
                        known[kind] = _measure(_build(cell, name, context))
                    except NetworkFailed:  # is told when the network is made
                        continue
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
            start = pruned_at_start(cell, teacher, images.input_shape, None, cell.key(1))
        elif cell.method != "dense" and _is_wide(teacher):
            sparsity = sparsity_of(cell, teacher, images.input_shape)
            start = prune(teacher, scores.Random(cell.key(1)), sparsity)
        steps = planned_steps(cell, context.shelf)["train"]
        part = part_in_training(cell, start, images, steps)
        return training_phase(cell, start, images, "", part)
    source = context.shelf(cell.transfer.dataset or cell.dataset)
    return transfer_phase(cell, teacher, source, "", part_in_transfer(cell, teacher, source))


def _is_wide(model: Any) -> bool:
    """Whether a layer is so large that training may store its kept weights alone."""
    return any(is_large(mask) for mask in jax.tree.leaves(sparsify(model).mask))


def _measure(phase: Phase) -> tuple[float, float, float]:
    """Seconds of the first step, of a later step, and of looks for each step (the last has one)."""
    ends = [time.perf_counter()]

    def on_step(at: Progress) -> None:
        at.window()  # waits for the step; to look at the state would take longer than some steps
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

    A cell that fails is left as it is and the others go on. Returns whether there is one.
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
            except NetworkFailed as error:
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
    """Whether the cell failed with another worker meanwhile."""
    try:
        return holds(directory, FAILURE) and (directory / FAILURE).stat().st_mtime > since
    except OSError:
        return False


def runs_of(cells: Sequence[Cell], out: Path) -> list[Run]:
    """The run of each cell, as far as it is on disk."""
    return [read_run(out / CELLS / cell.folder) for cell in cells]


def _results(cells: Sequence[Cell], out: Path) -> list[dict[str, Any]]:
    """All results on disk, in the order of the cells, from any worker."""
    found = [read_result(out / CELLS / cell.folder) for cell in cells]
    return [result for result in found if result is not None]


def _finish(
    cells: Sequence[Cell], settings: CompareSettings, run: RunFolder, display: Display
) -> None:
    """Write tables, figures and page of the finished cells, and show the table."""
    out = run.path
    all_runs = runs_of(cells, out)
    runs, failed = ([r for r in all_runs if r.state == state] for state in ("done", "failed"))
    table = write_tables(_results(cells, out), run, failed)
    if not runs:
        return
    title = ", ".join(dict.fromkeys(name for c in cells for name in (c.dataset, c.model)))
    figures = write_page(runs, run, title, display, to_json(settings), failed)
    show_table(table, display)
    if failed:
        said = "failure.json in their folders says why"
        display.say(f"{len(failed)} of {len(cells)} networks failed; {said}")
    display.say(f"results: {out / 'results.json'}, {out / 'table.md'}, {out / 'report.html'}")
    if figures:
        display.say(f"figures: {out / 'figures'} ({', '.join(figures)}; PNG and SVG)")


def _asked(settings: CompareSettings) -> dict[str, Any]:
    """The requested comparison, with the versions of the packages that compute it."""
    return {"command": "compare", "settings": to_json(settings), **environment()}
