"""The loop under every run: steps over batches, rows of metrics, and checks of the loss."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeAlias, TypeVar

import equinox as eqx
import jax
import numpy as np

from ._checks import check_count
from ._diagnosis import Diagnosis, Evidence, all_finite, faults_of_batch, tolerates
from ._errors import DivergenceError
from ._held import whole
from .kernels import target_device

State = TypeVar("State")

Row: TypeAlias = dict[str, Any]
"""The metrics at a step: `{"step": 100, "train": {...}, "test": {...}}`."""

History: TypeAlias = list[Row]
"""The rows of a run, in their order."""

_MOST_PENDING = 1000  # steps whose metrics wait on the device
_MOST_HELD = 2**26  # bytes of their batches, kept to explain a loss that is not finite


@dataclasses.dataclass
class Progress(Generic[State]):
    """The progress of a run, for `on_step`.

    Attributes:
        step: number of steps done.
        num_steps: the last step of the run.
        row: the newest row, if there is one.
        look: puts the state after the step together; see `state`.
        collect: copies the metrics of the steps since that row to the host; see `window`.
    """

    step: int
    num_steps: int
    row: Row | None
    look: Callable[[], State]
    collect: Callable[[], dict[str, list[float]]]

    @property
    def state(self) -> State:
        """The state after the step. Copy it if you keep it and the step donates its state."""
        return self.look()

    def window(self) -> dict[str, list[float]]:
        """The metrics of the steps since the newest row, to store and pass to a continued run.

        **Raises:**

        `DivergenceError` if the loss of one of them is not finite. Save the window before the
        state, and no diverged state is ever saved.
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
    """Run a step over batches: the loop under `transfer`, `train` and the command line.

    **Arguments:**

    - `step`: `(state, batch) -> (state, metrics)`, such as `eqx.filter_jit(ntt.ntt_step)`;
      `metrics` is a mapping or a Module of scalars, one of which is called `loss`.
    - `state`: the initial state.
    - `batches`: an iterable; each step takes one batch. A list or a torch `DataLoader` starts again
      when it ends; an iterator that ends too early is an error. Batches are kept, up to 64 MiB,
      until their losses are checked.
    - `num_steps`: the last step, counted from the beginning and not from `start`.
    - `log_every`: steps between two rows; with `None` only the last step has a row.
    - `observe`: further parts of a row, `name -> (state -> values)`.
    - `on_log`: called with the state and each new row.
    - `on_step`: called with the `Progress` after each step and its row, for checkpoints or a
      progress bar; an exception in it stops the run.
    - `start`: number of steps done before; `state.step` by default.
    - `window`: `Progress.window()` of the run that this one continues.
    - `name`: start of error messages.

    **Returns:**

    The last state and the rows. A row is `{"step": int, "train": {...}}` with the mean of each of
    the steps' metrics since the row before, and one more part for each observer. There is a row at
    every multiple of `log_every`, at the last step, and, where something is observed, at step 0.

    **Raises:**

    `ValueError` if the batches run out or a count is invalid. `DivergenceError`, with the step, the
    value and the cause, if the loss of a step or of an observer is not finite; losses are checked
    before each row, in `Progress.window()`, and every 1,000 steps.

    If the optimiser skips such steps (`optax.apply_if_finite`, or `optax.MultiSteps` with
    `optax.skip_not_finite`), the run goes on as long as the state stays finite; then `"train"` has
    the means over the finite values, and NaN where there are none.
    """

    def evident(state: State, batch: Any) -> tuple[State, Any, Evidence]:
        return *step(state, batch), Evidence(batch)

    return drive(
        evident,
        state,
        batches,
        num_steps=num_steps,
        log_every=log_every,
        observe=observe,
        on_log=on_log,
        on_step=on_step,
        start=start,
        window=window,
        name=name,
    )


