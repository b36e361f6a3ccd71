"""Two processes of four devices each give what one process of eight devices gives."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent


def found(mode, count, folder, devices=8):
    """What process 0 of `count`, which have so many devices together, found."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = dict(
        os.environ, PYTHONPATH=f"{ROOT}{os.pathsep}{HERE.parent}", JAX_PLATFORMS="cpu"
    )
    environment.pop("XLA_FLAGS", None)
    runs = [
        subprocess.Popen(
            [
                sys.executable,
                HERE / "process.py",
                mode,
                *map(str, (n, count, address, folder, devices)),
            ],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for n in range(count)
    ]
    said = [run.communicate(timeout=300)[0] for run in runs]
    assert [run.returncode for run in runs] == [0] * count, "\n".join(said)
    return json.loads((folder / "found.json").read_text())


@pytest.mark.slow
def test_same_losses(tmp_path):
    one, two = found("losses", 1, tmp_path), found("losses", 2, tmp_path)
    assert len(two["losses"]) == 50
    np.testing.assert_allclose(two["losses"], one["losses"], rtol=1e-6)
    assert two["kept"] == one["kept"]
    assert two["trace"] == pytest.approx(one["trace"], rel=1e-5)


def test_batch_of_one_process_is_refused(tmp_path):
    error = found("local", 2, tmp_path)["error"]
    assert error.startswith("transfer: the batch is an array of this process alone")


@pytest.mark.slow
def test_bare_step_loses_a_batch_of_one_process(tmp_path):
    one, two = found("raw", 1, tmp_path), found("raw", 2, tmp_path)
    assert two["losses"][0] == pytest.approx(one["losses"][0], rel=1e-6)
    assert np.isnan(two["losses"][1:]).all() and all(two["lost"])
    assert np.isfinite(one["losses"]).all() and not any(one["lost"])


@pytest.mark.slow
def test_checkpoint_of_other_numbers_of_devices(tmp_path):
    runs = [found("checkpoint", 1, tmp_path, devices) for devices in (8, 1, 4)]
    assert [run["step"] for run in runs] == [0, 3, 6]
    assert [run["read"] for run in runs[1:]] == [run["written"] for run in runs[:-1]]


@pytest.mark.slow
def test_operators(tmp_path):
    """Those of two processes with two devices each, beside one process with one device."""
    one, two = found("operator", 1, tmp_path, 1), found("operator", 2, tmp_path, 4)
    for name, expected in one.items():
        np.testing.assert_allclose(two[name], expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(two["streamed"], two["product"], rtol=1e-4, atol=1e-4)
