"""Draw the figures of test error against sparsity, and `time.png`, from the raw results.

    python benchmarks/make_figures.py

The other figures need the curves of their runs, which are too large to keep here: copy them from
the run that the page names.
"""

import statistics
from pathlib import Path
from typing import Any

import numpy as np
from make_results import ROOT
from pages.results.raw import load, standard_error, values
from pages.results.same_share import time_values, variant

from ntt_eqx.experiment.figures import (
    new_figure,
    plain_decades,
    render_figure,
    sparsity_figure,
)
from ntt_eqx.experiment.methods import METHODS
from ntt_eqx.experiment.results import Run

FIGURES = ROOT / "docs" / "figures"
SKETCH_MARKS = {1: ("v", ":"), 2: ("*", "--"), 8: ("D", "-")}  # by number of directions


def sparsity(results: list[dict], figure: Path) -> None:
    """The figure of test error against sparsity, as `ntt-eqx report` draws it, as a PNG."""
    drawn = sparsity_figure([Run(Path(), "done", result, result) for result in results])
    figure.write_bytes(render_figure(drawn, "sparsity")["sparsity.png"])


def time(results: list[dict], figure: Path) -> None:
    """Accuracy after training against the seconds of the transfer, one point a length of it."""
    variants = sorted({variant(r) for r in results}, key=str)
    labels = {v: METHODS[v[0]].label.replace(")", f", R = {v[1]})") for v in variants if v[1]}
    labels = {v: labels.get(v, METHODS[v[0]].label) for v in variants}
    seeds = sorted({r["seed"] for r in results})
    caption = "fashion-mnist, lenet-300-100, 3 % of weights kept in every layer\n"
    caption += f"mean of {len(seeds)} seeds, bars: ± standard error"
    with new_figure(caption, 2.3, labels.values()) as (drawn, axes):
        for one in variants:
            points = []
            for epochs in sorted({r["transfer"]["epochs"] for r in results}):
                found = time_values(results, one, epochs)
                reached = values(found)
                seconds = statistics.fmean(r["transfer_seconds"] for r in found)
                points.append((seconds, statistics.fmean(reached), standard_error(reached)))
            style = METHODS[one[0]]
            mark, dashes = SKETCH_MARKS[one[1]] if one[1] else (style.marker, style.dashes)
            look: Any = {"color": style.colour, "ls": dashes, "marker": mark, "label": labels[one]}
            x, y, error = zip(*points, strict=True)
            axes[0][0].errorbar(x, y, yerr=error, elinewidth=0.6, capsize=1.2, ms=3.6, **look)
        axes[0][0].set(xscale="log", xlabel="Seconds of transfer (one core)", ylim=(82.5, 87))
        axes[0][0].set_ylabel("Test accuracy (%)")
        plain_decades(axes[0][0].xaxis)
    figure.write_bytes(render_figure(drawn, "time")["time.png"])


READERS = {  # method and mask, by what a picture is called
    "random, third": ("random", "erk, few-channels:1/3"),
    "NTK-SAP, third": ("ntk-sap", "few-channels:1/3"),
    "NTT, third": ("ntt-sketch", "erk, few-channels:1/3"),
    "SNIP, sixth": ("snip", "few-channels:1/6"),
    "by variance, third": ("weighted-random", "erk, few-channels:1/3"),
}


def pixels(results: dict[str, Any], figure: Path) -> None:
    """Which pixels the first layers of masks read, on two data sets."""
    caption = "lenet-300-100, 1 % of weights kept on a part of the units, mean of 5 seeds\n"
    caption += "share of the first layer's weights that reads each pixel, 0 (dark) to 0.4 %"
    sets = ("mnist", "fashion-mnist")
    size: Any = {"rows": len(sets), "columns": len(READERS), "width": 6.2}
    with new_figure(caption, 2.7, **size) as (drawn, grid):
        for row, dataset in zip(grid, sets, strict=True):
            for axes, (name, place) in zip(row, READERS.items(), strict=True):
                chosen = [m for m in results["means"] if (m["method"], m["mask"]) == place]
                (reads,) = (m["reads"] for m in chosen if m["dataset"] == dataset)
                image = np.reshape(reads, (28, 28)) / 1e3
                axes.imshow(image, cmap="cividis", vmin=0, vmax=0.4, rasterized=True)
                axes.set(xticks=[], yticks=[])
                axes.grid(False)
                axes.set_title(name if dataset == "mnist" else "")
            row[0].set_ylabel(dataset)
    figure.write_bytes(render_figure(drawn, "pixels")["pixels.png"])


def main(figures: Path = FIGURES) -> None:
    """Draw all of them into a folder."""
    sparsity(load("fashion_mnist_sparsity"), figures / "sparsity.png")
    sparsity(load("fashion_mnist_steps"), figures / "steps.png")
    sparsity(load("mnist_sparsity"), figures / "mnist.png")
    sparsity(load("fashion_mnist_lenet5"), figures / "lenet5-fashion.png")
    sparsity(load("mnist_lenet5_sparsity"), figures / "lenet5-mnist.png")
    time(load("fashion_mnist_time"), figures / "time.png")
    pixels(load("pixels"), figures / "pixels.png")


if __name__ == "__main__":
    main()
