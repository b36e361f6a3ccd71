"""The benchmark of the kernels runs, in every pass, and its rows say what was timed."""

import json

import pytest
from helpers.scripts import ended

SHORT = ["--cases", "lenet300100", "-n", "2", "--repeats", "3", "--seconds", "0.1"]


def rows_of(tmp_path, *options):
    out = tmp_path / "rows.json"
    done = ended("ntk_throughput", *SHORT, *options, "--json", out)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    return json.loads(out.read_text())["rows"]


@pytest.mark.slow
def test_speed_ups_are_against_ntk_vector_products(tmp_path):
    rows = rows_of(tmp_path, "--kernels", "active", "--passes", "forward")
    by = ["factors", "jacobian", "ntk_vector_products"]
    assert [row["implementation"] for row in rows] == by
    for row in rows:
        assert row["speedup"] == rows[-1]["median_s"] / row["median_s"] and row["gflops_per_s"] > 0


@pytest.mark.slow
def test_steps_of_a_run_on_two_devices(tmp_path):
    options = ["--kernels", "active", "--passes", "step", "run", "--implementations", "factors"]
    rows = rows_of(tmp_path, *options, "--devices", "2")
    assert [(row["pass"], row["devices"]) for row in rows] == [("step", 2), ("run", 2)]
    for row in rows:
        assert 0 < row["p10_s"] <= row["median_s"] <= row["p90_s"] < row["compile_s"]
