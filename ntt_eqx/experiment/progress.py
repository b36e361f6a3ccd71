"""How a run shows what it does: a live bar on a terminal, plain lines anywhere else."""

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from ._errors import require

_LINE_EVERY = 10.0
_WIDE = 130


@runtime_checkable
class Stream(Protocol):
    """Where text goes, such as `sys.stdout`."""

    def write(self, text: str, /) -> Any:
        """Take some text."""

    def flush(self) -> None:
        """Hand on what was taken."""

    def isatty(self) -> bool:
        """Whether a person looks at it."""
        ...


@runtime_checkable
class Display(Protocol):
    """What a run tells while it goes on."""

    def __enter__(self) -> "Display": ...

    def __exit__(self, *failure: Any) -> None: ...

    def say(self, text: str) -> None:
        """Show a line that stays."""

    def table(self, header: Sequence[str], body: Sequence[Sequence[str]], right: Sequence[bool]):
        """Show a table; `right` marks columns of numbers."""

    def begin(self, title: str, steps: int, done: int) -> None:
        """Start a phase of `steps` steps, of which `done` were done before."""

    def advance(self, done: int, values: Mapping[str, float] | None = None) -> None:
        """`done` steps of the phase are done; `values` are worth showing."""

    def end(self) -> None:
        """The phase is over."""


def make_display(stream: Stream | None = None) -> Display:
    """A live display when `stream` (standard output) is a terminal, else plain lines."""
    where: Stream = sys.stdout if stream is None else stream
    return LiveDisplay(where) if where.isatty() else PlainDisplay(where)


class _Pace:
    """Steps a second since the first step was done; that one compiles, and tells nothing."""

    def __init__(self, steps: int, done: int):
        self._steps, self._first = steps, done + 1
        self._since: float | None = None
        self.rate: float | None = None
        self.left: float | None = None

    def advance(self, done: int) -> None:
        now = time.monotonic()
        if self._since is None:
            self._first, self._since = done, now
        elif done > self._first:
            self.rate = (done - self._first) / max(now - self._since, 1e-9)
            self.left = (self._steps - done) / self.rate


class PlainDisplay:
    """Lines of text: at the end of a phase, and every ten seconds within one."""

    def __init__(self, stream: Stream):
        self._stream = stream
        self._title = ""
        self._steps = self._done = 0
        self._pace = _Pace(0, 0)
        self._started = self._last = 0.0
        self._values: Mapping[str, float] = {}

    def __enter__(self) -> "PlainDisplay":
        return self

    def __exit__(self, *failure: Any) -> None:
        self._stream.flush()

    def say(self, text: str) -> None:
        """Print a line."""
        print(text, file=self._stream, flush=True)

    def table(
        self, header: Sequence[str], body: Sequence[Sequence[str]], right: Sequence[bool]
    ) -> None:
        """Print aligned columns."""
        widths = [max(len(line[i]) for line in [header, *body]) for i in range(len(header))]
        for line in [header, *body]:
            cells = zip(line, widths, right, strict=True)
            self.say("  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in cells).rstrip())

    def begin(self, title: str, steps: int, done: int) -> None:
        """Remember where the phase starts."""
        self._title, self._steps, self._done = title, steps, done
        self._pace = _Pace(steps, done)
        self._started = self._last = time.monotonic()
        self._values = {}
        if done:
            self.say(f"{title}: continuing at step {done} of {steps}")

    def advance(self, done: int, values: Mapping[str, float] | None = None) -> None:
        """Print a line if the last one is ten seconds old."""
        self._done = done
        self._pace.advance(done)
        if values:
            self._values = values
        now, rate, left = time.monotonic(), self._pace.rate, self._pace.left
        if now - self._last < _LINE_EVERY or done == self._steps or rate is None or left is None:
            return
        self._last = now
        self.say(
            f"{self._title}: step {done} of {self._steps}, {speed(rate)}, {duration(left)} left"
            + _shown(self._values)
        )

    def end(self) -> None:
        """Print how the phase went."""
        seconds = time.monotonic() - self._started
        self.say(f"{self._title}: {self._done} steps, {duration(seconds)}" + _shown(self._values))


class LiveDisplay:
    """A rich progress bar with rate and time left."""

    def __init__(self, stream: Stream):
        console, bars = require("rich.console"), require("rich.progress")
        text = require("rich.text")

        class RateColumn(bars.ProgressColumn):
            def render(self, task: Any) -> Any:
                pace = task.fields["pace"]
                rate = "compiling" if pace.rate is None else f"{pace.rate:.3g}/s"
                return text.Text(rate, style="cyan", no_wrap=True)

        class LeftColumn(bars.ProgressColumn):
            def render(self, task: Any) -> Any:
                left = task.fields["pace"].left
                shown = "" if left is None else f"{duration(left)} left"
                return text.Text(shown, style="magenta", no_wrap=True)

        self._console = console.Console(file=stream, highlight=False)
        wide = self._console.width >= _WIDE
        line = lambda: require("rich.table").Column(no_wrap=True)
        columns = [
            bars.TextColumn("{task.description}", markup=False, table_column=line()),
            bars.BarColumn(bar_width=None),  # what is left of the line
            bars.TextColumn("{task.completed:.0f}/{task.total:.0f}", table_column=line()),
            RateColumn(table_column=line()),
            LeftColumn(table_column=line()),
        ]
        if wide:
            note = "{task.fields[note]}"
            columns.append(bars.TextColumn(note, style="dim", markup=False, table_column=line()))
        self._progress = bars.Progress(*columns, console=self._console, transient=True, expand=True)
        self._task: Any = None
        self._title = self._note = ""
        self._pace = _Pace(0, 0)
        self._started = 0.0

    def __enter__(self) -> "LiveDisplay":
        self._progress.start()
        return self

    def __exit__(self, *failure: Any) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(text, markup=False, soft_wrap=True)

    def table(
        self, header: Sequence[str], body: Sequence[Sequence[str]], right: Sequence[bool]
    ) -> None:
        """Print a table above the bar."""
        tables, box = require("rich.table"), require("rich.box")
        table = tables.Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for name, numeric in zip(header, right, strict=True):
            table.add_column(name, justify="right" if numeric else "left")
        for line in body:
            table.add_row(*line)
        self._console.print(table, markup=False)

    def begin(self, title: str, steps: int, done: int) -> None:
        """Show a new bar."""
        self._drop()
        self._started, self._title, self._note = time.monotonic(), title, ""
        self._pace = _Pace(steps, done)
        self._task = self._progress.add_task(
            title, total=steps, completed=done, note="", pace=self._pace
        )

    def advance(self, done: int, values: Mapping[str, float] | None = None) -> None:
        """Move the bar."""
        if values:
            self._note = _shown(values).removeprefix(", ")
        self._pace.advance(done)
        self._progress.update(self._task, completed=done, note=self._note)

    def end(self) -> None:
        """Leave a line with the time that the phase took."""
        seconds = duration(time.monotonic() - self._started)
        note = f", {self._note}" if self._note else ""
        self._drop()
        self.say(f"{self._title}: {seconds}{note}")

    def _drop(self) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
            self._task = None


def duration(seconds: float) -> str:
    """`seconds` in words: `3.2 s`, `2 min 05 s`, `1 h 20 min`."""
    if seconds < 59.95:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def speed(rate: float) -> str:
    """A rate in steps per second, with the digits that matter."""
    return f"{rate:.0f} steps/s" if rate >= 10 else f"{rate:.2g} steps/s"


def _shown(values: Mapping[str, float]) -> str:
    return "".join(f", {name} {value:.4g}" for name, value in values.items())
