"""Accuracy and milliseconds of masks in several patterns: LeNet-5 on Fashion-MNIST.

    taskset -c 0 python benchmarks/patterns.py --out runs/patterns --json patterns.json

Networks are pruned by magnitude before training in each pattern at some densities, and trained
(`ntt.experiment.compare`: an interrupted command goes on). Then each is compacted, exported, and
timed on 64 and on one of the test images in the NumPy runner and in onnxruntime, in turn with the
dense network in onnxruntime; the faster runner counts. `--figure FILE` draws test error against
milliseconds.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np

import ntt_eqx as ntt
from ntt_eqx.experiment.figures import new_figure, plain_decades, render_figure
from ntt_eqx.experiment.model_file import load_model
from ntt_eqx.experiment.results import MODEL
from ntt_eqx.export._format import timed
from ntt_eqx.export._numpy import SPARSE_BELOW, Numpy
from ntt_eqx.export._onnx import Onnx

LOOKS = {  # pattern -> (label, colour, marker)
    "scattered": ("scattered", "#0072B2", "o"),
    "fan-in": ("constant fan-in", "#56B4E9", "v"),
    "fan-in:16": ("fan-in shared by 16", "#009E73", "s"),
    "2:4": ("2:4", "#CC79A7", "*"),
    "filters": ("filters", "#E69F00", "^"),
    "channels": ("coupled channels", "#D55E00", "D"),
}
DENSITIES = {
    "scattered": (0.01, 0.03, 0.1, 0.3),
    "fan-in": (0.03, 0.1, 0.3),
    "fan-in:16": (0.03, 0.1, 0.3),
    "2:4": (0.5,),
    "filters": (0.1, 0.25, 0.5),
    "channels": (0.1, 0.25, 0.5),
}
RUNNERS = {"numpy": Numpy(SPARSE_BELOW), "onnxruntime": Onnx()}


def trained(options: argparse.Namespace) -> list[tuple[str, Any]]:
    """Pattern and row of each network, the dense ones first."""
    found = []
    for pattern, densities in DENSITIES.items():
        frame = ntt.experiment.compare(
            ["magnitude", "dense"] if pattern == "scattered" else "magnitude",
            models="lenet-5",
            datasets=options.dataset,
            densities=densities,
            seeds=range(options.seeds),
            scopes="layer",
            mask={"pattern": None if pattern == "scattered" else pattern},
            training={"epochs": options.epochs},
            out=options.out / pattern.replace(":", "-"),
        )
        for row in frame.to_dict("records"):
            found.append(("dense" if row["method"] == "dense" else pattern, row))
    return sorted(found, key=lambda pair: pair[0] != "dense")


def measured(row: Any, images: np.ndarray) -> dict[str, Any]:
    """Milliseconds of one network in each runner beside the dense one, and what is left of it."""
    loaded = load_model(Path(row["folder"]) / MODEL)
    sparse = (
        loaded.model if isinstance(loaded.model, ntt.SparseModel) else ntt.sparsify(loaded.model)
    )
    whole = eqx.nn.inference_mode(sparse.to_dense())
    found = ntt.compact(sparse, images[:8])
    small = eqx.nn.inference_mode(found.model.to_dense())
    runs = [
        RUNNERS["onnxruntime"].load(
            "patterns", RUNNERS["onnxruntime"].encode("patterns", whole, images)
        )
    ]
    runs += [
        form.load("patterns", form.encode("patterns", small, images)) for form in RUNNERS.values()
    ]
    wanted = runs[0](images)
    difference = max(float(np.abs(run(images) - wanted).max()) for run in runs[1:])
    dense, *times = timed(runs, images)
    return {
        "parameters": found.parameters,
        "compacted": found.compact_parameters,
        "difference": difference,
        "dense": dense,
        **dict(zip(RUNNERS, times, strict=True)),
    }


def rows_of(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a pattern and density: accuracy over seeds, times of the first seed's network."""
    data = ntt.data.load_dataset(options.dataset)
    images = np.asarray(ntt.data.as_batch(data.test, mean=data.mean, std=data.std).x[:64])
    groups: dict[tuple[str, float], list[Any]] = {}
    for pattern, row in trained(options):
        groups.setdefault((pattern, row["density"]), []).append(row)
    found = []
    for (pattern, density), rows in groups.items():
        accuracies = [100 * row["test_accuracy"] for row in rows]
        spread = statistics.stdev(accuracies) / len(rows) ** 0.5 if len(rows) > 1 else None
        found.append({
            "pattern": pattern,
            "density": density,
            "kept": rows[0]["kept_density"],
            "accuracy": statistics.fmean(accuracies),
            "standard_error": spread,
            "seeds": len(rows),
            **measured(rows[0], images),
        })  # fmt: skip
        print(json.dumps(found[-1]), flush=True)
    return found


def fastest(row: dict[str, Any], samples: str) -> tuple[str, float]:
    """The faster runner of a row, and its milliseconds."""
    return min(((name, row[name][samples]) for name in RUNNERS), key=lambda pair: pair[1])


def figure(found: dict[str, Any], path: Path) -> None:
    """Test error against milliseconds of 64 samples."""
    rows = found["rows"]
    dense = next(row for row in rows if row["pattern"] == "dense")
    labels = [label for label, *_ in LOOKS.values()]
    with new_figure(found["caption"], 2.6, labels) as (drawn, axes):
        at = axes[0][0]
        for pattern, (label, colour, marker) in LOOKS.items():
            own = sorted(
                (row for row in rows if row["pattern"] == pattern), key=lambda r: r["density"]
            )
            x = [fastest(row, "64")[1] for row in own]
            y = [100 - row["accuracy"] for row in own]
            error = [row["standard_error"] or 0 for row in own]
            look: Any = {"color": colour, "marker": marker, "label": label, "ms": 3.6, "lw": 1}
            at.errorbar(x, y, yerr=error, elinewidth=0.6, capsize=1.2, **look)
        at.axhline(100 - dense["accuracy"], color="0.4", lw=0.8, ls=":")
        at.axvline(dense["onnxruntime"]["64"], color="0.4", lw=0.8, ls=":")
        at.annotate("dense", (dense["onnxruntime"]["64"], 100 - dense["accuracy"]),
                    xytext=(-3, 3), textcoords="offset points", ha="right", fontsize=7)  # fmt: skip
        at.set(xscale="log", yscale="log")
        at.set_xlabel("Milliseconds of 64 images, one core")
        at.set_ylabel("Test error (%)")
        plain_decades(at.xaxis)
        plain_decades(at.yaxis)
    path.write_bytes(render_figure(drawn, "patterns")["patterns.png"])


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="fashion-mnist")
    parser.add_argument("--epochs", type=float, default=5.0)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/patterns"))
    parser.add_argument("--json", type=Path, help="write all rows, or read them if it is there")
    parser.add_argument("--figure", type=Path, help="draw them")
    options = parser.parse_args()
    if options.json and options.json.exists():
        found = json.loads(options.json.read_text())
    else:
        caption = f"LeNet-5, {options.dataset}, magnitude before training"
        many = f"mean of {options.seeds} seeds, bars: ± standard error"
        caption += f"\nepochs: {options.epochs:g}; {'one seed' if options.seeds == 1 else many}"
        found = {"caption": caption, "jax": jax.__version__, "rows": rows_of(options)}
        found = json.loads(json.dumps(found))
        if options.json:
            options.json.write_text(json.dumps(found, indent=1))
    if options.figure:
        figure(found, options.figure)


if __name__ == "__main__":
    main()
