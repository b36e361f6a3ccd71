"""Masks of the first layer as images, and the density of every layer."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from .._errors import require
from ._style import (
    COLUMN,
    in_panel,
    legend_below,
    line_label,
    method_order,
    method_style,
    panel_figure,
    plain_decades,
    scope_panels,
    styled,
)

_GRID = 4
_WIDEST = 5
_ROWS = {False: ("kept per input", "first 16 units"), True: ("mean", "first 16")}


def masks_figure(masks: dict[str, np.ndarray], input_shape: Sequence[int]) -> Any | None:
    """First-layer masks: above, how many weights each input keeps; below, the first 16 units.

    A convolution's filters are drawn with their channels side by side.

    **Arguments:**

    - `masks`: label -> mask of the first layer's weight, `[units, inputs]` for a dense layer,
      `[filters, channels, height, width]` for a convolution.
    - `input_shape`: shape of one image, `(channels, height, width)`.
    """
    shown = {label: _as_images(mask, input_shape) for label, mask in masks.items()}
    shown = {label: images for label, images in shown.items() if images is not None}
    if not shown:
        return None
    figures = require("matplotlib.figure")
    blocks = -(-len(shown) // _WIDEST)
    columns = -(-len(shown) // blocks)
    width = max(COLUMN, 1.35 * columns + 0.45)
    side = (width - 0.8) / columns  # of one picture
    aspects = [images.shape[1] / images.shape[2] for images in shown.values()]
    height = blocks * (2 * side * max(aspects) + 0.3) + 0.1
    with styled():
        figure = figures.Figure(figsize=(width, max(height, 1.6)), layout="constrained")
        grid = figure.subplots(2 * blocks, columns, squeeze=False)
        conv = all(np.ndim(masks[label]) == 4 for label in shown)
        high = max(float(images.mean(0).max()) for images in shown.values())
        picture = None
        for place, (label, images) in enumerate(shown.items()):
            block, column = divmod(place, columns)
            above, below = grid[2 * block][column], grid[2 * block + 1][column]
            picture = above.imshow(
                100 * images.mean(0), cmap="cividis", vmin=0, vmax=100 * high, rasterized=True
            )
            above.set_title(label)
            below.imshow(_tiles(images), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
        for axes in grid.flat:
            axes.set_xticks([])
            axes.set_yticks([])
            axes.grid(False)
            for spine in axes.spines.values():
                spine.set_visible(False)
        for block in range(blocks):
            grid[2 * block][0].set_ylabel(_ROWS[conv][0])
            grid[2 * block + 1][0].set_ylabel(_ROWS[conv][1])
        bar = figure.colorbar(picture, ax=grid.ravel().tolist(), fraction=0.05, pad=0.01)
        bar.set_label("kept (%)")
        bar.outline.set_visible(False)
    return figure


def densities_figure(results: Sequence[dict[str, Any]]) -> Any | None:
    """Weights kept in each layer, by method; `None` without sparse networks."""
    lines: dict[tuple[str, str | None, str], dict[str, list[float]]] = {}
    for result in results:
        if result["method"] == "dense" or not result.get("densities"):
            continue
        layers = lines.setdefault(
            (result["method"], result.get("scope"), result.get("mask") or ""), {}
        )
        for layer, share in result["densities"].items():
            layers.setdefault(layer, []).append(share)
    if not lines:
        return None
    order = sorted(lines, key=lambda key: (method_order(key[0]), key[1] != "layer", key[2]))
    layers = list(dict.fromkeys(layer for shares in lines.values() for layer in shares))
    panels = scope_panels(scope for _, scope, _ in lines)
    named = lambda key: line_label(key[0], None, several_scopes=False, mask=key[2])
    labels = {named(key) for key in order}
    height = 0.65 + len(layers) * max(0.32, 0.08 * len(labels))
    with panel_figure(panels, height, labels) as (figure, axes):
        for one, panel in zip(axes, panels, strict=True):
            here = [key for key in order if in_panel(key[1], panel)]
            for i, key in enumerate(here):
                offset = (i - (len(here) - 1) / 2) * 0.75 / max(len(here), 1)
                shares, style = lines[key], method_style(key[0])
                present = [(n, shares[layer]) for n, layer in enumerate(layers) if layer in shares]
                one.plot(
                    [100 * float(np.mean(kept)) for _, kept in present],
                    [n + offset for n, _ in present],
                    linestyle="none",
                    marker=style.marker,
                    markersize=3.6,
                    color=style.colour,
                    label=named(key),
                )
            for n in range(1, len(layers)):
                one.axhline(n - 0.5, color="#C8C8C8", lw=0.6)
            one.grid(axis="y", visible=False)
            one.set_xscale("log")
            one.set_xlabel("Weights kept in the layer (%)")
            low, high = one.get_xlim()
            if high / low < 30:  # less than a decade would leave hardly a labelled tick
                one.set_xlim(low / 2, high * 2)
            plain_decades(one.xaxis)
        axes[0].set_ylim(len(layers) - 0.5, -0.5)
        axes[0].set_yticks(range(len(layers)), [layer.strip(".") for layer in layers])
        legend_below(figure, *axes)
    return figure


def _as_images(mask: np.ndarray, input_shape: Sequence[int]) -> np.ndarray | None:
    mask = np.asarray(mask, dtype=float)
    if mask.ndim == 4:  # a convolution: one image for each filter, channels side by side
        filters, channels, height, width = mask.shape
        return mask.transpose(0, 2, 1, 3).reshape(filters, height, channels * width)
    if mask.ndim == 2 and mask.shape[1] == int(np.prod(input_shape)):
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
