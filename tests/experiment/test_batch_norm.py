"""Networks with batch norm from the command: every method, by a recipe, resumed, evaluated."""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ntt_eqx as ntt
from ntt_eqx.data import load_dataset
from ntt_eqx.experiment import running
from ntt_eqx.experiment.cells import random_key
from ntt_eqx.experiment.cli import main
from ntt_eqx.experiment.model_file import load_model
from ntt_eqx.models import MODELS

from .conftest import DATASET, run_in_pieces, tiny, watched_parts
from .test_cli import read, stable

METHODS = ("ntt", "snip", "ntk-sap", "gmp", "rigl", "dense")
RECIPE = [
    *("--training.optimizer", "sgd", "--training.momentum", "0.9", "--training.nesterov"),
    *("--training.schedule", "steps", "--training.milestones", "0.4", "0.8"),
    *("--training.weight-decay", "1e-3", "--training.learning-rate", "0.05"),
    *("--training.warm-up", "0.1", "--training.label-smoothing", "0.1"),
    *("--training.ema", "0.8", "--training.crop", "2", "--training.flip"),
]


class Normed(eqx.Module):
    hidden: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    output: eqx.nn.Linear

    def __init__(self, input_shape=(1, 28, 28), num_classes=10, *, key):
        one, two = jax.random.split(key)
        self.hidden = eqx.nn.Linear(int(np.prod(input_shape)), 6, key=one)
        self.norm = eqx.nn.BatchNorm(6, "batch", momentum=0.9, mode="batch")
        self.output = eqx.nn.Linear(6, num_classes, key=two)

    def __call__(self, x, state):
        h, state = self.norm(self.hidden(x.reshape(-1)), state)
        return self.output(jax.nn.relu(h)), state


@pytest.fixture(autouse=True)
def normed(monkeypatch):
    build = lambda *a, **k: ntt.StatefulModel(*eqx.nn.make_with_state(Normed)(*a, **k))
    monkeypatch.setitem(MODELS, "normed", build)


def command(out):
    words = [word if word != "tiny" else "normed" for word in tiny("--methods", *METHODS)]
    return ["compare", "--out", str(out), *words, "--densities", "0.2", *RECIPE]


def test_a_network_is_inspected_beside_its_warm_initialisation(tmp_path, capsys):
    words = ["--dataset", DATASET, "--model", "normed", "--method", "dense", "--out", str(tmp_path)]
    still = ["--training.epochs", "0.1", "--training.learning-rate", "1e-12"]
    assert main(["train", *words, *still, "--training.batch-size", "8"]) == 0
    capsys.readouterr()
    assert main(["inspect", str(tmp_path), "--inputs", "4", "--json"]) == 0
    kernel = json.loads(capsys.readouterr().out)
    start = MODELS["normed"](key=random_key(0, 0), num_classes=2)
    images = load_dataset(DATASET)
    moments = {"mean": images.mean, "std": images.std}
    warm = ntt.warm_up(start, ntt.data.as_batch(images.train, **moments).x)  # all of them
    x = ntt.data.as_batch(images.test[:4], **moments).x
    wanted = ntt.compare_kernels(load_model(tmp_path / "model.eqx").model, warm, x)
    np.testing.assert_allclose(
        kernel["kernel_distance"], wanted.numbers["kernel_distance"], rtol=1e-4
    )


@pytest.mark.slow
def test_a_transfer_to_few_channels_is_that_to_the_whole(tmp_path, monkeypatch):
    words = tiny("--methods", "ntt", "--densities", "0.1", "--mask.pattern", "few-channels:1/2")
    words = ["compare", *(word if word != "tiny" else "normed" for word in words), "--out"]
    parts = watched_parts(monkeypatch, "part_in_transfer")
    assert main([*words, str(tmp_path / "part")]) == 0
    assert parts[0].compact_parameters < 0.6 * parts[0].parameters
    monkeypatch.setattr(running, "part_in_transfer", lambda *arguments: None)
    assert main([*words, str(tmp_path / "whole")]) == 0
    (one,), (two,) = (read(tmp_path / name / "results.json") for name in ("part", "whole"))
    for name in ("kernel_distance", "target_distance", "test_loss", "kept_density"):
        np.testing.assert_allclose(one[name], two[name], rtol=1e-3)


@pytest.mark.slow
def test_a_comparison_cut_anywhere_ends_with_the_same_bits(tmp_path, monkeypatch):
    assert main(command(tmp_path / "whole")) == 0
    run_in_pieces(command(tmp_path / "cut"), monkeypatch, every=25)
    whole, cut = (stable(read(tmp_path / name / "results.json")) for name in ("whole", "cut"))
    assert cut == whole and len(whole) == len(METHODS)
    files = sorted((tmp_path / "whole").glob("cells/*/model.eqx"))
    assert len(files) == len(METHODS)
    for path in files:
        twin = tmp_path / "cut" / path.relative_to(tmp_path / "whole")
        assert twin.read_bytes() == path.read_bytes()
    model, header = load_model(files[0])
    assert main(["evaluate", str(files[0])]) == 0
    norm = model.model.model.norm
    mean, _ = model.model.state.get(norm.batch_state_index)
    assert bool(jnp.any(mean != 0)) and not norm.inference
