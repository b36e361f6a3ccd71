"""The example notebooks run in a short form, and carry small outputs of a long one."""

import json
from pathlib import Path

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
    short = {"TRANSFER_STEPS": 6, "TRAINING_STEPS": 4}
    found = run(read(EXAMPLES / name), short)
    assert found["history"][-1]["step"] == 6
    assert abs(float(found["student"].density()) - 0.03) < 0.001
    assert {name: curve[-1][0] for name, curve in found["curves"].items()} == {
        "dense": 4,
        "NTT": 4,
        "random": 4,
    }
