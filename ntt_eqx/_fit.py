"""The one driver: steps over batches, rows of metrics, and what happens when a loss diverges."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeAlias, TypeVar

import jax

from ._checks import is_count
from ._errors import DivergenceError

State = TypeVar("State")

Row: TypeAlias = dict[str, Any]
"""What is known after a step: `{"step": 100, "train": {...}, "test": {...}}`."""

History: TypeAlias = list[Row]
"""The rows of a run, in their order."""

_MOST_PENDING = 1000  # steps whose metrics wait on the device


@dataclasses.dataclass
class Progress(Generic[State]):
    """Where a run stands, as `on_step` sees it.

    Attributes:
        state: after the step; where the step reuses the memory of its state, a copy must be
            taken before the next one if it is to be kept.
        step: number of steps made.
        num_steps: the step that the run goes to.
        row: the newest row, if there is one.
        collect: brings the metrics of the steps since that row to the host; see `window`.
    """

    state: State
    step: int
    num_steps: int
    row: Row | None
    collect: Callable[[], dict[str, list[float]]]

    def window(self) -> dict[str, list[float]]:
        """The metrics of the steps since the newest row, for a run that goes on from here.

        **Raises:**

        `DivergenceError` when the loss of one of them is not finite: whoever saves the window
        first and the state after it never saves a state that is lost.
        """
        return self.collect()


def fit(
    step: Callable[[State, Any], tuple[State, Any]],
    state: State,
    batches: Iterable[Any],
    *,
    num_steps: int,
    log_every: int | None = 100,
    observe: Mapping[str, Callable[[State], Mapping[str, Any]]] | None = None,
    on_log: Callable[[State, Row], None] | None = None,
    on_step: Callable[[Progress[State]], None] | None = None,
    start: int | None = None,
    window: Mapping[str, Sequence[float]] | None = None,
    name: str = "fit",
) -> tuple[State, History]:
    """Run a step over batches, the driver under `transfer`, `train` and the command line.

    **Arguments:**

    - `step`: `(state, batch) -> (state, metrics)`, such as `eqx.filter_jit(ntt.ntt_step)`;
      `metrics` is a mapping or a Module of scalars, one of which is called `loss`.
    - `state`: where the run starts.
    - `batches`: one is taken per step, and none more. What can be gone through again (a list, a
      torch `DataLoader`) is, when it ends; an iterator that ends too early is an error.
    - `num_steps`: the step to run to, counted from the beginning and not from `start`.
    - `log_every`: steps between two rows; the last step has one always, and `None` means it alone.
    - `observe`: what a row holds beside the steps' own metrics: `name -> (state -> values)`.
    - `on_log`: called with the state and each new row.
    - `on_step`: called with the `Progress` after each step, and after its row. To checkpoint or
      to show the progress; an exception raised in it stops the run.
    - `start`: number of steps made before; `state.step` if left out.
    - `window`: `Progress.window()` of the run that this one goes on from.
    - `name`: begins the messages of errors.

    **Returns:**

    The last state and the rows. A row is `{"step": int, "train": {...}}` with the mean of each of
    the steps' metrics since the row before, and one more part for each observer. There is a row at
    every multiple of `log_every`, at the last step, and, where something is observed, at step 0.

    **Raises:**

    `ValueError` for batches that run out and counts that are none; `DivergenceError`, which names
    the step and has its value, when the loss of a step or of an observer is not finite: it is
    looked at before each row, in `Progress.window()`, and after 1,000 steps.
    """
    if not is_count(num_steps, 0):
        raise ValueError(f"{name}: num_steps must be at least 0, got {num_steps!r}.")
    if log_every is not None and not is_count(log_every):
        raise ValueError(f"{name}: log_every must be at least 1 or None, got {log_every!r}.")
    start = int(state.step) if start is None else start  # pyright: ignore[reportAttributeAccessIssue]
    source = _each(name, batches, start, num_steps)
    seen = _Window(name, start, window)
    observe = {} if observe is None else observe
    history: History = []

    def log(at: int, means: dict[str, float] | None) -> None:
        row: Row = {"step": at} if means is None else {"step": at, "train": means}
        for part, look in observe.items():
            row[part] = dict(look(state))
            loss = row[part].get("loss", 0.0)
            if not math.isfinite(loss):
                raise DivergenceError(name, at, float(loss))
        history.append(row)
        if on_log is not None:
            on_log(state, row)

    if start == 0 and observe:
        log(0, None)
    for at in range(start + 1, num_steps + 1):
        state, metrics = step(state, next(source))
        seen.add(metrics)
        if at == num_steps or (log_every is not None and at % log_every == 0):
            log(at, seen.means())
        if on_step is not None:
            newest = history[-1] if history else None
            on_step(Progress(state, at, num_steps, newest, seen.fetch))
    return state, history


def _each(name: str, batches: Iterable[Any], start: int, num_steps: int) -> Iterator[Any]:
    """A batch for each step; what can be gone through again is, as long as it yields any."""
    at, source = start, iter(batches)
    while True:
        before = at
        for batch in source:
            yield batch
            at += 1
        again = iter(batches)
        if again is source or at == before:
            raise ValueError(f"{name}: the batches ran out after step {at} of {num_steps}.")
        source = again


class _Window:
    """The metrics of the steps since the last row; on the device until they are looked at."""

    def __init__(self, name: str, step: int, values: Mapping[str, Sequence[float]] | None):
        self._name, self._step = name, step
        self._values = {key: list(v) for key, v in (values or {}).items()}
        self._pending: list[Any] = []

    def add(self, metrics: Any) -> None:
        self._pending.append(scalars(metrics))
        if len(self._pending) >= _MOST_PENDING:
            self.fetch()

    def fetch(self) -> dict[str, list[float]]:
        """All values so far; stops at the first loss that is not finite."""
        pending, self._pending = self._pending, []
        # Lists, for device_get sorts the names of dicts.
        fetched = jax.device_get([list(entry.values()) for entry in pending])
        for names, numbers in zip(pending, fetched, strict=True):
            self._step += 1
            entry = dict(zip(names, numbers, strict=True))
            for key, value in entry.items():
                self._values.setdefault(key, []).append(float(value))
            if not math.isfinite(entry.get("loss", 0.0)):
                raise DivergenceError(self._name, self._step, float(entry["loss"]))
        return {key: list(v) for key, v in self._values.items()}

    def means(self) -> dict[str, float]:
        """The mean of each, after which all are forgotten."""
        values = self.fetch()
        self._values = {}
        return {key: math.fsum(v) / len(v) for key, v in values.items()}


def scalars(metrics: Any) -> dict[str, Any]:
    """The scalars of a mapping or a Module by name; those of a mapping within it, too."""
    if dataclasses.is_dataclass(metrics):
        metrics = {f.name: getattr(metrics, f.name) for f in dataclasses.fields(metrics)}
    elif not isinstance(metrics, Mapping):
        metrics = metrics._asdict()
    found: dict[str, Any] = {}
    for name, value in metrics.items():
        found.update(scalars(value) if isinstance(value, Mapping) else {name: value})
    return found
