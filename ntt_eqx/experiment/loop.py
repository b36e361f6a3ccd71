"""One phase of a run: rows, checkpoints, resumption, stops on request."""

import dataclasses
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .. import AbstractObserver, DivergenceError, Progress
from .._types import PyTree
from ._errors import Interrupted, NetworkFailed
from .checkpoint import Checkpoint, CheckpointStore
from .images import Shelf
from .manifest import RunFolder
from .metrics import MetricsFile, Written
from .progress import Display
from .together import anybody, is_first, meets


@dataclasses.dataclass
class Phase:
    """A loop over batches."""

    name: str  # `"transfer"` or `"train"`; marks its rows of metrics
    title: str  # what people see
    num_steps: int  # steps in all
    log_every: int  # steps between two rows of metrics
    state: PyTree  # where it starts
    batches: Any  # an iterator with `get_state` and `set_state`
    run: Callable[..., tuple[PyTree, Any]]  # `transfer`, `train_steps`, or what is called like them
    shown: Callable[[dict[str, Any]], Mapping[str, float]]  # picks from a row what a display shows
    advice: str  # what to try when the loss diverges
    noted: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda row: row  # what a row keeps


class Outcome(NamedTuple):
    """The results of a finished phase."""

    state: PyTree  # the last state
    seconds: float  # time used, over all the pieces in which it ran
    row: dict[str, Any]  # the last row of metrics


_STOPS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)
]


class StopRequest:
    """Turns Ctrl-C, SIGTERM and SIGUSR1 (a preemption) into a request to stop after this step.

    A second Ctrl-C ends the process at once.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in _STOPS:
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *failure: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def check(self) -> None:
        """Raise `Interrupted` if a stop was asked for, of this process or of one beside it."""
        if anybody(self.asked):
            raise Interrupted

    def _ask(self, number: int, frame: Any) -> None:
        self.asked = True
        self.__exit__()


@dataclasses.dataclass(frozen=True)
class RunContext:
    """Resources of a cell on which its result does not depend."""

    shelf: Shelf  # finds image sets by name
    display: Display  # shows the progress
    stop: StopRequest  # says whether to stop
    checkpoint_every: float = 60.0  # seconds between two checkpoints
    start: Path | None = None  # the model file to train from, for a cell with a `start`
    observers: tuple[AbstractObserver, ...] = ()  # are told the rows of metrics


def run_phase(phase: Phase, run: RunFolder, metrics: MetricsFile, context: RunContext) -> Outcome:
    """Run `phase` to its end, going on from its newest checkpoint in `run` if it has one.

    Raises `NetworkFailed` when a loss is not finite; the last checkpoint is older than that step;
    `Interrupted` when a stop was asked for; the last step done has a checkpoint.
    """
    store = CheckpointStore(run, phase.name)
    try:
        return _run(phase, store, metrics, context)
    except DivergenceError as error:
        kept = "there is no earlier checkpoint"
        if steps := store.steps():
            kept = f"the last good checkpoint is step {steps[-1]}, in {store.directory}"
        raise NetworkFailed(
            f"{phase.title}: the loss became {error.value} at step {error.step} of "
            f"{phase.num_steps}; {kept}. {error.reason or phase.advice}",
            stage=phase.name,
            step=error.step,
        ) from None


def _run(
    phase: Phase, store: CheckpointStore, metrics: MetricsFile, context: RunContext
) -> Outcome:
    found = store.latest(like=phase.state) or Checkpoint(0, phase.state, {})
    record, display, stop = found.record, context.display, context.stop
    observers = context.observers if is_first() else ()
    if record:
        phase.batches.set_state(record["batches"])
    # After a finished phase stand rows of the next; else those that were written after the
    # checkpoint, or by an attempt that died before its first.
    written = Written(*record.get("written", metrics.written))
    metrics.rewind(written, keep=found.step == phase.num_steps)
    display.begin(phase.title, phase.num_steps, found.step)
    row, shown = record.get("row", {}), None
    begun = saved = time.monotonic()
    seconds = lambda: record.get("seconds", 0.0) + time.monotonic() - begun

    def on_log(state: PyTree, found: Mapping[str, Any]) -> None:
        nonlocal row, shown
        row = {"phase": phase.name, **phase.noted(found)}
        metrics.append(row)
        for observer in observers:
            observer(state, row)
        shown = phase.shown(row) if "train" in row else None

    def on_step(at: Progress) -> None:
        nonlocal saved, shown
        display.advance(at.step, shown)
        shown, last = None, at.step == phase.num_steps
        if not (last or meets(at.step)):
            return
        due = anybody(time.monotonic() - saved >= context.checkpoint_every)
        asked = anybody(stop.asked)
        if last or asked or due:
            window = at.window()  # stops at a loss that is not finite, before its state is kept
            metrics.sync()
            kept = {
                "phase": phase.name,
                "seconds": seconds(),
                "written": metrics.written,
                "row": row,
                "window": window,
                "batches": phase.batches.get_state(),
            }
            store.save(Checkpoint(at.step, at.state, kept))
            saved = time.monotonic()
        if asked and not last:
            raise Interrupted

    state, _ = phase.run(
        found.state,
        phase.batches,
        num_steps=phase.num_steps,
        log_every=phase.log_every,
        on_log=on_log,
        on_step=on_step,
        window=record.get("window"),
    )
    display.end()
    return Outcome(state, seconds(), row)
