"""Draw `docs/figures/sparsity.png` from the raw results, as `ntt-eqx report` draws a run.

    python benchmarks/make_figures.py

The other figures need the curves of their runs, which are too large to keep here: copy them from
the run that the page names.
"""

import json
import shutil
import tempfile
from pathlib import Path

from ntt_eqx.experiment.cli import main

ROOT = Path(__file__).parents[1]
FIGURE = ROOT / "docs" / "figures" / "sparsity.png"


def draw(results: list[dict], figure: Path) -> None:
    """The figure of accuracy against sparsity of `results`, as a PNG."""
    with tempfile.TemporaryDirectory() as folder:
        for number, result in enumerate(results):
            cell = Path(folder) / "cells" / f"{number:04}"
            cell.mkdir(parents=True)
            for name in ("config", "result"):
                (cell / f"{name}.json").write_text(json.dumps({"fingerprint": "", **result}))
        if main(["report", folder, "--out", f"{folder}/report"]) != 0:
            raise SystemExit("the report failed")
        shutil.copyfile(Path(folder) / "report" / "figures" / "sparsity.png", figure)


if __name__ == "__main__":
    raw = ROOT / "benchmarks" / "results" / "fashion_mnist_sparsity.json"
    draw(json.loads(raw.read_text()), FIGURE)
