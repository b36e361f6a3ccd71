"""What a comparison will do and how long it will take: a few steps of each kind are timed."""

import dataclasses
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import jax

from .. import sparsify
from .cells import Cell
from .images import ImageShelf
from .loop import Phase
from .methods import METHODS
from .phases import planned_steps, training_phase, transfer_phase
from .progress import Display, duration
from .results import CELLS
from .running import RunContext, dense_initialisation

_TIMED_STEPS = 3


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one kind of phase costs on this machine."""

    first: float  # seconds of the first step, compilation included
    step: float  # seconds of a later step
    look: float  # seconds of a look at the held-out or test images
    log_every: int  # steps between two looks

    def seconds(self, steps: int) -> float:
        """Time of a phase of so many steps, without compilation."""
        return steps * self.step + (steps / self.log_every) * self.look


@dataclasses.dataclass(frozen=True)
class Costs:
    """Time and memory of what is left to do."""

    seconds: float  # all of it
    steps: dict[str, float]  # seconds of a step, by kind of phase
    memory: int | None  # bytes that this process has needed so far, `None` where that is not known


def estimate(cells: Sequence[Cell], out: Path, context: RunContext) -> Costs:
    """Time a few steps of every kind that `cells` still need.

    The steps compile what the run compiles anyway; their results are thrown away.
    """
    known: dict[tuple[str, ...], Cost] = {}
    compiled: set[tuple[object, ...]] = set()
    total, steps = 0.0, {}
    for cell in cells:
        if _done(cell, out):
            continue
        for name, count in planned_steps(cell, context.shelf).items():
            context.stop.check()
            method = cell.method if name == "transfer" else ""
            kind = (cell.dataset, cell.model, name, method)
            variant = (*kind, cell.transfer, cell.density, cell.scope) if method else kind
            if kind not in known:
                known[kind] = _measure(_build(cell, name, context.shelf))
                compiled.add(variant)
            cost = known[kind]
            if variant not in compiled:
                compiled.add(variant)
                total += cost.first
            total += cost.seconds(count)
            steps[f"{METHODS[method].label if method else 'training'} step"] = cost.step
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
    counts = Counter(phase for cell in todo for phase in planned_steps(cell, shelf).items())
    for (name, steps), times in counts.items():
        display.say(f"  {name + ':':10}{times} x {steps} steps")
    if costs is not None and todo:
        rates = ", ".join(f"{name} {1000 * s:.3g} ms" for name, s in costs.steps.items())
        memory = "" if costs.memory is None else f"; memory about {costs.memory / 1e6:.0f} MB"
        display.say(f"  time:     about {duration(costs.seconds)} ({rates}){memory}")


def _build(cell: Cell, name: str, shelf: ImageShelf) -> Phase:
    images = shelf.load(cell.dataset)
    teacher = dense_initialisation(cell, images)
    if name == "train":
        return training_phase(cell, sparsify(teacher), images, "")
    assert cell.transfer is not None
    source = shelf.load(cell.transfer.dataset or cell.dataset)
    return transfer_phase(cell, teacher, source, "")


def _measure(phase: Phase) -> Cost:
    def look(state: object) -> None:
        for observe in phase.observe.values():
            observe(state)

    started = time.perf_counter()
    look(phase.state)
    state, values = phase.step(phase.state, next(phase.batches))
    jax.block_until_ready(values)
    first = time.perf_counter() - started
    started = time.perf_counter()
    for _ in range(_TIMED_STEPS):
        state, values = phase.step(state, next(phase.batches))
    jax.block_until_ready(values)
    step = (time.perf_counter() - started) / _TIMED_STEPS
    started = time.perf_counter()
    look(state)
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
