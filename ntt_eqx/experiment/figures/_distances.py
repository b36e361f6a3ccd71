"""Kernel and target distance of the student to its teacher, against transfer steps."""

from collections.abc import Sequence
from typing import Any

from ..results import Run
from ._curves import curves
from ._style import (
    COLUMN,
    legend_below,
    line_label,
    line_style,
    method_style,
    new_figure,
    plain_decades,
    spread,
    thousands,
)

_PANELS = (("kernel_distance", "Kernel distance"), ("target_distance", "Target distance"))


def distances_figure(runs: Sequence[Run]) -> Any | None:
    """Both distances on held-out images, means over seeds; `None` when nothing was transferred."""
    panels = [(curves(runs, "transfer", _reader(name)), label) for name, label in _PANELS]
    if not any(found for found, _ in panels):
        return None
    several = len({c.scope for c in panels[0][0] if c.scope}) > 1
    with new_figure(COLUMN, 3.4, rows=2, sharex=True) as (figure, both):
        for axes, (found, label) in zip(both, panels, strict=True):
            for curve in found:
                mean, deviation = spread(curve.values)
                style = method_style(curve.method)
                axes.plot(
                    curve.steps,
                    mean,
                    color=style.colour,
                    linestyle=line_style(curve.scope),
                    label=line_label(
                        curve.method, curve.scope, several_scopes=several, mask=curve.mask
                    ),
                )
                if len(curve.values) > 1:
                    low = [max(m - d, m / 10) for m, d in zip(mean, deviation, strict=True)]
                    high = [m + d for m, d in zip(mean, deviation, strict=True)]
                    axes.fill_between(curve.steps, low, high, color=style.colour, alpha=0.18, lw=0)
            axes.set_yscale("log")
            axes.set_ylabel(label)
            axes.margins(x=0.0)
            plain_decades(axes.yaxis)
        both[-1].set_xlabel("Transfer steps")
        thousands(both[-1].xaxis)
        legend_below(figure, both[0])
    return figure


def _reader(name: str) -> Any:
    def read(row: dict[str, Any]) -> float | None:
        seen = row.get("validation") or row.get("train") or {}
        value = seen.get(name)
        return value if value is not None and value > 0 else None

    return read
