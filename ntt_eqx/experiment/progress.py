"""Show the progress of a run: a live bar on a terminal, plain lines elsewhere."""

import collections
import contextlib
import io
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

from ._errors import require
from .table import Cells
from .terminal import plain
from .together import is_first

_NUMBERS = 46  # columns of a terminal for the bar, its wheel, count, rate and time left
_LINE_EVERY = 10.0  # seconds between two plain lines
_MARKS = 120  # of the steps done, a second or more apart, from the oldest of which the pace counts


class Display:
    """The progress of a run: on a terminal a bar, elsewhere a line every ten seconds.

    The pace is that of the last two minutes. It counts from a second after the first step, which
    compiles: dozens of steps are asked for at once after it, and done later.
    """

    def __init__(self, stream: Any = None):
        if not is_first():
            stream = io.StringIO()  # that nobody reads
        stream = sys.stdout if stream is None else stream
        live = stream.isatty()
        literal: Any = {"markup": False, "emoji": False, "highlight": False}
        width = None if live else 100_000  # lines of a file are not wrapped
        self._console = require("rich.console").Console(file=stream, width=width, **literal)
        self._bar = self._new_bar() if live else None
        self._task: Any = None
        self.begin("", 0, 0)

    def __enter__(self) -> "Display":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *failure: Any) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        """Show a line that stays."""
        self._console.print(plain(text), soft_wrap=True)

    def table(self, cells: Cells) -> None:
        """Show a table; where it is wider than the terminal, its last column has its own lines.

        Nothing is ever cut: what people look up in a table is a path or a name.
        """
        header, body, right = cells
        body = [[plain(cell, lines=False) for cell in line] for line in body]
        columns = zip(header, *body, strict=True)
        width = sum(max(map(len, column)) for column in columns) + 2 * len(header)
        if width > self._console.width and not right[-1]:
            self.table((header[:-1], [line[:-1] for line in body], right[:-1]))
            for number, line in enumerate(body, start=1):
                self.say(f"{number}: {line[-1]}")
            return
        box = None if self._bar is None else require("rich.box").SIMPLE_HEAD
        table = require("rich.table").Table(box=box, pad_edge=False, padding=(0, 2, 0, 0))
        for name, numeric in zip(header, right, strict=True):
            table.add_column(name, justify="right" if numeric else "left", overflow="fold")
        for line in body:
            table.add_row(*line)
        self._console.print(table)

    @contextlib.contextmanager
    def busy(self, text: str) -> Iterator[None]:
        """Show, on a terminal, what takes a while and has no steps."""
        task = None
        if self._bar is not None:
            fields = {"title": self._short(text), "count": "", "rate": "", "left": "", "note": ""}
            task = self._bar.add_task("", total=None, **fields)
        try:
            yield
        finally:
            if self._bar is not None:
                self._bar.remove_task(task)

    def begin(self, title: str, steps: int, done: int) -> None:
        """Start a phase of `steps` steps, of which `done` were done before."""
        self._title, self._steps, self._done = title, steps, done
        self._values: Mapping[str, float] = {}
        self._begun = self._last = time.monotonic()
        self._marks = collections.deque[tuple[int, float]](maxlen=_MARKS)
        self._rate = self._left = None
        if done:
            self.say(f"{title}: continuing at step {done} of {steps}")
        self._drop()
        if self._bar is not None and title:
            self._task = self._bar.add_task("", total=steps, completed=done, **self._fields())

    def advance(self, done: int, values: Mapping[str, float] | None = None) -> None:
        """`done` steps of the phase are done; `values` are worth showing."""
        self._done, self._values = done, values or self._values
        now = time.monotonic()
        if not self._marks or now - self._marks[-1][1] >= 1.0:
            self._marks.append((done, now))
        if len(self._marks) > 1 and now > self._marks[1][1]:
            steps, begun = self._marks[1]
            self._rate = (done - steps) / (now - begun)
            self._left = (self._steps - done) / self._rate
        if self._bar is not None:
            self._bar.update(self._task, completed=done, **self._fields())
        elif now - self._last >= _LINE_EVERY and self._rate and self._left:
            self._last = now
            rate = f"{self._rate:.0f}" if self._rate >= 10 else f"{self._rate:.2g}"
            self.say(
                f"{self._title}: step {done} of {self._steps}, {rate} steps/s, "
                f"{duration(self._left)} left{self._note}"
            )

    def end(self) -> None:
        """The phase is over: leave a line in place of the bar."""
        self._drop()
        seconds = duration(time.monotonic() - self._begun)
        self.say(f"{self._title}: {self._done} steps, {seconds}{self._note}")

    def _drop(self) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.remove_task(self._task)
            self._task = None

    @property
    def _pace(self) -> str:
        if not self._marks:
            return "compiling"
        return "" if self._rate is None else f"{self._rate:.3g}/s"

    @property
    def _note(self) -> str:
        return "".join(f", {name} {value:.4g}" for name, value in self._values.items())

    def _new_bar(self) -> Any:
        bars, column = require("rich.progress"), require("rich.table").Column
        text = lambda name, style="none": bars.TextColumn(
            f"{{task.fields[{name}]}}", style=style, markup=False, table_column=column(no_wrap=True)
        )
        columns = [
            bars.SpinnerColumn("line"),
            text("title"),
            bars.BarColumn(bar_width=None),
            text("count"),
        ]
        columns += [text("rate", "cyan"), text("left", "magenta")]
        columns += [text("note", "dim")] if self._console.width >= 130 else []
        return bars.Progress(*columns, console=self._console, transient=True, expand=True)

    def _short(self, title: str) -> str:
        """A title that leaves room for the bar and its numbers, its end kept: what is done now."""
        name, comma, what = title.rpartition(", ")
        room = max(self._console.width - _NUMBERS - len(comma + what), 10)
        return title if len(name) <= room else f"{name[: room - 1]}…{comma}{what}"

    def _fields(self) -> dict[str, str]:
        return {
            "title": self._short(self._title),
            "count": f"{self._done}/{self._steps}",
            "rate": self._pace,
            "left": "" if self._left is None else f"{duration(self._left)} left",
            "note": self._note.removeprefix(", "),
        }


def duration(seconds: float) -> str:
    """`seconds` in words: `3.2 s`, `2 min 05 s`, `1 h 20 min`."""
    if seconds < 59.95:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"
