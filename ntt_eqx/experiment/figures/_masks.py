"""Masks of the first layer as images, and the density of every layer."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from .._errors import require
from ._style import (
    COLUMN,
    legend_below,
    line_label,
    method_order,
    method_style,
    new_figure,
    plain_decades,
    styled,
)

_GRID = 4
_WIDEST = 5


def masks_figure(masks: dict[str, np.ndarray], input_shape: Sequence[int]) -> Any | None:
    """First-layer masks: above, how many weights each input keeps; below, the first 16 units.

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
    with styled():
        figure = figures.Figure(figsize=(width, 2.85 * blocks + 0.15), layout="constrained")
        grid = figure.subplots(2 * blocks, columns, squeeze=False)
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
            grid[2 * block][0].set_ylabel("kept per input")
            grid[2 * block + 1][0].set_ylabel("first 16 units")
        bar = figure.colorbar(picture, ax=grid[::2].ravel().tolist(), shrink=0.85, pad=0.01)
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
    several = len({scope for _, scope, _ in lines if scope}) > 1
    height = 0.6 + len(layers) * max(0.32, 0.085 * len(order)) + 0.16 * ((len(order) + 2) // 3)
    with new_figure(COLUMN, height + 0.25) as (figure, (axes,)):
        for i, (method, scope, mask) in enumerate(order):
            shares = lines[method, scope, mask]
            offset = (i - (len(order) - 1) / 2) * 0.75 / max(len(order), 1)
            present = [(n, shares[layer]) for n, layer in enumerate(layers) if layer in shares]
            style = method_style(method)
            axes.plot(
                [100 * float(np.mean(kept)) for _, kept in present],
                [n + offset for n, _ in present],
                linestyle="none",
                marker=style.marker,
                markersize=3.6,
                color=style.colour,
                markerfacecolor=style.colour if scope != "global" else "white",
                label=line_label(method, scope, several_scopes=several, mask=mask),
            )
        for n in range(1, len(layers)):
            axes.axhline(n - 0.5, color="#C8C8C8", lw=0.6)
        axes.set_ylim(len(layers) - 0.5, -0.5)
        axes.set_yticks(range(len(layers)), [layer.strip(".") for layer in layers])
        axes.grid(axis="y", visible=False)
        axes.set_xscale("log")
        axes.set_xlabel("Weights kept in the layer (%)")
        low, high = axes.get_xlim()
        if high / low < 30:  # less than a decade of data would leave hardly a labelled tick
            axes.set_xlim(low / 2, high * 2)
        plain_decades(axes.xaxis)
        legend_below(figure, axes, columns=2 if several else 3)
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
