"""One phase of a run, step by step: log, checkpoint, resume, stop on request or divergence."""

import base64
import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from jaxtyping import PyTree

from ._errors import Diverged, Interrupted
from .checkpoint import Checkpoint, CheckpointStore
from .metrics import MetricsFile
from .progress import Display


@dataclasses.dataclass
class Phase:
    """A loop over batches.

    Attributes:
        name: `"transfer"` or `"train"`; marks its rows of metrics.
        title: what people see.
        num_steps: steps in all.
        log_every: steps between two rows of metrics.
        state: where it starts; a PyTree.
        batches: an iterator with `get_state` and `set_state`.
        step: `(state, batch) -> (state, metrics)`; `metrics` maps names to scalars.
        observe: `(state, step) -> row`; what to look at beside the mean of the steps' metrics.
        shown: picks from a row what a display shows.
        advice: what to try when the loss diverges.
    """

    name: str
    title: str
    num_steps: int
    log_every: int
    state: PyTree
    batches: Any
    step: Callable[[PyTree, Any], tuple[PyTree, Mapping[str, jax.Array]]]
    observe: Callable[[PyTree, int], dict[str, Any]]
    shown: Callable[[dict[str, Any]], Mapping[str, float]]
    advice: str


@dataclasses.dataclass
class Outcome:
    """What a finished phase leaves.

    Attributes:
        state: the last state.
        seconds: time used, over all the pieces in which it ran.
        row: the last row of metrics.
        carried: the JSON values of earlier phases that it was given, or found in its checkpoint.
    """

    state: PyTree
    seconds: float
    row: dict[str, Any]
    carried: dict[str, Any]


class StopRequest:
    """Turns Ctrl-C and SIGTERM into a request to stop after the current step.

    A second Ctrl-C ends the process at once.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *failure: Any) -> None:
        self._restore()

    def check(self) -> None:
        """Raise `Interrupted` if a stop was asked for."""
        if self.asked:
            raise Interrupted

    def _ask(self, number: int, frame: Any) -> None:
        self.asked = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


def run_phase(
    phase: Phase,
    directory: Path,
    metrics: MetricsFile,
    display: Display,
    stop: StopRequest,
    *,
    checkpoint_every: float,
    carried: Mapping[str, Any] | None = None,
) -> Outcome:
    """Run `phase` to its end, going on from its newest checkpoint if it has one.

    **Arguments:**

    - `phase`: what to do.
    - `directory`: where its checkpoints go.
    - `metrics`: where its rows go, behind those of earlier phases; taken back to the rows that
      the checkpoint knows of.
    - `display`: shows the progress.
    - `stop`: says whether to stop.
    - `checkpoint_every`: seconds between two checkpoints; the last step always gets one.
    - `carried`: JSON values from earlier phases, kept in the checkpoints.

    **Raises:**

    `Diverged`: when a loss is not finite; the last checkpoint is older than that step.
    `Interrupted`: when a stop was asked for; the last step done has a checkpoint.
    """
    store = CheckpointStore(directory)
    try:
        return _run(phase, store, metrics, display, stop, checkpoint_every, dict(carried or {}))
    finally:
        store.close()


def _run(
    phase: Phase,
    store: CheckpointStore,
    metrics: MetricsFile,
    display: Display,
    stop: StopRequest,
    checkpoint_every: float,
    carried: dict[str, Any],
) -> Outcome:
    state, step, row, before = phase.state, 0, {}, 0.0
    window = _Window(phase, store)
    found = store.latest(like=phase.state)
    if found is not None:
        state, step, row = found.state, found.step, found.record["row"]
        before, carried = found.record["seconds"], found.record["carried"]
        window.values = found.record["window"]
        phase.batches.set_state(_decode(found.record["batches"]))
        metrics.rewind(found.record["rows"])
    display.begin(phase.title, phase.num_steps, step)
    started = saved = time.monotonic()

    def save() -> None:
        window.fetch(step)
        metrics.sync()
        record = {
            "phase": phase.name,
            "seconds": before + time.monotonic() - started,
            "rows": metrics.rows,
            "row": row,
            "window": window.values,
            "batches": _encode(phase.batches.get_state()),
            "carried": carried,
        }
        store.save(Checkpoint(step, state, record))

    if found is None:
        metrics.rewind(metrics.rows)  # rows of an attempt that died before its first checkpoint
        metrics.append({"phase": phase.name, "step": 0, **phase.observe(state, 0)})
    while step < phase.num_steps:
        if stop.asked:
            save()
            raise Interrupted
        state, values = phase.step(state, next(phase.batches))
        step += 1
        window.add(values)
        if step % phase.log_every == 0 or step == phase.num_steps:
            window.fetch(step)
            row = {"phase": phase.name, "step": step, "train": window.mean()}
            row.update(phase.observe(state, step))
            metrics.append(row)
            display.advance(step, phase.shown(row))
        else:
            display.advance(step)
        if step == phase.num_steps or time.monotonic() - saved >= checkpoint_every:
            save()
            saved = time.monotonic()
    seconds = before + time.monotonic() - started
    display.end()
    return Outcome(state, seconds, row, carried)


class _Window:
    """The metrics of the steps since the last row; on the device until they are looked at."""

    def __init__(self, phase: Phase, store: CheckpointStore):
        self.values: dict[str, list[float]] = {}
        self._phase = phase
        self._store = store
        self._pending: list[Mapping[str, jax.Array]] = []

    def add(self, values: Mapping[str, jax.Array]) -> None:
        self._pending.append(values)

    def fetch(self, step: int) -> None:
        """Bring all values over, and stop at the first loss that is not finite."""
        first = step - len(self._pending) + 1
        for i, entry in enumerate(jax.device_get(self._pending)):
            for name, value in entry.items():
                self.values.setdefault(name, []).append(float(value))
            if not math.isfinite(self.values["loss"][-1]):
                raise self._diverged(first + i, self.values["loss"][-1])
        self._pending = []

    def mean(self) -> dict[str, float]:
        means = {name: math.fsum(v) / len(v) for name, v in self.values.items()}
        self.values = {}
        return means

    def _diverged(self, step: int, loss: float) -> Diverged:
        steps = self._store.steps()
        kept = (
            f"the last good checkpoint is step {steps[-1]}, in {self._store.directory}"
            if steps
            else "there is no earlier checkpoint"
        )
        return Diverged(
            f"{self._phase.title}: the loss became {loss} at step {step} of "
            f"{self._phase.num_steps}; {kept}. {self._phase.advice}",
            stage=self._phase.name,
            step=step,
        )


def _encode(state: Any) -> Any:
    if isinstance(state, bytes):
        return {"base64": base64.b64encode(state).decode()}
    return {"json": state}


def _decode(state: Mapping[str, Any]) -> Any:
    return base64.b64decode(state["base64"]) if "base64" in state else state["json"]


def epochs_to_steps(epochs: float, samples: int, batch_size: int) -> int:
    """Steps in so many passes over `samples`, in whole batches a pass; at least 1."""
    return max(1, round(epochs * (samples // batch_size)))
