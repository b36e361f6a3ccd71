"""One command, carried out by two processes together."""

import json
import os
import signal
import socket
import subprocess
import time

import numpy as np
import pytest

pytest.importorskip("tyro")
from experiment.conftest import own_process, tiny


def start(*words, together=1):
    """So many processes, of four devices together, that are given the same command."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    words, options = own_process(*words)
    options["env"] |= {
        "JAX_NUM_CPU_DEVICES": str(4 // together),
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(together),
    }
    options |= {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    numbered = lambda n: {**options, "env": {**options["env"], "JAX_PROCESS_ID": str(n)}}
    return [subprocess.Popen(words, **numbered(n)) for n in range(together)]


def end(runs, status=0):
    """What they said, once all have ended with this status."""
    try:
        said = [run.communicate(timeout=200)[0] for run in runs]
    finally:
        for run in runs:
            run.kill()
            run.communicate()
    assert [run.returncode for run in runs] == [status] * len(runs), "\n".join(said)
    return said


@pytest.mark.slow
def test_two_processes_make_what_one_makes(tmp_path):
    compare = ["compare", *tiny("--methods", "ntt", "snip", "dense", "--densities", "0.2")]
    alone, both = tmp_path / "alone", tmp_path / "both"
    end(start(*compare, "--devices", "all", "--out", str(alone)))
    first, second = end(start(*compare, "--devices", "hosts", "--out", str(both), together=2))
    assert "results:" in first and "results:" not in second
    one, two = (json.loads((out / "results.json").read_text()) for out in (alone, both))
    assert [r["fingerprint"] for r in one] == [r["fingerprint"] for r in two] and len(one) == 3
    for name in ("test_loss", "train_loss", "test_accuracy", "kernel_distance", "kept_density"):
        values = [[r[name] or 0.0 for r in results] for results in (one, two)]
        np.testing.assert_allclose(*values, rtol=1e-4, err_msg=name)
    rows = [sorted(out.glob("cells/*/metrics.jsonl")) for out in (alone, both)]
    assert [len(p.read_text().splitlines()) for p in rows[0]] == [
        len(p.read_text().splitlines()) for p in rows[1]
    ]
    first, second = end(start(*compare, "--devices", "hosts", "--out", str(both), together=2))
    assert "3 of them done already" in first and "done" not in second


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_and_nothing_is_lost(tmp_path):
    words = ["train", "--dataset", "fashion-mnist-mini:0,1:40", "--model", "tiny"]
    words += ["--density", "0.2"]
    words += ["--training.batch-size", "8", "--training.epochs", "50"]
    words += ["--devices", "hosts", "--out", str(tmp_path / "run")]
    runs = start(*words, together=2)
    rows = tmp_path / "run" / "metrics.jsonl"
    while not rows.exists() or len(rows.read_text().splitlines()) < 3:
        assert all(run.poll() is None for run in runs)
        time.sleep(0.05)
    runs[1].send_signal(signal.SIGTERM)
    end(runs, 128 + signal.SIGINT)
    done = len(rows.read_text().splitlines())
    said, _ = end(start(*words, together=2))
    assert "continuing at step" in said
    steps = [json.loads(line)["step"] for line in rows.read_text().splitlines()]
    assert 3 <= done < len(steps) and steps == sorted(set(steps))


def test_a_process_alone_is_told_how_to_find_the_others(tmp_path):
    words, options = own_process("train", "--devices", "hosts", "--out", str(tmp_path))
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    options["env"] = {k: v for k, v in os.environ.items() if k not in names}
    run = subprocess.run(words, check=False, **options)
    assert run.returncode == 2 and run.stderr.count("\n") == 1, run.stderr
    assert "set JAX_COORDINATOR_ADDRESS" in run.stderr
