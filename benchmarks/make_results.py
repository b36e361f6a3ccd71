"""Make docs/results, and the table of the README, from the raw results.

    python benchmarks/make_results.py
    python benchmarks/make_results.py --collect mnist_notebooks runs/notebooks

The first makes the pages, each of a text and numbers in benchmarks/pages/results; the second puts
runs with their curves among the raw results before.
"""

import argparse
import json
import pathlib
import re
from typing import Any

from pages.results import PAGES, index, text
from pages.results.raw import RAW, claim

ROOT = pathlib.Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "results"
README = ROOT / "README.md"


def collect(name: str, *runs: pathlib.Path) -> None:
    """Write the results of runs with their curves: `[steps, kernel, target]`, `[steps, %]`."""
    results = []
    for path in sorted(path for run in runs for path in (run / "cells").glob("*/result.json")):
        result = json.loads(path.read_text())
        lines = (path.parent / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        results.append(result)
        result["lost_classes"] = lost_classes(path.with_name("model.eqx"))
        config = json.loads(path.with_name("config.json").read_text())
        if transfer := config["transfer"]:
            result["transfer"] = transfer
        if training := config["training"]:
            result["training"] = training
        if labels := (training or {}).get("labels"):
            result["labels"] = labels
        result["transfer_curve"] = [
            [row["step"], *(row["validation"][f"{d}_distance"] for d in ("kernel", "target"))]
            for row in rows
            if row["phase"] == "transfer"
            and row["step"] in (0, 100, 1000, 5000, 10000, result["transfer_steps"])
        ]
        result["accuracy_curve"] = [
            [row["step"], round(100 * row["test"]["accuracy"], 2)]
            for row in rows
            if row["phase"] == "train"
        ]
    (RAW / f"{name}.json").write_text(json.dumps(results) + "\n")


def lost_classes(network: pathlib.Path) -> int:
    """The outputs that no input reaches, of a network whose layers follow one another.

    A feature of a convolution is reached where any of its weights is kept, and all of its positions
    are with it. Of other networks, in which ways meet, the outputs without a weight of their own.
    """
    import jax
    import numpy as np

    from ntt_eqx.experiment.model_file import load_model

    model = load_model(network).model
    masks = [np.asarray(mask) for mask in jax.tree.leaves(model.mask)]
    if type(model.model).__name__ not in ("LeNet300100", "LeNet5", "Conv4", "VGG11"):
        return int((~masks[-1].any(axis=1)).sum())
    reached: np.ndarray = np.ones(1, bool)
    for mask in masks:
        kept: Any = mask.reshape(*mask.shape[:2], -1).any(axis=2)
        reached = (kept & np.repeat(reached, kept.shape[1] // len(reached))).any(axis=1)
    return int((~reached).sum())


def readme() -> str:
    """The README with its table filled in, between two lines that mark its place."""
    begin, end = "<!-- made by benchmarks/make_results.py -->", "<!-- end -->"
    pattern = re.compile(f"{re.escape(begin)}\n.*?{re.escape(end)}", re.DOTALL)
    filled = f"{begin}\n\n{index.facts()['readme_table']}\n\n{end}"
    text, count = pattern.subn(lambda _: filled, README.read_text())
    claim(count == 1, f"{begin} ... {end} stand once in the README")
    return text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make docs/results from the raw results.")
    parser.add_argument(
        "--collect", nargs="+", metavar="NAME RUN", help="put runs among the raw results first"
    )
    if given := parser.parse_args().collect:
        collect(given[0], *map(pathlib.Path, given[1:]))
    for name in PAGES:
        (FOLDER / f"{name}.md").write_text(text(name))
    README.write_text(readme())
    print(f"wrote {len(PAGES)} pages of {FOLDER} and the table of {README}")
