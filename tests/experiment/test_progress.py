"""What a run shows: plain lines in a file, a bar with rate and time left on a terminal."""

import io
import re

import pytest

from ntt_eqx.experiment import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def now(monkeypatch):
    """A clock that the test moves."""
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    return clock


def play(display, now):
    with display:
        display.say("hello")
        display.begin("[1/2] ntt layer 0.03 seed 0, transfer", 200, 100)
        for step in range(110, 201, 10):
            display.advance(step, {"kernel": 12.3456})
            now[0] += 2.0
        display.end()
        display.table((["Method", "Test"], [["ntt", "86.40"]], [False, True]))


def test_plain_lines(monkeypatch, now):
    monkeypatch.setattr(progress, "_LINE_EVERY", 0.0)
    stream = io.StringIO()
    play(progress.Display(stream), now)
    lines = stream.getvalue().splitlines()
    assert lines[1] == "[1/2] ntt layer 0.03 seed 0, transfer: continuing at step 100 of 200"
    assert lines[2].endswith("step 130 of 200, 5 steps/s, 14 s left, kernel 12.35")
    assert lines[-3].startswith("[1/2] ntt layer 0.03 seed 0, transfer: 200 steps, ")
    assert lines[-2:] == ["Method   Test", "ntt     86.40"]


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_the_time_left_after_a_resume_is_that_of_the_steps(monkeypatch, now, stream):
    """90 s of compilation at step 901, then two steps a second: 40 s left at 920, not 7 minutes."""
    monkeypatch.setenv("COLUMNS", "100")
    with progress.Display(stream) as display:
        display.begin("ntt, transfer", 1000, 900)
        now[0] = 90.0
        for step in range(901, 921):
            display.advance(step)
            now[0] += 0.5
        if stream.isatty():
            display._bar.refresh()
    lines = stream.getvalue()
    assert "compiling" in lines or not stream.isatty()
    assert "40 s left" in lines if stream.isatty() else "s left" in lines
    left = [line for line in lines.split("\n") if " left" in line]
    assert "min" not in "".join(left), lines


def test_the_pace_is_that_of_steps_that_are_done(now):
    """32 steps are asked for at once, the others when one is done: two a second, later one."""
    stream = io.StringIO()
    with progress.Display(stream) as display:
        display.begin("dense, training", 1000, 0)
        now[0] = 30.0
        for step in range(1, 1001):
            display.advance(step)
            now[0] += 0.0 if step < 33 else 0.5 if step < 400 else 1.0
    lines = [line for line in stream.getvalue().split("\n") if " left" in line]
    paces = [line.split(", ")[2] for line in lines]
    assert paces[0] == paces[10] == "2 steps/s" and paces[-1] == "1 steps/s", paces
    assert lines[0].endswith("8 min 02 s left")


@pytest.mark.parametrize("width", [80, 160])
def test_a_live_bar_takes_one_line(monkeypatch, now, width):
    monkeypatch.setenv("COLUMNS", str(width))
    stream = Terminal()
    display = progress.Display(stream)
    play(display, now)
    said = stream.getvalue()
    assert "hello" in said and "86.40" in said and "100/200" in said


def test_at_80_columns_the_numbers_are_whole(monkeypatch, now):
    """Of a long title its end is kept, and the wheel turns beside it."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with progress.Display(stream) as display:
        display.begin("[12/40] ntt-sketch layer 0.03 seed 0, transfer", 20_000, 0)
        for step in (1, 2, 5_000):
            display.advance(step, {"kernel": 12.3})
            now[0] += 1.0
        display._bar.refresh()
        with display.busy("[12/40] ntt-sketch layer 0.03 seed 0, preparing the transfer"):
            display._bar.refresh()
    said = stream.getvalue()
    assert ", transfer" in said and ", preparing the transfer" in said and "5000/20000" in said
    lines = re.split(r"[\r\n]", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said))
    full = [line for line in lines if "5000/20000" in line]
    assert full and all(line[0] in "-\\|/" and "s left" in line for line in full), lines
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.05, "0.1 s"),
        (9.97, "10 s"),
        (59.97, "1 min 00 s"),
        (125.0, "2 min 05 s"),
        (4800.0, "1 h 20 min"),
    ],
)
def test_durations_in_words(seconds, words):
    assert progress.duration(seconds) == words