def drive(
    step: Callable[[Any, Any], tuple[Any, Any, Evidence]],
    state: State,
    batches: Iterable[Any],
    *,
    num_steps: int,
    log_every: int | None = None,
    observe: Mapping[str, Callable[[State], Mapping[str, Any]]] | None = None,
    on_log: Callable[[State, Row], None] | None = None,
    on_step: Callable[[Progress[State]], None] | None = None,
    start: int | None = None,
    window: Mapping[str, Sequence[float]] | None = None,
    name: str,
    diagnosis: Diagnosis | None = None,
) -> tuple[State, History]:
    """`fit` with steps that also return evidence, from which `diagnosis` explains a divergence.

    The state that a step takes may be a state, or `Held` if the step before returned one.
    """
    check_count(f"{name}: num_steps", num_steps, 0)
    check_count(f"{name}: log_every", log_every, none=True)
    if start is None and not hasattr(state, "step"):
        raise ValueError(
            f"{name}: the state has no `step`; give `start`, the number of steps made before."
        )
    start = int(state.step) if start is None else start  # pyright: ignore[reportAttributeAccessIssue]
    source = _each(name, batches, start, num_steps)
    seen = _Window(name, start, window, diagnosis, tolerates(state))
    observe = {} if observe is None else observe
    history: History = []

    def log(at: int, means: dict[str, float] | None, state: State) -> None:
        row: Row = {"step": at} if means is None else {"step": at, "train": means}
        for part, look in observe.items():
            row[part] = dict(look(state))
            loss = row[part].get("loss", 0.0)
            if not math.isfinite(loss):
                raise DivergenceError(name, at, float(loss), seen.explain_observed(part, state))
        history.append(row)
        if on_log is not None:
            on_log(state, row)

    if start == 0 and observe:
        log(0, None, state)
    held: Any = state
    with _errors_of_models():
        for at in range(start + 1, num_steps + 1):
            held, metrics, evidence = step(held, next(source))
            look = functools.partial(whole, held)
            seen.add(look, metrics, evidence)
            if at == num_steps or (log_every is not None and at % log_every == 0):
                log(at, seen.means(look), look())
            if on_step is not None:
                newest = history[-1] if history else None
                collect = functools.partial(seen.fetch, look)
                on_step(Progress(at, num_steps, newest, look, collect))
    return whole(held), history


