"""Test accuracy against training steps, and against the share of weights kept."""

from collections.abc import Sequence
from typing import Any

from ..methods import method, method_order
from ..results import Run
from ..table import Row, make_rows
from ._curves import curves
from ._style import (
    describe,
    in_panel,
    line_label,
    minor_ticks,
    new_figure,
    scope_panels,
    thousands,
)

_DODGE = 1.012  # from one method to the next, so that error bars do not hide one another


def accuracy_figure(runs: Sequence[Run]) -> Any | None:
    """Test accuracy from the first look after step 0 on, where all networks guess."""
    found = curves(runs, "train", lambda row: row.get("test", {}).get("accuracy"), first=1)
    if not found:
        return None
    panels = scope_panels(c.scope for c in found)
    labels = [curve.label for curve in found]
    band = 0.15 if len(found) <= 4 * len(panels) else 0.07
    with new_figure(describe(runs, "band"), 2.1, labels, panels, sharey=True) as (_, axes):
        for one, panel in zip(axes[0], panels, strict=True):
            for curve in found:
                if in_panel(curve.scope, panel):
                    curve.draw(one, scale=100.0, band=band)
            one.set_xlabel("Training steps")
            one.margins(x=0.02)
            thousands(one.xaxis)
        axes[0][0].set_ylabel("Test accuracy (%)")
    return axes[0][0].figure


def sparsity_figure(runs: Sequence[Run]) -> Any | None:
    """Test accuracy against the share of weights kept; `None` with fewer than two densities."""
    results = [run.result for run in runs if run.result is not None]
    rows = [row for row in make_rows(results) if row.test is not None]
    densities = sorted({row.density for row in rows if row.method != "dense"})
    if len(densities) < 2:
        return None
    lines: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        lines.setdefault((row.method, row.scope, row.mask or row.settings), []).append(row)
    panels = scope_panels(row.scope for row in rows)
    labels = [line_label(name, mask=mask) for name, _, mask in lines]
    caption = describe(runs, "bars and grey band")
    with new_figure(caption, 2.2, labels, panels, sharey=True) as (figure, axes):
        for one, panel in zip(axes[0], panels, strict=True):
            here = [key for key in sorted(lines, key=_place) if in_panel(key[1], panel)]
            for number, key in enumerate(here):
                shift = _DODGE ** (number - (len(here) - 1) / 2)
                _draw_line(one, key, sorted(lines[key], key=lambda row: row.density), shift)
            one.set_xscale("log")
            one.set_xticks([100 * d for d in densities], [f"{100 * d:g}" for d in densities])
            minor_ticks(one.xaxis)
            one.set_xlabel("Weights kept (%)")
        axes[0][0].set_ylabel("Test accuracy (%)")
    return figure


def _draw_line(axes: Any, key: tuple[str, str, str], members: Sequence[Row], shift: float) -> None:
    name, _, mask = key
    style, label = method(name), line_label(name, mask=mask)
    mean = [row.test or 0.0 for row in members]
    error = [row.test_spread or 0.0 for row in members]
    if name == "dense":
        axes.axhline(mean[0], color=style.colour, lw=1.0, ls=style.dashes, label=label)
        axes.axhspan(mean[0] - error[0], mean[0] + error[0], color="#000000", alpha=0.08)
        return
    axes.errorbar(
        [100 * row.density * shift for row in members],
        mean,
        yerr=error if any(error) else None,
        color=style.colour,
        marker=style.marker,
        ls=style.dashes,
        markersize=3.6,
        lw=1.0,
        elinewidth=0.7,
        capsize=1.2,
        label=label,
        zorder=3 if style.kernel else 2,
    )


def _place(key: tuple[str, str, str]) -> tuple[Any, ...]:
    return (method_order(key[0]), *key[1:])
