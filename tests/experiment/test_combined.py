"""Several folders in one report, and options that contradict what they are given beside."""

import json

import equinox as eqx
import pytest

from ntt_eqx.experiment import report
from ntt_eqx.experiment.cli import main
from ntt_eqx.experiment.model_file import load_model

from .conftest import DATASET, tiny


@pytest.fixture
def compared(tmp_path, monkeypatch):
    """The folders of two comparisons that share their dense network."""
    monkeypatch.setattr(report, "draw_figures", lambda runs, say: {})
    for name in ("random", "snip"):
        methods = ("--methods", name, "dense", "--seeds", "0", "--densities", "0.5")
        assert main(["compare", *tiny(*methods), "--out", str(tmp_path / name)]) == 0
    return tmp_path / "random", tmp_path / "snip"


def test_a_network_of_two_folders_counts_once(compared, tmp_path, capsys):
    assert main(["report", *map(str, compared), "--out", str(tmp_path / "both")]) == 0
    assert "is a network that another folder has" in capsys.readouterr().out
    found = json.loads((tmp_path / "both" / "results.json").read_text())
    assert sorted(r["method"] for r in found) == ["dense", "random", "snip"]


def test_a_network_of_a_file_is_not_pruned_again(compared, tmp_path, capsys):
    (start,) = (compared[0] / "cells").glob("*random*")
    words = ["train", "--start", str(start), "--dataset", DATASET, "--training.batch-size", "8"]
    for extra in ("--method snip", "--density 0.4", "--scope global", "--mask.pattern 2:4"):
        out = ["--out", str(tmp_path / "again")]
        assert main([*words, *extra.split(), *out]) == 2
        assert "--start trains the one" in capsys.readouterr().err
    assert main([*words, "--out", str(tmp_path / "again")]) == 0


def test_a_density_of_a_network_that_keeps_every_weight_is_refused(tmp_path, capsys):
    words = ["train", "--dataset", DATASET, "--method", "dense", "--out", str(tmp_path / "one")]
    assert main([*words, "--density", "0.5"]) == 2
    assert "--density: dense keeps every weight" in capsys.readouterr().err


def test_a_network_of_a_file_stays_what_it_is(tmp_path, monkeypatch, capsys):
    """Its seed, its shares and its pattern; seeds of one origin are one row of a table."""
    monkeypatch.setattr(report, "draw_figures", lambda runs, say: {})
    origin = [*tiny("--methods", "random@erk", "--seeds", "3", "4", "--densities", "0.5")]
    origin += ["--mask.ablation", "shares", "--mask.pattern", "block:1x2"]
    assert main(["compare", *origin, "--out", str(tmp_path / "origin")]) == 0
    starts = sorted((tmp_path / "origin" / "cells").glob("*random*"))
    words = ["train", "--dataset", DATASET, "--training.batch-size", "8"]
    for n, start in enumerate(starts):
        out = tmp_path / f"again{n}"
        assert main([*words, "--start", str(start), "--out", str(out)]) == 0
        mask = [load_model(path / "model.eqx").model.mask for path in (start, out)]
        assert eqx.tree_equal(*mask)
        found, old = (json.loads((path / "result.json").read_text()) for path in (out, start))
        same = ("method", "scope", "mask", "density", "seed", "kept_density", "densities")
        assert {name: found[name] for name in same} == {name: old[name] for name in same}
    again = [str(tmp_path / f"again{n}") for n in range(2)]
    assert main(["report", *again, "--out", str(tmp_path / "report")]) == 0
    (row,) = (tmp_path / "report" / "table.csv").read_text().splitlines()[1:]
    assert ',erk,0.5,"block:1x2, shares",,0.501' in row and ",2," in row  # and no settings
    other = [*words, "--start", str(starts[0]), "--model", "lenet-5", "--out", str(tmp_path / "p")]
    assert main(other) == 2
    assert "--model is lenet-5, and --start trains the tiny" in capsys.readouterr().err


def test_a_batch_that_does_not_fit_is_refused_in_the_plan(tmp_path, capsys):
    options = ("--methods", "random", "--densities", "0.5", "--training.labels", "4", "--plan-only")
    assert main(["compare", *tiny(*options), "--out", str(tmp_path)]) == 2
    assert "a batch of 8 images does not fit into 4" in capsys.readouterr().err


def test_layers_that_a_training_empties_are_told(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report, "draw_figures", lambda runs, say: {})
    options = ("--methods", "gmp@global", "--seeds", "0", "--densities", "0.001")
    assert main(["compare", *tiny(*options), "--out", str(tmp_path)]) == 0
    assert "layer collapse" in capsys.readouterr().out
