"""Run directories that are broken, foreign, newer or hostile are listed, left out and named."""

import json

import pytest

from ntt_eqx.experiment._errors import ExperimentError
from ntt_eqx.experiment.cli import main
from ntt_eqx.experiment.results import find_runs, read_result

from .fabricated import fabricate, held
from .user_folders import snapshot


@pytest.fixture
def run(tmp_path):
    (directory,) = fabricate(
        tmp_path / "runs", methods=["ntt"], densities=[0.1], seeds=[0], scopes=["global"]
    )
    return directory


def state(run):
    (found,) = find_runs(run.parent)
    return found.state, found.note


def rewrite(path, content):
    """Put other content into a run's file, as the run would: its digest is that of the content."""
    held(path.parent).write({path.name: content})


def change(path, **changes):
    value = json.loads(path.read_text())
    value.update(changes)
    rewrite(path, json.dumps({k: v for k, v in value.items() if v is not ...}).encode())


def test_whole_runs_are_listed(run, capsys):
    assert state(run) == ("done", "")
    assert main(["runs", str(run.parent)]) == 0
    assert "done" in capsys.readouterr().out


TABLES = ["--no-figures"]
RESULTS = {
    "truncated": lambda p: p.write_bytes(p.read_bytes()[:40]),
    "empty": lambda p: p.write_bytes(b""),
    "one flipped bit": lambda p: p.write_bytes(p.read_bytes().replace(b"0.9", b"8.9", 1)),
    "another's list": lambda p: p.write_text("[1]"),
    "list": lambda p: rewrite(p, b"[1]"),
    "deep": lambda p: rewrite(p, b'{"a":' * 20_000),
    "binary": lambda p: rewrite(p, bytes(range(256))),
    "folder": lambda p: (p.unlink(), p.mkdir()),
    "no method": lambda p: change(p, method=...),
    "seed of text": lambda p: change(p, seed="0"),
    "density true": lambda p: change(p, density=True),
    "accuracy of text": lambda p: change(p, test_accuracy="0.9"),
    "seconds of a list": lambda p: change(p, seconds=[1]),
    "densities of text": lambda p: change(p, densities={"a": "b"}),
    "densities of a list": lambda p: change(p, densities=[1]),
    "915 %": lambda p: change(p, test_accuracy=9.15),
    "accuracy below 0": lambda p: change(p, train_accuracy=-0.1),
    "density 0": lambda p: change(p, density=0),
    "density of 3": lambda p: change(p, density=3.0),
    "a layer's density of 2": lambda p: change(p, densities={"a": 2.0}),
    "seed below 0": lambda p: change(p, seed=-1),
    "seed of 40 bits": lambda p: change(p, seed=2**40),
    "negative time": lambda p: change(p, seconds=-1.0),
    "infinite distance": lambda p: change(p, kernel_distance=float("inf")),
    "steps of text": lambda p: change(p, train_steps="3"),
}


CONFIGS = (
    "truncated",
    "density of 3",
    "seed below 0",
    "empty",
    "deep",
    "binary",
    "folder",
    "seed of text",
    "density true",
)
CASES = [("result.json", case) for case in RESULTS] + [("config.json", case) for case in CONFIGS]


@pytest.mark.parametrize(("name", "case"), CASES)
def test_broken_files_are_named_and_left_out(run, case, name, capsys, tmp_path):
    RESULTS[case](run / name)
    found, note = state(run)
    assert found == "broken" and str(run / name) in note
    assert main(["runs", str(run.parent)]) == 0
    assert "broken" in capsys.readouterr().out
    assert main(["report", str(run.parent), "--out", str(tmp_path / "out"), *TABLES]) == 2
    assert "no finished run" in capsys.readouterr().err
    other = fabricate(tmp_path / "runs", methods=["random"], densities=[0.1], seeds=[0])
    assert main(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), *TABLES]) == 0
    said = capsys.readouterr().out
    assert "left out" in said and "is broken" in said and len(other) == 1
    table = (tmp_path / "out/table.md").read_text()
    assert "random" in table and "| NTT" not in table


def test_foreign_folders_are_no_runs(tmp_path):
    for number, text in enumerate(("[]", "3", '{"name": "something else"}', '{"method": "GET"}')):
        for name in ("config.json", "manifest.json"):
            folder = tmp_path / f"{number}-{name}"
            folder.mkdir()
            (folder / name).write_text(text)
    assert find_runs(tmp_path) == []


def test_folders_of_earlier_versions_are_named(run, tmp_path, capsys):
    (run / "manifest.json").unlink()
    found, note = state(run)
    assert found == "broken" and "made by ntt-eqx 0.2 or earlier, which kept no manifest" in note
    assert main(["report", str(run.parent), "--out", str(tmp_path / "out")]) == 2
    before = snapshot(run)
    assert main(["train", "--out", str(run)]) == 2
    said = capsys.readouterr().err
    assert "0.2 or earlier" in said and "--out" in said and snapshot(run) == before


@pytest.mark.parametrize(
    "content",
    [
        b'{"phase": "train", "step": 1}\n[2]\n',
        b'{"phase": "train", "step": "one", "test": {"accuracy": 1}}\n',
        b'{"phase": "train", "test": {"accuracy": 1}}\n',
        b'{"phase": "train", "step": 1, "test": [1]}\n',
        b"[" * 20_000 + b"\n",
        b"\xff\n",
    ],
)
def test_broken_metrics_cost_their_figure_only(run, content, capsys, tmp_path):
    rewrite(run / "metrics.jsonl", content)
    assert main(["report", str(run), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "accuracy is not drawn" in said and "metrics.jsonl" in said
    assert (tmp_path / "out/figures/densities.png").exists()
    assert not (tmp_path / "out/figures/accuracy.png").exists()


def test_a_missing_network_costs_its_figure_only(run, capsys, tmp_path):
    (run / "model.eqx").unlink(missing_ok=True)
    assert main(["report", str(run), "--out", str(tmp_path / "out")]) == 0
    assert "masks is not drawn" in capsys.readouterr().out


def test_a_failure_that_cannot_be_read_is_still_a_failure(run):
    held(run).remove(["result.json"])
    assert state(run)[0] == "unfinished"
    (run / "failure.json").write_text('{"message": "somebody else\'s"}')
    assert state(run)[0] == "unfinished"
    (run / "failure.json").unlink()
    rewrite(run / "failure.json", b'{"message": "the loss became nan"}')
    assert state(run) == ("failed", "the loss became nan")
    for text in (b"{", b"[]", b"[" * 20_000):
        rewrite(run / "failure.json", text)
        assert state(run)[0] == "failed"
        assert "failure.json: cannot be read" in state(run)[1]


def test_a_result_of_another_configuration_is_refused(run):
    change(run / "result.json", fingerprint=3)
    with pytest.raises(ExperimentError, match="'fingerprint' is missing or mistyped"):
        read_result(run)
