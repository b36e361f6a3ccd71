"""The benchmark that a GPU would run first goes through all its motions here."""

import json

import pytest
from helpers.scripts import ended


@pytest.mark.slow
def test_every_part_runs_to_its_end(tmp_path):
    out = tmp_path / "report.json"
    few = ("--densities", "0.03", "--precisions", "bfloat16")  # each takes a minute
    done = ended("on_gpu", "--dry-run", *few, "--out", out, timeout=1200)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    report = json.loads(out.read_text())
    for part in ("rates", "steps", "products", "repeats", "memory", "edges", "convolutions"):
        assert report[part] and all(row.get("ok", True) for row in report[part])
    (winners,) = [row for row in report["products"] if "implementation" not in row]
    assert winners["forward"] and winners["gradient"]


def test_without_a_gpu_it_says_so():
    done = ended("on_gpu", timeout=300)
    assert done.returncode == 1 and "--dry-run goes through the motions" in done.stderr
