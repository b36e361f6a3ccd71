"""A benchmark script run in a process of its own, on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def ended(name, *arguments, timeout=600):
    """What `benchmarks/NAME.py` came to, with its status and all that it printed."""
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / f"{name}.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        check=False,
    )
