"""Workers that submitit starts."""

import json

import pytest

from ntt_eqx.experiment.cli import main

from .conftest import same_bits

pytest.importorskip("submitit")
TINY = [
    *("--datasets", "fashion-mnist-mini:0,1:40", "--methods", "random", "dense", "--seeds", "0"),
    *("--training.epochs", "1", "--training.batch-size", "8"),
]


@pytest.mark.slow
def test_local_workers_make_what_one_process_makes(tmp_path, monkeypatch):
    for name, value in same_bits().items():
        monkeypatch.setenv(name, value)
    alone, many = tmp_path / "alone", tmp_path / "many"
    assert main(["compare", *TINY, "--out", str(alone)]) == 0
    assert main(["compare", *TINY, "--out", str(many), "--launch", "local"]) == 0
    results = [
        [
            {k: v for k, v in result.items() if not k.endswith("seconds")}
            for result in json.loads((out / "results.json").read_text())
        ]
        for out in (alone, many)
    ]
    assert results[0] == results[1]
    assert len(list((many / "jobs").glob("*_result.pkl"))) == 2


@pytest.mark.parametrize("options", [["--job", "gpu"], ["--workers", "0"], ["--job", "gpus=1"]])
def test_launches_that_cannot_be_are_refused(tmp_path, capsys, options):
    words = ["compare", *TINY, "--out", str(tmp_path), "--launch", "local", *options]
    assert main(words) == 2
    assert "launch: " in capsys.readouterr().err
