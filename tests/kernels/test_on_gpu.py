"""The benchmark that a GPU would run first goes through all its motions here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "on_gpu.py"


@pytest.mark.slow
def test_every_part_runs_to_its_end(tmp_path):
    out = tmp_path / "report.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--dry-run", "--out", str(out)],
        capture_output=True,
        text=True,
        timeout=1200,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    report = json.loads(out.read_text())
    for part in ("rates", "steps", "products", "repeats", "memory", "edges", "convolutions"):
        assert report[part] and all(row.get("ok", True) for row in report[part])
    (winners,) = [row for row in report["products"] if "implementation" not in row]
    assert winners["forward"] and winners["gradient"]


def test_without_a_gpu_it_says_so():
    done = subprocess.run(
        [sys.executable, str(SCRIPT)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        check=False,
    )
    assert done.returncode == 1 and "--dry-run goes through the motions" in done.stderr
