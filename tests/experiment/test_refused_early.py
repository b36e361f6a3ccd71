"""Impossible requests are refused before a folder is made, in the words of the command."""

import json
import re

import numpy as np
import pytest

from ntt_eqx.data import load_dataset
from ntt_eqx.experiment import report
from ntt_eqx.experiment.cli import main

from .conftest import DATASET, tiny

CODE = """
import equinox as eqx, jax

class Few(eqx.Module):
    weight: jax.Array

    def __init__(self, *, key):
        self.weight = jax.random.normal(key, (1, 784))

    def __call__(self, x):
        return self.weight @ x.reshape(-1)

class Broken(Few):
    def __call__(self, x):
        return self.nothing
"""


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    monkeypatch.setattr(report, "draw_figures", lambda runs, say: {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--training.momentum 0.9", "--training.momentum=0.9 does nothing without --training.opt"),
        ("--training.schedule steps --training.warm-up 0.7", "--training.milestones must rise"),
        ("--transfer.batch-size 7", "--transfer.batch-size: 7 is odd"),
        ("--training.labels 4", "--training.batch-size: .* does not fit into 4"),
        ("--models lenet-5 --datasets npy:{folder}", "lenet-5 cannot take .* shape .1, 8, 8.: .*"),
        ("--models {code}:Few", "mine.py:Few cannot take .*returns .1., not a logit for each of 2"),
        ("--models {code}:Broken", r"no attribute 'nothing' \(.*mine.py, line 15\)"),
        ("--methods ntt --transfer.dataset npy:{folder}", "--transfer.dataset: .*both must suit"),
    ],
)
def test_before_anything_is_made(options, message, tmp_path, capsys):
    folder, code, out = tmp_path / "small", tmp_path / "mine.py", tmp_path / "out"
    folder.mkdir()
    for part in ("train", "test"):
        np.save(folder / f"{part}_x.npy", np.random.default_rng(0).normal(size=(20, 1, 8, 8)))
        np.save(folder / f"{part}_y.npy", np.arange(20) % 2)
    code.write_text(CODE)
    words = ["--methods", "random", "--densities", "0.5"]
    words += options.format(folder=folder, code=code).split()
    assert main(["compare", *tiny(*words), "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("ntt-eqx: ") and not out.exists()
    assert re.search(message, said), said


def test_the_config_of_a_comparison_is_its_settings(tmp_path, capsys):
    words = ["compare", *tiny("--methods", "random", "--seeds", "4", "--densities", "0.5")]
    assert main([*words, "--out", str(tmp_path / "one")]) == 0
    config = tmp_path / "one" / "config.json"
    again = ["compare", "--config", str(config), "--out", str(tmp_path / "one"), "--plan-only"]
    capsys.readouterr()
    assert main(again) == 0
    assert "1 networks, 1 of them done already" in capsys.readouterr().out
    config = tmp_path / "preset.json"
    config.write_text('{"preset": "paper"}')
    assert main(["compare", "--config", str(config), "--plan-only"]) == 2
    assert "unknown field 'preset'" in capsys.readouterr().err


def test_failed_networks_are_told_below_the_table(tmp_path):
    out = tmp_path / "out"
    diverging = ["--training.optimizer", "sgd", "--training.learning-rate", "1e30"]
    methods = ("--methods", "random", "random@erk", "snip")
    words = tiny(*methods, "--seeds", "0", "1", "--densities", "0.5")
    assert main(["compare", *words, *diverging, "--out", str(out)]) == 1
    failed = "Failed, and not in the table: "
    place = f"{DATASET}, tiny, 0.5"
    line = f"{failed}{place}, random, per layer, seed 0, 1; {place}, random, ERK, seed 0, 1; "
    line += f"{place}, SNIP, global, seed 0, 1."
    assert line in (out / "table.md").read_text()


@pytest.fixture(scope="module")
def dimmed(tmp_path_factory):
    """A folder with the images of the data set in fainter and brighter pixels."""
    folder, images = tmp_path_factory.mktemp("dimmed"), load_dataset(DATASET)
    for part, split in (("train", images.train), ("test", images.test)):
        np.save(folder / f"{part}_x.npy", split.x // 4 + 150)
        np.save(folder / f"{part}_y.npy", split.y)
    return folder


def test_other_images_are_standardised_as_those_of_the_training(dimmed, tmp_path, capsys):
    words = tiny("--methods", "dense", "--training.epochs", "20")
    assert main(["compare", *words, "--out", str(tmp_path / "out")]) == 0
    (network,) = (tmp_path / "out" / "cells").iterdir()

    def accuracy(*options):
        capsys.readouterr()
        assert main(["evaluate", str(network), "--json", *options]) == 0
        return json.loads(capsys.readouterr().out)["test_accuracy"]

    result = json.loads((network / "result.json").read_text())
    assert accuracy() == accuracy("--dataset", DATASET) == result["test_accuracy"] > 0.9
    assert accuracy("--dataset", f"npy:{dimmed}") < accuracy() - 0.05  # they are not the same
    assert main(["evaluate", str(network), "--model", "lenet-5"]) == 2
    assert "is a tiny, not a lenet-5" in capsys.readouterr().err
