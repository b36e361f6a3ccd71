"""Test accuracy against training steps, and against the share of weights kept."""

from collections.abc import Sequence
from typing import Any

from ..results import Run
from ..table import Row, make_rows
from ._curves import Curve, curves
from ._style import (
    COLUMN,
    legend_below,
    line_label,
    line_style,
    method_order,
    method_style,
    new_figure,
    spread,
    thousands,
)


def accuracy_figure(runs: Sequence[Run]) -> Any | None:
    """Test accuracy against training steps; lines are means over seeds, bands one deviation."""
    found = curves(runs, "train", lambda row: row.get("test", {}).get("accuracy"))
    if not found:
        return None
    several = len({c.scope for c in found if c.scope}) > 1
    with new_figure(COLUMN, 2.3 + 0.16 * ((len(found) + 2) // 3)) as (figure, (axes,)):
        for curve in found:
            mean, deviation = spread(curve.values)
            percent = [100 * m for m in mean]
            style = method_style(curve.method)
            axes.plot(
                curve.steps,
                percent,
                color=style.colour,
                linestyle=line_style(curve.scope),
                label=line_label(
                    curve.method, curve.scope, several_scopes=several, mask=curve.mask
                ),
                zorder=3 if curve.method.startswith("ntt") else 2,
            )
            if len(curve.values) > 1:
                low = [m - 100 * d for m, d in zip(percent, deviation, strict=True)]
                high = [m + 100 * d for m, d in zip(percent, deviation, strict=True)]
                axes.fill_between(curve.steps, low, high, color=style.colour, alpha=0.18, lw=0)
        axes.set_xlabel("Training steps")
        axes.set_ylabel("Test accuracy (%)")
        axes.set_xlim(left=0, right=max(c.steps[-1] for c in found))
        axes.set_ylim(*_limits(found))
        thousands(axes.xaxis)
        legend_below(figure, axes)
    return figure


def sparsity_figure(results: Sequence[dict[str, Any]]) -> Any | None:
    """Test accuracy against the share of weights kept; `None` with fewer than two densities."""
    rows = [row for row in make_rows(results) if row.test is not None]
    densities = sorted({row.density for row in rows if row.method != "dense"})
    if len(densities) < 2:
        return None
    lines: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in rows:
        lines.setdefault((row.method, row.scope, row.mask, row.settings), []).append(row)
    several = len({row.scope for row in rows if row.scope}) > 1
    with new_figure(COLUMN, 2.4 + 0.16 * ((len(lines) + 2) // 3)) as (figure, (axes,)):
        for (method, scope, mask, settings), members in sorted(
            lines.items(),
            key=lambda item: (method_order(item[0][0]), item[0][1] != "layer", item[0]),
        ):
            style = method_style(method)
            label = line_label(method, scope, several_scopes=several, mask=mask or settings)
            members = sorted(members, key=lambda row: row.density)
            mean = [row.test or 0.0 for row in members]
            error = [row.test_spread or 0.0 for row in members]
            if method == "dense":
                axes.axhline(mean[0], color=style.colour, lw=1.0, ls=(0, (1, 1)), label=label)
                axes.axhspan(mean[0] - error[0], mean[0] + error[0], color="#000000", alpha=0.08)
                continue
            axes.errorbar(
                [100 * row.density for row in members],
                mean,
                yerr=error if any(error) else None,
                color=style.colour,
                marker=style.marker,
                linestyle=line_style(scope),
                markersize=3.6,
                markerfacecolor=style.colour if scope != "global" else "white",
                elinewidth=0.8,
                capsize=1.5,
                label=label,
                zorder=3 if method.startswith("ntt") else 2,
            )
        axes.set_xscale("log")
        axes.set_xticks([100 * d for d in densities], [f"{100 * d:g}" for d in densities])
        axes.minorticks_off()
        axes.set_xlabel("Weights kept (%)")
        axes.set_ylabel("Test accuracy (%)")
        legend_below(figure, axes, columns=2 if several else 3)
    return figure


def _limits(found: Sequence[Curve]) -> tuple[float, float]:
    # The first steps start near chance; leave them out, so that the end can be told apart.
    last = max(curve.steps[-1] for curve in found)
    shown = [
        100 * value
        for curve in found
        for values in curve.values
        for step, value in zip(curve.steps, values, strict=True)
        if step >= 0.1 * last
    ]
    low, high = min(shown), max(shown)
    margin = max(0.06 * (high - low), 0.5)
    return max(low - margin, 0.0), min(high + margin, 100.0)
