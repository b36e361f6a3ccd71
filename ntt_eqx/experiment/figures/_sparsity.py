"""Test error against the share of weights kept, both on logarithmic axes."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..methods import Line, method
from ..results import Run, keeps_another_share
from ..table import line_in, rows_of, summarise
from ._style import arrange, describe, in_panel, minor_ticks, new_figure, plain_decades

_DODGE = 1.012  # from one method to the next, so that error bars do not hide one another
_SMALLEST = 0.005  # percent: half an image of 10,000, where an error of 0 is drawn


def sparsity_figure(runs: Sequence[Run]) -> Any | None:
    """Test error against the share of weights kept; `None` with fewer than two densities.

    Errors are logarithmic, too: at 1 % of the weights they differ by tens of points and at 30 % by
    tenths, and both can be read.
    """
    results = [run.result for run in runs if run.result is not None]
    table = summarise(results).dropna(subset="test").fillna({"test_error": 0.0})
    pruned = [row for row in rows_of(table) if row.method != "dense"]
    densities = sorted({row.density for row in pruned})
    if len(densities) < 2:
        return None
    apart = any(keeps_another_share(row.kept, row.density) for row in pruned)
    lines: dict[Line, list[Any]] = {}
    for row in sorted(rows_of(table), key=lambda row: (line_in(row).order, row.density)):
        lines.setdefault(line_in(row), []).append(row)
    panels, looks = arrange(lines)
    bars = "bars and grey band: ± standard error"
    known = bool(table.test_error.any())
    caption = describe(runs, bars, f"{bars} of the test images" if known else "")
    with new_figure(caption, 2.4, looks.values(), panels, sharey=True) as (figure, axes):
        for one, panel in zip(axes[0], panels, strict=True):
            here = [line for line in lines if in_panel(line, panel)]
            for number, line in enumerate(here):
                shift = _DODGE ** (number - (len(here) - 1) / 2)
                _draw_line(one, looks[line], lines[line], shift)
            one.set(xscale="log", yscale="log", xlabel="Weights kept (%)")
            if apart:
                plain_decades(one.xaxis)
            else:
                one.set_xticks([100 * d for d in densities], [f"{100 * d:g}" for d in densities])
                minor_ticks(one.xaxis)
            plain_decades(one.yaxis)
        axes[0][0].set_ylabel("Test error (%)")
    return figure


def _kept(row: Any) -> float:
    """The share of weights that is kept; the density where a result does not say it."""
    return row.density if row.kept != row.kept else row.kept


def _draw_line(axes: Any, own: Mapping[str, Any], members: Sequence[Any], shift: float) -> None:
    line = line_in(members[0])
    style = method(line.method)
    error = [max(100.0 - row.test, _SMALLEST) for row in members]
    # a bar that reached 0 would have no end on this axis
    spread = [(min(row.test_error, 0.9 * e), row.test_error)
              for row, e in zip(members, error, strict=True)]  # fmt: skip
    look: Any = {"color": style.colour, "ls": style.dashes, "lw": 1.0}
    if line.method == "dense":
        axes.axhline(error[0], **look, label=own["label"])
        below, above = spread[0]
        axes.axhspan(error[0] - below, error[0] + above, color="#000000", alpha=0.08)
        return
    look |= {"marker": style.marker, "ms": 3.6, **own}
    look |= {"elinewidth": 0.7, "capsize": 1.2, "zorder": 3 if style.kernel else 2}
    places = [100 * _kept(row) * shift for row in members]
    bars = list(zip(*spread, strict=True)) if any(map(any, spread)) else None
    axes.errorbar(places, error, yerr=bars, **look)
