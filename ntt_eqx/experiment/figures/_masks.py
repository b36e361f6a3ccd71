"""Masks of the first layer as images, and the density of every layer."""

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..methods import Line, method
from ..results import Run
from ._style import (
    COLUMN,
    arrange,
    describe,
    in_panel,
    line_of,
    new_figure,
    plain_decades,
)

_GRID = 4
_WIDEST = 5


def masks_figure(
    masks: dict[str, np.ndarray], input_shape: Sequence[int], runs: Sequence[Run]
) -> Any | None:
    """First-layer masks: above, how many weights each input keeps; below, the first 16 units.

    Each picture has a scale of its own, written below it: a score that keeps few inputs whole and
    one that spreads its weights would hide each other on a common one. A convolution's filters are
    drawn with their channels side by side.
    """
    found = {label: _as_images(mask, input_shape) for label, mask in masks.items()}
    shown = [(label, images) for label, images in found.items() if images is not None]
    if not shown:
        return None
    blocks = -(-len(shown) // _WIDEST)
    columns = -(-len(shown) // blocks)
    width = max(COLUMN, 1.35 * columns + 0.3)
    tallest = max(images.shape[1] / images.shape[2] for _, images in shown)
    height = blocks * (2 * tallest * (width - 0.4) / columns + 0.45) + 0.3
    conv = any(np.ndim(masks[label]) == 4 for label, _ in shown)
    what = (
        ("mean of all filters", "filters")
        if conv
        else ("share of units that keep an input", "units")
    )
    caption = describe(runs).rpartition("\n")[0]
    seed = min(run.config["seed"] for run in runs)
    caption += f", seed\u00a0{seed}; above: {what[0]}, below: first 16 {what[1]}"
    size: Any = {"rows": 2 * blocks, "columns": columns, "width": width}
    with new_figure(caption, max(height, 1.6), **size) as (figure, grid):
        for axes in grid.flat:
            axes.set(xticks=[], yticks=[], visible=False)
            axes.grid(False)
            axes.spines[:].set_visible(False)
        for place, (label, images) in enumerate(shown):
            block, column = divmod(place, columns)
            above, below = grid[2 * block][column], grid[2 * block + 1][column]
            kept = 100 * images.mean(0)
            above.imshow(kept, cmap="cividis", vmin=0, vmax=max(kept.max(), 1e-9), rasterized=True)
            # at 8 points about 13 characters an inch
            above.set_title(textwrap.fill(label, int(13 * (width - 0.3) / columns)))
            above.set_visible(True)
            above.set_xlabel(f"0 to {kept.max():.3g} %", fontsize=6.5, labelpad=2)
            below.imshow(_tiles(images), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
            below.set_visible(True)
    return figure


def densities_figure(runs: Sequence[Run]) -> Any | None:
    """Weights kept in each layer, of masks that do not keep the same share in all of them."""
    lines: dict[Line, dict[str, list[float]]] = {}
    for run in runs:
        line = line_of(run)
        # the dense network, and those with the same share in each layer by construction
        if line.method == "dense" or (line.scope, line.mask) == ("layer", ""):
            continue
        for layer, share in ((run.result or {}).get("densities") or {}).items():
            lines.setdefault(line, {}).setdefault(layer, []).append(share)
    if not lines:
        return None
    order = sorted(lines, key=lambda line: line.order)
    layers = list(dict.fromkeys(layer for shares in lines.values() for layer in shares))
    panels, looks = arrange(order)
    height = 0.55 + len(layers) * max(0.32, 0.08 * len(order))
    caption = describe(runs, "points").partition(", points")[0]
    with new_figure(caption, height, looks.values(), panels, sharey=True) as (figure, axes):
        for one, panel in zip(axes[0], panels, strict=True):
            here = [line for line in order if in_panel(line, panel)]
            for i, line in enumerate(here):
                offset = (i - (len(here) - 1) / 2) * 0.75 / max(len(here), 1)
                shares, style = lines[line], method(line.method)
                kept = [100 * float(np.mean(shares.get(layer, np.nan))) for layer in layers]
                look: Any = {"marker": style.marker, "color": style.colour, "ms": 3.6, "ls": "none"}
                places = np.arange(len(layers)) + offset
                one.plot(kept, places, **look | looks[line])
                for place in places[np.array(kept) == 0]:  # has no place on a logarithmic axis
                    text: Any = {"color": style.colour, "fontsize": 6.5, "va": "center"}
                    one.annotate("0", (0.01, place), xycoords=("axes fraction", "data"), **text)
            for n in range(1, len(layers)):
                one.axhline(n - 0.5, color="#C8C8C8", lw=0.6)
            one.grid(axis="y", visible=False)
            one.set(xscale="log", xlabel="Weights kept in the layer (%)")
            low, high = one.get_xlim()
            if high / low < 30:  # less than a decade would leave hardly a labelled tick
                one.set_xlim(low / 2, high * 2)
            plain_decades(one.xaxis)
        axes[0][0].set_ylim(len(layers) - 0.5, -0.5)
        axes[0][0].set_yticks(range(len(layers)), [layer.strip(".") for layer in layers])
    return figure


def _as_images(mask: np.ndarray, input_shape: Sequence[int]) -> np.ndarray | None:
    mask = np.asarray(mask, dtype=float)
    if mask.ndim == 4:  # a convolution: one image for each filter, channels side by side
        filters, channels, height, width = mask.shape
        return mask.transpose(0, 2, 1, 3).reshape(filters, height, channels * width)
    # Inputs of other ranks, such as tables and sequences, are no images.
    if mask.ndim == 2 and len(input_shape) == 3 and mask.shape[1] == int(np.prod(input_shape)):
        return mask.reshape(mask.shape[0], *input_shape).mean(axis=1)
    return None


def _tiles(images: np.ndarray) -> np.ndarray:
    count, height, width = images.shape
    canvas = np.full((_GRID * (height + 1) - 1, _GRID * (width + 1) - 1), 0.35)
    for i in range(min(count, _GRID * _GRID)):
        row, column = divmod(i, _GRID)
        top, left = row * (height + 1), column * (width + 1)
        canvas[top : top + height, left : left + width] = images[i]
    return canvas
