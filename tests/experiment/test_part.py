"""Transfer and training on the channels between which a mask lies give what the whole gives."""

import json

import jax
import numpy as np
import pytest
from helpers.tiers import slow

import ntt_eqx as ntt
from ntt_eqx.experiment import compare, part, report, running
from ntt_eqx.experiment.cli import main
from ntt_eqx.experiment.metrics import METRICS
from ntt_eqx.experiment.model_file import load_model
from ntt_eqx.experiment.results import MODEL, TRANSFERRED

from .conftest import DATASET, run_in_pieces, tiny, watched_parts


@pytest.fixture
def found(monkeypatch):
    """Whether each network was trained by its part."""
    monkeypatch.setattr(report, "draw_figures", lambda runs, say: {})
    return watched_parts(monkeypatch, "part_in_training")


def run(out, monkeypatch, least, methods, pattern, density=0.1):
    monkeypatch.setattr(part, "_LEAST_STEPS", least)
    return compare(
        methods,
        models="tiny",
        datasets=DATASET,
        densities=density,
        seeds=(0, 1),
        scopes="layer",
        mask={"pattern": pattern},
        training={"epochs": 1.0, "batch_size": 8, "rescale": True},
        out=out,
        progress=False,
    )


@pytest.mark.parametrize("pattern", ["few-channels:1/2", slow("channels")])
def test_a_part_is_trained_as_the_whole(pattern, tmp_path, monkeypatch, found):
    density = 0.1 if pattern == "few-channels:1/2" else 0.5
    methods = ("random", "magnitude")
    one = run(tmp_path / "part", monkeypatch, 1, methods, pattern, density)
    assert len(found) == 4 and all(each is not None for each in found)
    assert all(each.compact_parameters < 0.6 * each.parameters for each in found)
    other = run(tmp_path / "whole", monkeypatch, 10**9, methods, pattern, density)
    assert not any(found[4:])
    for name in ("test_loss", "train_loss", "test_accuracy", "kept_density", "live_units"):
        np.testing.assert_allclose(one[name], other[name], rtol=1e-4, atol=1e-4)
    for folder, second in zip(one.folder, other.folder, strict=True):
        models = [load_model(tmp_path / f / MODEL).model for f in (folder, second)]
        assert all(isinstance(model, ntt.SparseModel) for model in models)
        for a, b in zip(*map(jax.tree.leaves, (m.mask for m in models)), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("methods", [("gmp",), slow(("rigl", "set", "lottery-ticket"))])
def test_masks_that_change_are_those_of_the_whole(methods, tmp_path, monkeypatch, found):
    pattern = "few-channels:1/2"
    one = run(tmp_path / "part", monkeypatch, 1, methods, pattern)
    assert len(found) == 2 * len(methods) and all(each is not None for each in found)
    other = run(tmp_path / "whole", monkeypatch, 10**9, methods, pattern)
    np.testing.assert_array_equal(one.kept_density, other.kept_density)
    same = one.method != "set"  # which grows other weights
    np.testing.assert_allclose(one.test_loss[same], other.test_loss[same], rtol=1e-3)


@pytest.mark.parametrize(
    ("method", "pattern"), [("gmp", "channels"), ("random", None), ("random", "filters")]
)
def test_others_are_trained_whole(method, pattern, tmp_path, monkeypatch, found):
    run(tmp_path, monkeypatch, 1, (method,), pattern)
    assert len(found) == 2 and not any(found)


@pytest.mark.parametrize("first", ["magnitude", slow("synflow")])
def test_a_transfer_to_a_part_is_that_to_the_whole(first, tmp_path, monkeypatch):
    def transferred(out):
        return compare(
            ("ntt",),
            models="tiny",
            datasets=DATASET,
            densities=0.1,
            seeds=(0, 1),
            mask={"pattern": "few-channels:1/2"},
            transfer={"epochs": 2.0, "batch_size": 8, "mask_every": 3, "initial_mask": first},
            training={"epochs": 0.5, "batch_size": 8},
            out=out,
            progress=False,
        )

    monkeypatch.setattr(report, "draw_figures", lambda runs, say: {})
    parts = watched_parts(monkeypatch, "part_in_transfer")
    one = transferred(tmp_path / "part")
    assert len(parts) == 2 and all(
        each.compact_parameters < 0.6 * each.parameters for each in parts
    )
    monkeypatch.setattr(running, "part_in_transfer", lambda *arguments: None)
    other = transferred(tmp_path / "whole")
    for name in ("kernel_distance", "target_distance", "test_loss", "kept_density", "live_units"):
        np.testing.assert_allclose(one[name], other[name], rtol=1e-4, atol=1e-5)
    densities = []
    for folder in (*one.folder, *other.folder):
        rows = map(json.loads, (tmp_path / folder / METRICS).read_text().splitlines())
        logged = [row for row in rows if row["phase"] == "transfer" and "train" in row]
        densities.append([row["train"]["density"] for row in logged])
    np.testing.assert_allclose(densities[:2], densities[2:], rtol=1e-6)
    for pair in zip(one.folder, other.folder, strict=True):
        found, whole = (load_model(tmp_path / folder / TRANSFERRED).model for folder in pair)
        for a, b in zip(*map(jax.tree.leaves, (found, whole)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", [slow("random"), slow("rigl"), slow("ntt")])
def test_an_interrupted_run_of_a_part_gives_the_same_bits(method, tmp_path, monkeypatch, found):
    monkeypatch.setattr(part, "_LEAST_STEPS", 1)
    options = tiny("--methods", method, "--scopes", "layer", "--densities", "0.1", "--seeds", "0")
    words = ["compare", *options, "--mask.pattern", "few-channels:1/2", "--out"]
    assert main([*words, str(tmp_path / "whole")]) == 0
    run_in_pieces([*words, str(tmp_path / "cut")], monkeypatch, every=7)
    assert found and all(each is not None for each in found)
    (one,), (two,) = ((tmp_path / n / "cells").glob("*/" + MODEL) for n in ("whole", "cut"))
    for a, b in zip(*(jax.tree.leaves(load_model(p).model) for p in (one, two)), strict=True):
        np.testing.assert_array_equal(a, b)
