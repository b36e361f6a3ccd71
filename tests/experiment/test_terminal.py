"""Terminals and names of any kind: every command ends, and what it prints can be used."""

import csv
import html
import io
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest

import ntt_eqx
from ntt_eqx.experiment import terminal
from ntt_eqx.experiment.cli import main
from ntt_eqx.experiment.progress import Display
from ntt_eqx.experiment.report import Page, save_page
from ntt_eqx.experiment.table import latex, markdown, shown, summarise, to_csv

from .conftest import DATASET
from .fabricated import fabricate, held

ENCODINGS = ["ascii", "cp1252", "latin-1", "cp437", "utf-8"]


@pytest.fixture
def stream(monkeypatch):
    """Standard output of an encoding, as a terminal of 80 columns or as a file."""

    def make(encoding, live=False):
        found = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
        found.isatty = lambda: live
        monkeypatch.setattr(sys, "stdout", found)
        monkeypatch.setenv("COLUMNS", "80")
        monkeypatch.setenv("LINES", "24")
        monkeypatch.setenv("TERM", "xterm")
        return lambda: found.buffer.getvalue().decode(encoding, "surrogateescape")

    return make


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("live", [False, True], ids=["file", "terminal"])
@pytest.mark.parametrize("words", ["compare --help", "--help", "data", "runs {}", "report {}"])
def test_every_encoding_does(encoding, live, words, stream, tmp_path):
    fabricate(tmp_path / "läufe ✓", densities=(0.01,), seeds=(0, 1))
    said = stream(encoding, live)
    more = ["--no-figures"] if "report" in words else []
    assert main([*words.format(tmp_path / "läufe ✓").split(" ", 1), *more]) == 0
    if words == "compare --help":
        assert ("Erdős" if encoding == "utf-8" else "Erdos") in said()


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_process_of_its_own(encoding):
    words = [sys.executable, "-m", "ntt_eqx.experiment", "compare", "--help"]
    env = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run(words, env=env, capture_output=True, check=False)
    assert (
        done.returncode == 0
        and not done.stderr
        and b"(Erdos-Renyi kernel" in done.stdout
        or (encoding == "cp1252")
    )


def test_the_streams_are_left_as_they_were(stream):
    stream("ascii")
    before = sys.stdout.errors
    assert main(["--version"]) == 0
    assert sys.stdout.errors == before


@pytest.mark.parametrize("path", ["läufe ✓/a b", "it's", "$(reboot);", "a\nb", "-x", "*"])
def test_the_command_for_going_on_can_be_pasted(path, monkeypatch, capsys):
    from ntt_eqx.experiment import cli
    from ntt_eqx.experiment._errors import Interrupted

    class Stopped:
        def run(self):
            raise Interrupted

    monkeypatch.setattr(cli, "parse", lambda words: Stopped())
    words = ["compare", "--out", path, "--seeds", "1", "2"]
    assert main(words) == 128 + signal.SIGINT
    command = capsys.readouterr().err.split("here:\n  ")[1]
    assert shlex.split(command) == ["ntt-eqx", *words]


def test_a_name_that_is_no_text_is_written_as_it_is(stream):
    name = os.fsdecode(b"l\xff")
    for encoding in ("ascii", "utf-8"):
        said = stream(encoding)
        with terminal.every_character_shown():
            print(name)
        assert said() == f"{name}\n"


def test_a_name_steers_no_terminal(capsys):
    with Display() as display:
        display.say("a\x1b[2Jb\r\x07")
        display.table((["Name"], [["c\x1b]0;x\x07\nd"]], [False]))
    said = capsys.readouterr().out
    assert [line.rstrip() for line in said.splitlines()] == [
        r"a\x1b[2Jb\r\x07",
        "Name",
        r"c\x1b]0;x\x07\nd",
    ]
    assert main(["evaluate", "a\x1b[2Jb.eqx"]) == 2
    assert r"a\x1b[2Jb.eqx: no such file" in capsys.readouterr().err


