"""What a comparison will do and how long it will take: a few steps of each kind are timed."""

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax

from .._sparse import sparsify
from .cells import Cell
from .images import ImageShelf
from .phase import Phase, epochs_to_steps
from .phases import training_phase, transfer_phase
from .progress import Display, duration
from .results import CELLS
from .run_cell import Surroundings, dense_initialisation

_TIMED_STEPS = 3


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one kind of phase costs on this machine.

    Attributes:
        first: seconds of the first step, compilation included.
        step: seconds of a later step.
        look: seconds of a look at the held-out or test images.
        log_every: steps between two looks.
    """

    first: float
    step: float
    look: float
    log_every: int

    def seconds(self, steps: int) -> float:
        """Time of a phase of so many steps, without compilation."""
        return steps * self.step + (steps / self.log_every) * self.look


@dataclasses.dataclass(frozen=True)
class Costs:
    """Time and memory of what is left to do.

    Attributes:
        seconds: all of it.
        steps: seconds of a step, by kind of phase.
        memory: bytes that this process has needed so far, `None` where that is not known.
    """

    seconds: float
    steps: dict[str, float]
    memory: int | None


def estimate(cells: Sequence[Cell], out: Path, around: Surroundings) -> Costs:
    """Time a few steps of every kind that `cells` still need.

    The steps compile what the run compiles anyway; their results are thrown away.
    """
    known: dict[tuple[str, ...], Cost] = {}
    compiled: set[tuple[object, ...]] = set()
    total, steps = 0.0, {}
    for cell in cells:
        if _done(cell, out):
            continue
        for phase_name, count in _phases(cell, around.shelf):
            around.stop.check()
            kernel = cell.method if phase_name == "transfer" else ""
            kind = (cell.dataset, cell.model, phase_name, kernel)
            variant = (*kind, cell.transfer, cell.density, cell.scope) if kernel else kind
            if kind not in known:
                known[kind] = _measure(_build(cell, phase_name, around.shelf))
                compiled.add(variant)
            cost = known[kind]
            if variant not in compiled:
                compiled.add(variant)
                total += cost.first
            total += cost.seconds(count)
            steps[f"{kernel or 'training'} step"] = cost.step
    return Costs(total, steps, _memory())


def show_plan(
    cells: Sequence[Cell], out: Path, shelf: ImageShelf, display: Display, costs: Costs | None
) -> None:
    """Say what will be done, where the results go, and how long it takes if that is known."""
    todo = [cell for cell in cells if not _done(cell, out)]
    done = len(cells) - len(todo)
    skipped = f", {done} of them done already" if done else ""
    display.say(f"Plan: {len(cells)} networks{skipped}; results in {out}")
    facts = {
        "dataset": [cell.dataset for cell in cells],
        "model": [cell.model for cell in cells],
        "method": [cell.method for cell in cells],
        "scope": [cell.scope for cell in cells if cell.scope],
        "density": [f"{cell.density:g}" for cell in cells if cell.scope],
        "seed": [str(cell.seed) for cell in cells],
    }
    for name, values in facts.items():
        if values:
            display.say(f"  {name + ':':10}{', '.join(dict.fromkeys(values))}")
    counts: dict[tuple[str, int], int] = {}
    for cell in todo:
        for name, steps in _phases(cell, shelf):
            counts[name, steps] = counts.get((name, steps), 0) + 1
    for (name, steps), times in counts.items():
        display.say(f"  {name + ':':10}{times} x {steps} steps")
    if costs is not None and todo:
        rates = ", ".join(f"{name} {1000 * s:.3g} ms" for name, s in costs.steps.items())
        memory = "" if costs.memory is None else f"; memory about {costs.memory / 1e6:.0f} MB"
        display.say(f"  time:     about {duration(costs.seconds)} ({rates}){memory}")


def _phases(cell: Cell, shelf: ImageShelf) -> list[tuple[str, int]]:
    found = []
    if cell.transfer is not None:
        images = shelf.load(cell.transfer.dataset or cell.dataset)
        used, _ = images.parts(cell.transfer.held_out, cell.seed)
        count = epochs_to_steps(cell.transfer.epochs, used.size, cell.transfer.batch_size)
        found.append(("transfer", count))
    if cell.training is not None:
        used, _ = shelf.load(cell.dataset).parts(cell.training.held_out, cell.seed)
        count = epochs_to_steps(cell.training.epochs, used.size, cell.training.batch_size)
        found.append(("train", count))
    return found


def _build(cell: Cell, name: str, shelf: ImageShelf) -> Phase:
    images = shelf.load(cell.dataset)
    teacher = dense_initialisation(cell, images)
    if name == "train":
        return training_phase(cell, sparsify(teacher), images, "")
    assert cell.transfer is not None
    source = shelf.load(cell.transfer.dataset or cell.dataset)
    return transfer_phase(cell, teacher, source, "")


def _measure(phase: Phase) -> Cost:
    started = time.perf_counter()
    phase.observe(phase.state, 0)
    state, values = phase.step(phase.state, next(phase.batches))
    jax.block_until_ready(values)
    first = time.perf_counter() - started
    started = time.perf_counter()
    for _ in range(_TIMED_STEPS):
        state, values = phase.step(state, next(phase.batches))
    jax.block_until_ready(values)
    step = (time.perf_counter() - started) / _TIMED_STEPS
    started = time.perf_counter()
    phase.observe(state, 0)
    return Cost(first, step, time.perf_counter() - started, phase.log_every)


def _memory() -> int | None:
    stats = jax.devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _done(cell: Cell, out: Path) -> bool:
    return (out / CELLS / cell.folder / "result.json").exists()
