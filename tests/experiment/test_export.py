"""The command `ntt-eqx export`: a network from a run, for other programs."""

import json
import sys

import equinox as eqx
import jax
import numpy as np
import onnxruntime
import pytest
from safetensors import safe_open

import ntt_eqx as ntt
from ntt_eqx.experiment import images
from ntt_eqx.experiment.cli import main
from ntt_eqx.experiment.model_file import encode_model

HEADER = {
    "model": "lenet-300-100",
    "arguments": {"input_shape": [1, 28, 28], "num_classes": 10},
    "dataset": "fashion-mnist-mini",
    "method": "ntt",
    "scope": "layer",
    "density": 0.03,
    "seed": 0,
}


@pytest.fixture
def run(tmp_path):
    """The directory of a run, and the network in it."""
    model = ntt.models.LeNet300100(key=jax.random.key(0))
    sparse = ntt.SparseModel(model, ntt.make_mask(ntt.scores.Magnitude()(model), 0.03))
    (tmp_path / "model.eqx").write_bytes(encode_model(sparse, HEADER))
    return tmp_path, sparse


@pytest.mark.parametrize("layout", ["", "-dense"])
def test_safetensors(run, capsys, layout):
    folder, sparse = run
    assert main(["export", str(folder), "--format", f"safetensors{layout}"]) == 0
    path = folder / "model.safetensors"
    said = " ".join(capsys.readouterr().out.split())
    assert f"{path.stat().st_size:,} bytes" in said and "3 % of the weights" in said
    with safe_open(path, "np") as file:
        assert json.loads(file.metadata()["ntt_eqx"])["model"] == "lenet-300-100"
    found = ntt.export.load_safetensors(path, sparse.model)
    assert eqx.tree_equal(found, sparse.to_dense()) if layout else found.density() < 0.031


@pytest.mark.parametrize("layout", ["", "-sparse"])
def test_onnx(run, capsys, layout):
    folder, sparse = run
    out = folder / f"net{layout}.onnx"
    words = ["export", str(folder / "model.eqx"), "--format", f"onnx{layout}", "--out", str(out)]
    assert main([*words, "--no-measure"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "compacted from 266,610 to" in said and "on 64 test images" in said
    data = images.shelf_of(None)("fashion-mnist-mini")
    x = images.StandardisedSplit(data, data.test).first(9).x
    (found,) = onnxruntime.InferenceSession(out).run(None, {"x": np.asarray(x)})
    np.testing.assert_allclose(found, jax.vmap(sparse)(x), atol=1e-5)


def test_numpy(run, capsys):
    folder, sparse = run
    assert main(["export", str(folder), "--format", "numpy", "--no-compact"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "% of dense" in said and "64 samples in" in said and "compacted" not in said
    data = images.shelf_of(None)("fashion-mnist-mini")
    x = images.StandardisedSplit(data, data.test).first(9).x
    found = ntt.export.load_numpy(folder / "model.npz")(np.asarray(x))
    np.testing.assert_allclose(found, jax.vmap(sparse)(x), atol=1e-5)
    assert (folder / "numpy_runner.py").is_file()
    assert main(["export", str(folder), "--format", "numpy"]) == 2
    assert "model.npz exists" in " ".join(capsys.readouterr().err.split())


def test_what_does_not_fit_is_explained(run, capsys, monkeypatch):
    folder, _ = run
    network = str(folder / "model.eqx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    for words, message in [
        ([network, "--out", network], "is the network itself"),
        ([network, "--out", str(folder / "no" / "a")], "does not exist"),
        ([str(folder / "none.eqx")], "no such file"),
        ([network, "--format", "onnx", "--dataset", "nothing"], "unknown dataset 'nothing'"),
        ([network, "--format", "onnx"], "needs the package 'onnxruntime'"),
    ]:
        assert main(["export", *words]) == 2
        assert message in " ".join(capsys.readouterr().err.split()).replace("- ", "-")
    assert [path.name for path in folder.iterdir()] == ["model.eqx"]
