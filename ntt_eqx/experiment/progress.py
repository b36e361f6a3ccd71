"""How a run shows what it does: a live bar on a terminal, plain lines anywhere else."""

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ._errors import require
from .table import aligned

_LINE_EVERY = 10.0  # seconds between two plain lines


class Display:
    """What a run tells while it goes on: plain lines at the end of a phase and every ten seconds.

    The pace counts from the end of the first step, which compiles and tells nothing of the others.
    """

    def __init__(self, stream: Any):
        self._stream = stream
        self._title, self._steps, self._done = "", 0, 0
        self._begun = self._last = 0.0
        self._first: tuple[int, float] | None = None
        self._rate = self._left = None
        self._values: Mapping[str, float] = {}

    def __enter__(self) -> "Display":
        return self

    def __exit__(self, *failure: Any) -> None:
        self._stream.flush()

    def say(self, text: str) -> None:
        """Show a line that stays."""
        print(text, file=self._stream, flush=True)

    def table(
        self, header: Sequence[str], body: Sequence[Sequence[str]], right: Sequence[bool]
    ) -> None:
        """Show a table; `right` marks columns of numbers."""
        for line in aligned((list(header), [list(line) for line in body], list(right))):
            self.say("  ".join(line).rstrip())

    def begin(self, title: str, steps: int, done: int) -> None:
        """Start a phase of `steps` steps, of which `done` were done before."""
        self._title, self._steps, self._done, self._values = title, steps, done, {}
        self._begun = self._last = time.monotonic()
        self._first = self._rate = self._left = None
        if done:
            self.say(f"{title}: continuing at step {done} of {steps}")

    def advance(self, done: int, values: Mapping[str, float] | None = None) -> None:
        """`done` steps of the phase are done; `values` are worth showing."""
        self._done, self._values = done, values or self._values
        now = time.monotonic()
        if self._first is None:
            self._first = done, now
        elif done > self._first[0]:
            self._rate = (done - self._first[0]) / max(now - self._first[1], 1e-9)
            self._left = (self._steps - done) / self._rate
        self._show(now)

    def end(self) -> None:
        """The phase is over."""
        seconds = duration(time.monotonic() - self._begun)
        self.say(f"{self._title}: {self._done} steps, {seconds}{self._note}")

    @property
    def _note(self) -> str:
        return "".join(f", {name} {value:.4g}" for name, value in self._values.items())

    def _show(self, now: float) -> None:
        if now - self._last >= _LINE_EVERY and self._rate and self._left:
            self._last = now
            rate = f"{self._rate:.0f}" if self._rate >= 10 else f"{self._rate:.2g}"
            self.say(
                f"{self._title}: step {self._done} of {self._steps}, {rate} steps/s, "
                f"{duration(self._left)} left{self._note}"
            )


class LiveDisplay(Display):
    """The same with a bar as wide as the terminal."""

    def __init__(self, stream: Any):
        super().__init__(stream)
        bars, column = require("rich.progress"), require("rich.table").Column
        self._console = require("rich.console").Console(file=stream, highlight=False)
        text = lambda name, style="none": bars.TextColumn(
            f"{{task.fields[{name}]}}", style=style, markup=False, table_column=column(no_wrap=True)
        )
        columns = [text("title"), bars.BarColumn(bar_width=None), text("count")]
        columns += [text("rate", "cyan"), text("left", "magenta")]
        if self._console.width >= 130:
            columns.append(text("note", "dim"))
        self._progress = bars.Progress(*columns, console=self._console, transient=True, expand=True)
        self._task: Any = None

    def __enter__(self) -> "LiveDisplay":
        self._progress.start()
        return self

    def __exit__(self, *failure: Any) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """Show a line above the bar."""
        self._console.print(text, markup=False, soft_wrap=True)

    def table(
        self, header: Sequence[str], body: Sequence[Sequence[str]], right: Sequence[bool]
    ) -> None:
        """Show a table above the bar."""
        table = require("rich.table").Table(box=require("rich.box").SIMPLE_HEAD, pad_edge=False)
        for name, numeric in zip(header, right, strict=True):
            table.add_column(name, justify="right" if numeric else "left")
        for line in body:
            table.add_row(*line)
        self._console.print(table, markup=False)

    def begin(self, title: str, steps: int, done: int) -> None:
        """Start a phase with a new bar."""
        super().begin(title, steps, done)
        self._drop()
        self._task = self._progress.add_task("", total=steps, completed=done, **self._fields())

    def end(self) -> None:
        """The phase is over: leave a line in place of the bar."""
        self._drop()
        super().end()

    def _show(self, now: float) -> None:
        self._progress.update(self._task, completed=self._done, **self._fields())

    def _fields(self) -> dict[str, str]:
        return {
            "title": self._title,
            "count": f"{self._done}/{self._steps}",
            "rate": "compiling" if self._first is None else f"{self._rate or 0:.3g}/s",
            "left": "" if self._left is None else f"{duration(self._left)} left",
            "note": self._note.removeprefix(", "),
        }

    def _drop(self) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
            self._task = None


def make_display(stream: Any = None) -> Display:
    """A live display when `stream` (standard output) is a terminal, else plain lines."""
    stream = sys.stdout if stream is None else stream
    return LiveDisplay(stream) if stream.isatty() else Display(stream)


def duration(seconds: float) -> str:
    """`seconds` in words: `3.2 s`, `2 min 05 s`, `1 h 20 min`."""
    if seconds < 59.95:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"
