"""Observers: rows as JSON lines, and the loggers of the guide, on `transfer` and in `compare`."""

import json
import math
import sys
import types

import pytest
from helpers.pages import ROOT, definitions

import ntt_eqx as ntt

ROWS = [
    {"step": 2, "train": {"loss": 0.5, "norms": {"a": 1.0}}, "test": {"accuracy": 0.25}},
    {"phase": "train", "step": 4, "train": {"loss": math.nan}},
]
FLAT = [
    (2, {"train/loss": 0.5, "train/norms/a": 1.0, "test/accuracy": 0.25}),
    (4, {"train/train/loss": math.nan}),
]


def watch(observer):
    with observer.watch("one", {"density": 0.2}):
        for row in ROWS:
            observer(None, row)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_have_settings_and_rows_of_each_run(tmp_path):
    lines = ntt.JSONLines(tmp_path / "rows.jsonl")
    for _ in range(2):
        watch(lines)
    found = read(tmp_path / "rows.jsonl")
    assert found[:3] == found[3:]
    assert found[0] == {"run": "one", "settings": {"density": 0.2}}
    assert found[1] == {"run": "one", "step": 2, **FLAT[0][1]}
    assert found[2] == {"run": "one", "step": 4, "train/train/loss": None}


def test_lines_belong_to_a_run(tmp_path):
    with pytest.raises(ValueError, match="no run; log within"):
        ntt.JSONLines(tmp_path / "rows.jsonl")(None, ROWS[0])


def test_a_run_that_fails_has_ended(tmp_path):
    lines = ntt.JSONLines(tmp_path / "rows.jsonl")
    with pytest.raises(ZeroDivisionError), lines.watch("one"):
        1 / 0  # noqa: B018
    with pytest.raises(ValueError, match="closed file"):
        lines(None, ROWS[0])


GUIDE = ROOT / "docs" / "guides" / "observers.md"


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util import tensor_util

    watch(definitions(GUIDE)["TensorBoard"](tmp_path))
    events = EventAccumulator(str(tmp_path / "one")).Reload()
    found = [
        (event.step, name, float(tensor_util.make_ndarray(event.tensor_proto)))
        for name in events.Tags()["tensors"]
        for event in events.Tensors(name)
    ]
    wanted = [(step, name, value) for step, row in FLAT for name, value in row.items()]
    assert sorted(map(repr, found)) == sorted(map(repr, wanted))


def recorder(calls, name, value=None):
    """A function that writes down its calls; the loggers' packages need accounts or a server."""

    def call(*arguments, **options):
        calls.append((name, arguments, options))
        return value

    return call


def test_weights_and_biases(monkeypatch):
    calls = []
    run = types.SimpleNamespace(
        **{name: recorder(calls, name) for name in ("define_metric", "log", "finish")}
    )
    wandb = types.SimpleNamespace(init=recorder(calls, "init", run))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    watch(definitions(GUIDE)["WandB"]("mine"))
    started = {"project": "mine", "name": "one", "config": {"density": 0.2}}
    assert calls[0] == ("init", (), started)
    assert repr([c[1] for c in calls if c[0] == "log"]) == repr(
        [({"step": step, **row},) for step, row in FLAT]
    )
    assert calls[-1] == ("finish", (), {})


def test_mlflow(monkeypatch):
    calls = []
    names = ("start_run", "log_dict", "log_metrics", "end_run")
    mlflow = types.SimpleNamespace(**{name: recorder(calls, name) for name in names})
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    watch(definitions(GUIDE)["MLflow"]())
    assert [name for name, *_ in calls] == [*names[:2], names[2], *names[2:]]
    assert calls[0] == ("start_run", (), {"run_name": "one"})
    assert calls[1] == ("log_dict", ({"density": 0.2}, "settings.json"), {})
    assert repr(calls[2:4]) == repr([("log_metrics", (row,), {"step": step}) for step, row in FLAT])
