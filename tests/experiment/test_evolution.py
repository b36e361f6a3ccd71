"""Output evolution: the distances by hand, the command from end to end, cut and gone on with."""

import json
import os
import signal

import numpy as np
import pytest

from ntt_eqx.experiment import trajectories
from ntt_eqx.experiment.cli import main
from ntt_eqx.experiment.trajectories import (
    Trajectories,
    principal_axes,
)

from .conftest import DATASET

COMMAND = [
    *("evolution", "--dataset", DATASET, "--model", "tiny", "--density", "0.2"),
    *("--transfer.epochs", "2", "--transfer.batch-size", "8", "--transfer.held-out", "0.05"),
    *("--evolution.steps", "11", "--evolution.snapshots", "5", "--evolution.inputs", "6"),
    *("--evolution.kernel-inputs", "4"),
]


def fabricated():
    time = np.linspace(0, 1, 6)
    dense = np.stack([np.stack([time, -time], -1), np.stack([2 * time, 0 * time], -1)], 1)
    return Trajectories(np.arange(6), {"dense": dense, "ntt": dense + 0.5, "random": 0 * dense})


def test_distances_are_root_mean_squares():
    found = fabricated()
    np.testing.assert_allclose(found.distances("ntt"), 0.5)
    assert found.length() == pytest.approx(np.sqrt(6 / 4))
    np.testing.assert_allclose(found.distances("random"), np.sqrt(6 / 4) * np.linspace(0, 1, 6))


def test_the_plane_keeps_distances_of_points_that_lie_in_it():
    found = fabricated()
    plane, shares = principal_axes(found)
    assert sum(shares) == pytest.approx(1)
    for name in ("ntt", "random"):
        far = np.linalg.norm(plane[name] - plane["dense"], axis=1)
        np.testing.assert_allclose(far, 2 * found.distances(name), atol=1e-12)


def test_trajectories_are_plain_arrays_in_files(tmp_path):
    path = tmp_path / "a.npz"
    path.write_bytes(fabricated().encode())
    with np.load(path, allow_pickle=False) as again:
        np.testing.assert_array_equal(again["steps"], fabricated().steps)
        np.testing.assert_array_equal(again["ntt"], fabricated().outputs["ntt"])


@pytest.mark.slow
def test_the_command_goes_on_where_it_was_cut(tmp_path, capsys, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main([*COMMAND, "--out", str(whole)]) == 0
    said = capsys.readouterr().out
    assert "mean distance to dense of ntt, divided by that of random: " in said
    report = json.loads((whole / "evolution.json").read_text())
    assert report["steps"] == [0, 2, 4, 6, 8, 10, 11]
    assert report["ratio"] > 0 and set(report["distances"]) == {"ntt", "random"}
    assert 0 <= report["kernels"]["ntt"]["kernel_alignment"] <= 1
    found = np.load(whole / "evolution.npz", allow_pickle=False)
    assert found["dense"].shape == (7, 6, 2) and np.all(found["ntt"][-1] != 0)
    names = {path.name for path in (whole / "figures").iterdir()}
    assert names == {"evolution.png", "evolution.svg", "spectrum.png", "spectrum.svg"}

    train, steps = trajectories._train_all, []

    def cutting(*arguments):
        steps.append(1)
        if len(steps) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return train(*arguments)

    monkeypatch.setattr(trajectories, "_train_all", cutting)
    assert main([*COMMAND, "--out", str(cut)]) == 130
    assert main([*COMMAND, "--out", str(cut)]) == 0
    assert len(steps) == 11
    assert (cut / "evolution.npz").read_bytes() == (whole / "evolution.npz").read_bytes()
    assert main([*COMMAND, "--seed", "3", "--out", str(cut)]) == 2
    assert "another configuration" in capsys.readouterr().err

    assert main(["inspect", str(whole / "transfer"), "--inputs", "4"]) == 0
    said = capsys.readouterr().out
    assert "hidden.weight" in said and "CKA" in said and "multiply-adds a sample" in said
    assert main(["inspect", str(whole / "random"), "--inputs", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    kernel = report["kernels"]["random"]
    assert found["kernel_distance"] == pytest.approx(kernel["kernel_distance"], rel=1e-4)
    assert [layer["name"] for layer in found["layers"]] == ["hidden.weight", "output.weight"]
    assert main(["inspect", str(tmp_path / "none.eqx")]) == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--evolution.steps", "0"], "evolution.steps: 0 must be"),
        (["--evolution.learning-rate", "-1"], "--evolution.learning-rate: -1.0"),
        (["--density", "2"], "densities: 2.0"),
        (["--dataset", "mnits"], "unknown dataset 'mnits'"),
    ],
)
def test_wrong_options_are_explained(more, message, capsys, tmp_path):
    assert main([*COMMAND, "--out", str(tmp_path / "x"), *more]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "x").exists()
