"""Test accuracy against the share of weights kept."""

from collections.abc import Sequence
from typing import Any

from ..methods import method, method_order
from ..results import Run
from ..table import Row, make_rows
from ._style import (
    describe,
    in_panel,
    line_label,
    minor_ticks,
    new_figure,
    scope_panels,
)

_DODGE = 1.012  # from one method to the next, so that error bars do not hide one another


def sparsity_figure(runs: Sequence[Run]) -> Any | None:
    """Test accuracy against the share of weights kept; `None` with fewer than two densities."""
    results = [run.result for run in runs if run.result is not None]
    rows = [row for row in make_rows(results) if row.test is not None]
    densities = sorted({row.density for row in rows if row.method != "dense"})
    if len(densities) < 2:
        return None
    lines: dict[tuple[str, str, str], list[Row]] = {}
    for row in sorted(rows, key=lambda row: (method_order(row.method), row.density)):
        lines.setdefault((row.method, row.scope, row.mask or row.settings), []).append(row)
    panels = scope_panels(row.scope for row in rows)
    labels = [line_label(name, mask=mask) for name, _, mask in lines]
    caption = describe(runs, "bars and grey band")
    with new_figure(caption, 2.2, labels, panels, sharey=True) as (figure, axes):
        for one, panel in zip(axes[0], panels, strict=True):
            here = [key for key in lines if in_panel(key[1], panel)]
            for number, key in enumerate(here):
                shift = _DODGE ** (number - (len(here) - 1) / 2)
                _draw_line(one, line_label(key[0], mask=key[2]), lines[key], shift)
            one.set_xscale("log")
            one.set_xticks([100 * d for d in densities], [f"{100 * d:g}" for d in densities])
            minor_ticks(one.xaxis)
            one.set_xlabel("Weights kept (%)")
        axes[0][0].set_ylabel("Test accuracy (%)")
    return figure


def _draw_line(axes: Any, label: str, members: Sequence[Row], shift: float) -> None:
    style = method(members[0].method)
    mean = [row.test or 0.0 for row in members]
    error = [row.test_spread or 0.0 for row in members]
    look: Any = {"color": style.colour, "ls": style.dashes, "lw": 1.0, "label": label}
    if members[0].method == "dense":
        axes.axhline(mean[0], **look)
        axes.axhspan(mean[0] - error[0], mean[0] + error[0], color="#000000", alpha=0.08)
        return
    look |= {"marker": style.marker, "ms": 3.6, "elinewidth": 0.7, "capsize": 1.2}
    places, order = [100 * row.density * shift for row in members], 3 if style.kernel else 2
    axes.errorbar(places, mean, yerr=error if any(error) else None, zorder=order, **look)