@contextlib.contextmanager
def _errors_of_models() -> Iterator[None]:
    """Raise what `eqx.error_if` says as `eqx.filter_jit` does: a step in plain `jit` wraps it."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        _, wrapped, said = str(error).partition("_EquinoxRuntimeError: ")
        if not wrapped:
            raise
        message = said.partition("\n\n")[0].strip()
    else:
        return
    raise eqx.EquinoxRuntimeError(message)


def _each(name: str, batches: Iterable[Any], start: int, num_steps: int) -> Iterator[Any]:
    """A batch for each step; an iterable that is not an iterator starts again when it ends."""
    at = start
    try:
        source = iter(batches)
    except TypeError as error:
        raise ValueError(
            f"{name}: batches must be something that yields batches (a list, an iterator, a "
            f"DataLoader), got {type(batches).__name__}."
        ) from error
    while True:
        before = at
        for batch in source:
            yield batch
            at += 1
        again = iter(batches)
        if again is source or at == before:
            raise ValueError(f"{name}: the batches ran out after step {at} of {num_steps}.")
        source = again


class _Window(Generic[State]):
    """The metrics of the steps since the last row; they stay on the device until needed."""

    def __init__(
        self,
        name: str,
        step: int,
        values: Mapping[str, Sequence[float]] | None,
        diagnosis: Diagnosis | None,
        tolerant: bool,
    ):
        self._name, self._step = name, step
        self._values = {key: list(v) for key, v in (values or {}).items()}
        self._diagnosis, self._tolerant = diagnosis, tolerant
        self._pending: list[tuple[Any, Evidence]] = []  # metrics as the steps return them
        self._held = 0  # bytes of the pending batches
        self._first: Evidence | None = None  # of the run's first step
        self._before: Evidence | None = None  # of the newest step that was checked

    def add(self, state: Callable[[], State], metrics: Any, evidence: Evidence) -> None:
        self._pending.append((metrics, evidence))
        self._held += _bytes_of(evidence.batch)
        # All but the newest, so that the device has work while the host looks at the others.
        if self._held > _MOST_HELD and len(self._pending) > 1:
            self._look(state, self._pending[:-1], self._pending[-1:])
        if len(self._pending) >= _MOST_PENDING:
            self.fetch(state)

    def fetch(self, state: Callable[[], State]) -> dict[str, list[float]]:
        """All values so far; stops at the first loss that is not finite."""
        self._look(state, self._pending, [])
        return {key: list(v) for key, v in self._values.items()}

    def means(self, state: Callable[[], State]) -> dict[str, float]:
        """The mean of each, after which all are forgotten."""
        values = self.fetch(state)
        self._values = {}
        if not self._tolerant:
            return {key: math.fsum(v) / len(v) for key, v in values.items()}
        finite = {key: [x for x in v if math.isfinite(x)] for key, v in values.items()}
        return {key: math.fsum(v) / len(v) if v else math.nan for key, v in finite.items()}

    def explain_observed(self, part: str, state: State) -> str | None:
        """Why the loss of an observer may not be finite, after steps whose losses all were."""
        if not all_finite(state):
            return (
                f"It is the loss of {part!r}: the last update made the state NaN or infinite, "
                "though the loss of its step was finite. Try a smaller learning rate, and look at "
                "the optimizer's settings."
            )
        return None

    def _look(self, state: Callable[[], State], looked: list[Any], left: list[Any]) -> None:
        self._pending = left
        self._held = sum(_bytes_of(evidence.batch) for _, evidence in left)
        entries = [scalars(metrics) for metrics, _ in looked]
        fetched = _fetched([list(entry.values()) for entry in entries])
        lost: DivergenceError | None = None
        for (_, evidence), names, numbers in zip(looked, entries, fetched, strict=True):
            self._step += 1
            entry = dict(zip(names, numbers, strict=True))
            for key, value in entry.items():
                self._values.setdefault(key, []).append(float(value))
            loss = float(entry.get("loss", 0.0))
            if math.isfinite(loss):
                lost = None
            elif lost is None:
                why = self._why(state, evidence)
                if self._tolerant:
                    why = f"The optimizer did not skip all such steps. {why or ''}".rstrip()
                lost = DivergenceError(self._name, self._step, loss, why)
                if not self._tolerant:
                    raise lost
            self._first = Evidence(None, evidence.weights) if self._first is None else self._first
            self._before = Evidence(None, evidence.weights)
        if lost is not None and not all_finite(state()):
            raise lost  # the optimiser let it through

    def _why(self, state: Callable[[], State], evidence: Evidence) -> str | None:
        if self._diagnosis is None:
            return faults_of_batch(evidence.batch, self._step)
        return self._diagnosis(state(), self._step, evidence, self._before, self._first)


def _fetched(rows: list[list[Any]]) -> list[list[Any]]:
    """The numbers of each step, on the host. Lists, for `device_get` sorts the names of dicts."""
    # `device_get` starts every transfer before it waits for one. On a CPU nothing is transferred,
    # and it takes 20 us a step of the 600 of LeNet-300-100's, where this takes 4.
    if target_device().platform != "cpu":
        return jax.device_get(rows)
    return [[np.asarray(x) for x in row] for row in rows]


def _bytes_of(batch: Any) -> int:
    return sum(getattr(leaf, "nbytes", 0) for leaf in jax.tree.leaves(batch))


def scalars(metrics: Any) -> dict[str, Any]:
    """The scalars of a mapping or a Module by name; those of a mapping within it, too.

    `None` stands for one that there is not, and is left out.
    """
    if dataclasses.is_dataclass(metrics):
        metrics = {f.name: getattr(metrics, f.name) for f in dataclasses.fields(metrics)}
    elif not isinstance(metrics, Mapping):
        metrics = metrics._asdict()
    found: dict[str, Any] = {}
    for name, value in metrics.items():
        if value is not None:
            found.update(scalars(value) if isinstance(value, Mapping) else {name: value})
    return found
