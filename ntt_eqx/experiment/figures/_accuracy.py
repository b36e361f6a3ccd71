"""Test accuracy against training steps, and against the share of weights kept."""

from collections.abc import Sequence
from typing import Any

from ..results import Run
from ..table import Row, make_rows
from ._curves import Curve, curves
from ._style import (
    in_panel,
    legend_below,
    line_label,
    method_order,
    method_style,
    panel_figure,
    scope_panels,
    spread,
    thousands,
)

_DODGE = 1.012  # from one method to the next, so that error bars do not hide one another


def accuracy_figure(runs: Sequence[Run]) -> Any | None:
    """Test accuracy against training steps; lines are means over seeds, bands one deviation."""
    found = curves(runs, "train", lambda row: row.get("test", {}).get("accuracy"))
    if not found:
        return None
    panels = scope_panels(c.scope for c in found)
    names = [_label(c.method, c.mask) for c in found]
    with panel_figure(panels, 2.2, names) as (figure, axes):
        for one, panel in zip(axes, panels, strict=True):
            for curve, name in zip(found, names, strict=True):
                if in_panel(curve.scope, panel):
                    _draw_curve(one, curve, name, len(found) // len(panels))
            one.set_xlabel("Training steps")
            one.set_xlim(left=0, right=max(c.steps[-1] for c in found))
            one.set_ylim(*_limits(found))
            thousands(one.xaxis)
        axes[0].set_ylabel("Test accuracy (%)")
        legend_below(figure, *axes)
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
    panels = scope_panels(row.scope for row in rows)
    names = [_label(method, mask or settings) for method, _, mask, settings in lines]
    with panel_figure(panels, 2.3, names) as (figure, axes):
        for one, panel in zip(axes, panels, strict=True):
            here = [key for key in sorted(lines, key=_place) if in_panel(key[1], panel)]
            for number, key in enumerate(here):
                shift = _DODGE ** (number - (len(here) - 1) / 2)
                _draw_line(one, key, sorted(lines[key], key=lambda row: row.density), shift)
            one.set_xscale("log")
            one.set_xticks([100 * d for d in densities], [f"{100 * d:g}" for d in densities])
            one.minorticks_off()
            one.set_xlabel("Weights kept (%)")
        axes[0].set_ylabel("Test accuracy (%)")
        legend_below(figure, *axes)
    return figure


def _draw_curve(axes: Any, curve: Curve, label: str, crowd: int) -> None:
    mean, deviation = spread(curve.values)
    percent = [100 * m for m in mean]
    style = method_style(curve.method)
    order = 3 if curve.method.startswith("ntt") else 2
    axes.plot(curve.steps, percent, color=style.colour, label=label, zorder=order)
    if len(curve.values) > 1:
        low = [m - 100 * d for m, d in zip(percent, deviation, strict=True)]
        high = [m + 100 * d for m, d in zip(percent, deviation, strict=True)]
        alpha = 0.18 if crowd <= 5 else 0.08
        axes.fill_between(curve.steps, low, high, color=style.colour, alpha=alpha, lw=0)


def _draw_line(
    axes: Any, key: tuple[str, str, str, str], members: Sequence[Row], shift: float
) -> None:
    method, _, mask, settings = key
    style, label = method_style(method), _label(method, mask or settings)
    mean = [row.test or 0.0 for row in members]
    error = [row.test_spread or 0.0 for row in members]
    if method == "dense":
        axes.axhline(mean[0], color=style.colour, lw=1.0, ls=(0, (1, 1)), label=label)
        axes.axhspan(mean[0] - error[0], mean[0] + error[0], color="#000000", alpha=0.08)
        return
    axes.errorbar(
        [100 * row.density * shift for row in members],
        mean,
        yerr=error if any(error) else None,
        color=style.colour,
        marker=style.marker,
        markersize=3.6,
        lw=1.0,
        elinewidth=0.7,
        capsize=1.2,
        label=label,
        zorder=3 if method.startswith("ntt") else 2,
    )


def _label(method: str, mask: str) -> str:
    return line_label(method, None, several_scopes=False, mask=mask)


def _place(key: tuple[str, str, str, str]) -> tuple[Any, ...]:
    return (method_order(key[0]), *key[1:])


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
