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
from typing import Any, Literal, NamedTuple

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


class Series(NamedTuple):
    """Masks of one kind: how they are drawn, and pattern and density of each."""

    label: str
    colour: str
    marker: str
    masks: tuple[tuple[str | None, float], ...]
    scope: Literal["layer", "erk"] = "layer"  # ERK's shares, where a pattern leaves any choice


def at(pattern: str | None, *densities: float) -> tuple[tuple[str | None, float], ...]:
    """Masks of one pattern at several densities."""
    return tuple((pattern, density) for density in densities)


SERIES = {  # by name, as a folder is called
    "scattered": Series("scattered", "#0072B2", "o", at(None, 0.01, 0.03, 0.1, 0.3)),
    "scattered-erk": Series("scattered, ERK", "#000000", "x", at(None, 0.01, 0.03, 0.1), "erk"),
    "few-channels": Series(
        "few channels, ERK",
        "#F0E442",
        "P",
        (
            *at("few-channels:1/6", 0.01),
            *at("few-channels:1/4", 0.02),
            *at("few-channels:1/3", 0.03),
            *at("few-channels:1/2", 0.1),
        ),
        "erk",
    ),
    "fan-in": Series("constant fan-in", "#56B4E9", "v", at("fan-in", 0.03, 0.1, 0.3)),
    "fan-in:16": Series("fan-in shared by 16", "#009E73", "s", at("fan-in:16", 0.03, 0.1, 0.3)),
    "2:4": Series("2:4", "#CC79A7", "*", at("2:4", 0.5)),
    "filters": Series("filters", "#E69F00", "^", at("filters", 0.1, 0.25, 0.5)),
    "channels": Series("coupled channels", "#D55E00", "D", at("channels", 0.1, 0.25, 0.5)),
}
RUNNERS = {"numpy": Numpy(SPARSE_BELOW), "onnxruntime": Onnx()}


def trained(options: argparse.Namespace) -> list[tuple[str, Any]]:
    """Series and row of each network, the dense ones first."""
    found = []
    for name in options.series:
        series = SERIES[name]
        groups: dict[str | None, list[float]] = {}
        for pattern, density in series.masks:
            groups.setdefault(pattern, []).append(density)
        for pattern, densities in groups.items():
            folder = name if len(groups) == 1 else f"{name}-{pattern}"
            frame = ntt.experiment.compare(
                ["magnitude", "dense"] if name == "scattered" else "magnitude",
                models="lenet-5",
                datasets=options.dataset,
                densities=densities,
                seeds=range(options.seeds),
                scopes=series.scope,
                mask={"pattern": pattern},
                training={"epochs": options.epochs},
                out=options.out / folder.replace(":", "-").replace("/", "-"),
            )
            for row in frame.to_dict("records"):
                found.append(("dense" if row["method"] == "dense" else name, row))
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
    for name, row in trained(options):
        groups.setdefault((name, row["density"]), []).append(row)
    found = []
    for (name, density), rows in groups.items():
        accuracies = [100 * row["test_accuracy"] for row in rows]
        spread = statistics.stdev(accuracies) / len(rows) ** 0.5 if len(rows) > 1 else None
        found.append({
            "series": name,
            "label": label_of(name, rows[0]["mask"]),
            "density": density,
            "kept": rows[0]["kept_density"],
            "accuracy": statistics.fmean(accuracies),
            "standard_error": spread,
            "seeds": len(rows),
            **measured(rows[0], images),
        })  # fmt: skip
        print(json.dumps(found[-1]), flush=True)
    return found


def label_of(name: str, mask: str) -> str:
    """The name of a row in the table, from the mask's label in the results."""
    if name not in SERIES:
        return name
    _, _, share = mask.partition("few-channels:")
    return SERIES[name].label + (f" ({share})" if share else "")


def fastest(row: dict[str, Any], samples: str) -> tuple[str, float]:
    """The faster runner of a row, and its milliseconds."""
    return min(((name, row[name][samples]) for name in RUNNERS), key=lambda pair: pair[1])


def figure(found: dict[str, Any], path: Path) -> None:
    """Test error against milliseconds of 64 samples."""
    rows = found["rows"]
    dense = next(row for row in rows if row["series"] == "dense")
    labels = [series.label for series in SERIES.values()]
    with new_figure(found["caption"], 2.6, labels) as (drawn, axes):
        axis = axes[0][0]
        for name, series in SERIES.items():
            own = sorted((row for row in rows if row["series"] == name), key=lambda r: r["density"])
            x = [fastest(row, "64")[1] for row in own]
            y = [100 - row["accuracy"] for row in own]
            error = [row["standard_error"] or 0 for row in own]
            look: Any = {"color": series.colour, "marker": series.marker, "label": series.label}
            axis.errorbar(x, y, yerr=error, elinewidth=0.6, capsize=1.2, **look)
        axis.axhline(100 - dense["accuracy"], color="0.4", lw=0.8, ls=":")
        axis.axvline(dense["onnxruntime"]["64"], color="0.4", lw=0.8, ls=":")
        axis.annotate("dense", (dense["onnxruntime"]["64"], 100 - dense["accuracy"]),
                    xytext=(-3, 3), textcoords="offset points", ha="right", fontsize=7)  # fmt: skip
        axis.set(xscale="log", yscale="log")
        axis.set_xlabel("Milliseconds of 64 images, one core")
        axis.set_ylabel("Test error (%)")
        plain_decades(axis.xaxis)
        plain_decades(axis.yaxis)
    path.write_bytes(render_figure(drawn, "patterns")["patterns.png"])


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="fashion-mnist")
    parser.add_argument("--epochs", type=float, default=5.0)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/patterns"))
    parser.add_argument("--series", nargs="+", choices=tuple(SERIES), default=list(SERIES))
    parser.add_argument("--json", type=Path, help="add series to these, unless they are there")
    parser.add_argument("--figure", type=Path, help="draw all of them")
    options = parser.parse_args()
    caption = f"LeNet-5, {options.dataset}, magnitude before training"
    many = f"mean of {options.seeds} seeds, bars: ± standard error"
    caption += f"\nepochs: {options.epochs:g}; {'one seed' if options.seeds == 1 else many}"
    found = {"caption": caption, "jax": jax.__version__, "rows": []}
    if options.json and options.json.exists():
        found = json.loads(options.json.read_text())
    there = {row["series"] for row in found["rows"]}
    options.series = [name for name in options.series if name not in there]
    if options.series and found["caption"] != caption:
        parser.error(f"{options.json} has rows of other settings: {found['caption']}")
    found["rows"] += json.loads(json.dumps(rows_of(options))) if options.series else []
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    if options.figure:
        figure(found, options.figure)


if __name__ == "__main__":
    main()