def test_the_version_is_told(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"ntt-eqx {ntt_eqx.__version__}\n"


def test_the_package_is_the_command():
    """Where the script is not on the path, as on Windows without it."""
    ran = subprocess.run(
        [sys.executable, "-m", "ntt_eqx", "--version"], capture_output=True, text=True, check=True
    )
    assert ran.stdout == f"ntt-eqx {ntt_eqx.__version__}\n"


# Tables

NAMES = ["a|b", "a\nb", "a\r\nb", r"\input{/etc/passwd}", "=1+1", "+1", "-1", "@A1", "\t=1",
         " =1", "[x]", "*x", "50%_#&~^$x$", "`rm`", "<script>", "x\\", "a\x1bb", "ü±–"]  # fmt: skip


def rows_of(name):
    common = {"dataset": name, "model": "m", "method": "random", "scope": "layer", "density": 0.1}
    other = {**common, "dataset": "plain"}
    numbers = {"seed": 0, "test_accuracy": 0.5, "train_accuracy": 0.5}
    return summarise([{**common, **numbers}, {**other, **numbers}])


@pytest.mark.parametrize("name", NAMES)
def test_names_are_no_markdown(name):
    lines = markdown(shown(rows_of(name))).splitlines()
    assert len(lines) == 4
    cells = [re.split(r"(?<!\\)(?:\\\\)*\|", line)[1:-1] for line in lines]
    assert {len(line) for line in cells} == {len(cells[0])}
    assert all(line.isprintable() for line in lines) and "<" not in "".join(lines)


@pytest.mark.parametrize("name", NAMES)
def test_names_are_no_latex(name):
    text = latex(shown(rows_of(name)))
    assert text.count("\n") == 8 and r"\input" not in text
    body = text.split("\\midrule\n")[1].split("\\bottomrule")[0]
    for line in body.splitlines():
        assert line.endswith(r" \\") and line[0] not in "[*"
        assert len(re.findall(r"(?<!\\)&", line)) == 6
        bare = re.sub(r"\\[%_&#{}$]|\$\\pm\$", "", line)
        assert not re.search(r"[%_#~^$`<>|]", bare), line
        assert bare.count("{") == bare.count("}")


@pytest.mark.parametrize("name", NAMES)
def test_names_are_no_formulas(name):
    _, *lines = csv.reader(io.StringIO(to_csv(rows_of(name))))
    found = {line[0].removeprefix("'") for line in lines}
    assert found == {name, "plain"}
    for line in lines:
        assert all(cell.lstrip()[:1] not in ("=", "+", "-", "@") for cell in line)


def test_names_are_no_html(tmp_path):
    names = [*NAMES, "</table><script>", "{{ 1 + 1 }}", '"onload="']
    page = Page("</title>", (names, [names], [False] * len(names)), "<i>", {"<b>": "<i>"})
    save_page(held(tmp_path / "page"), page, {})
    text = (tmp_path / "page" / "report.html").read_bytes().decode()
    cells = re.findall(r"<td>(.*?)</td>", text, re.DOTALL)
    assert [html.unescape(cell) for cell in cells] == names
    tags = set(re.findall(r"</?([a-z0-9]+)", text))
    assert not tags & {"script", "i", "b"} and text.count("</title>") == 1


def test_names_are_no_mathematics_in_figures(tmp_path):
    from ntt_eqx.experiment.figures import render_figure, sparsity_figure
    from ntt_eqx.experiment.results import find_runs

    fabricate(tmp_path, ("random",), (0.1, 0.2), (0,), dataset="npy:/a$\\frac$b")
    assert render_figure(sparsity_figure(find_runs(tmp_path)), "x")


# A terminal of 80 columns and 24 lines


def test_no_path_is_cut(stream, tmp_path):
    directories = fabricate(tmp_path / ("long-name-" * 6), densities=(0.01,), seeds=(0,))
    said = stream("utf-8", live=True)
    assert main(["runs", str(tmp_path)]) == 0
    lines = said().splitlines()
    for directory in directories:
        assert any(line.endswith(str(directory)) for line in lines)
    assert "…" not in said() and said().count("done") == len(directories)


def test_no_cell_of_a_table_is_cut(stream):
    said = stream("utf-8", live=True)
    names = [f"a-rather-long-name-{number}" for number in range(6)]
    with Display() as display:
        display.table((names, [names], [False] * 5 + [True]))
    shown = re.sub(r"\s", "", "".join(said().split("─")))
    assert "…" not in shown


def test_the_screen_does_not_stand_still(stream, monkeypatch, tmp_path):
    """What takes longer than a moment after the plan says what it is, and a wheel turns."""
    from ntt_eqx.experiment import comparison

    shown, said = [], stream("utf-8", live=True)

    def measured(phase):
        before = len(said())
        time.sleep(0.5)
        shown.append(said()[before:])
        os.kill(os.getpid(), signal.SIGINT)
        return 1.0, 1.0, 0.0

    monkeypatch.setattr(comparison, "_measure", measured)
    words = ["--datasets", DATASET, "--models", "tiny", "--densities", "0.2", "--methods", "random"]
    assert main(["compare", *words, "--out", str(tmp_path / "out")]) == 128 + signal.SIGINT
    lines = [line for line in re.split(r"\r|\n", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown[0]))]
    wheels = {line[0] for line in lines if "compiling and timing a step of training" in line}
    assert len(wheels) > 1 and max(map(len, lines)) <= 80
