"""The example notebooks run in a short form, and carry small outputs of a long one."""

import json
from pathlib import Path

import numpy as np
import pytest

from .notebooks import read, run

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = ["ntt_cnn.ipynb", "ntt_mlp.ipynb"]


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_kept_and_small(name):
    notebook = read(EXAMPLES / name)
    assert notebook["nbformat"] == 4 and (EXAMPLES / name).stat().st_size < 400_000
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not any(output["output_type"] == "error" for output in outputs)
    text = json.dumps(outputs)
    assert "test accuracy" in text and text.count("image/png") == 3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ntt_eqx.LayerCollapseWarning")  # so few steps cut a class off
@pytest.mark.parametrize("name", NAMES)
def test_a_short_form_runs(name):
    import matplotlib

    matplotlib.use("Agg")
    short = {"SEEDS": (0, 1), "TRANSFER_STEPS": 6, "TRAINING_STEPS": 4}
    short |= {"SYNFLOW_ROUNDS": 2, "NTK_SAP_ROUNDS": 2}
    found = run(read(EXAMPLES / name), short)
    assert [history[-1]["step"] for history in found["histories"].values()] == [6, 6]
    assert found["steps"] == [0, 1, 2, 3, 4]
    for networks in found["networks"].values():
        densities = {name: float(network.density()) for name, network in networks.items()}
        assert densities.pop("dense") == 1.0 and len(densities) == 4
        assert all(abs(density - found["DENSITY"]) < 0.001 for density in densities.values())
    assert {name: np.shape(curve) for name, curve in found["curves"].items()} == {
        name: (2, 5) for name in ("dense", "NTT", "random", "SynFlow", "NTK-SAP")
    }
