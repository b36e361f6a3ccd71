"""Kernel and target distance of the student to its teacher, against transfer steps."""

from collections.abc import Sequence
from typing import Any

from ..results import Run
from ._curves import curves
from ._style import describe, in_panel, new_figure, plain_decades, scope_panels, thousands

_ROWS = (("kernel_distance", "Kernel distance"), ("target_distance", "Target distance"))


def distances_figure(runs: Sequence[Run]) -> Any | None:
    """Both distances on held-out images; refreshes of the mask are marked along the steps."""
    rows = [(curves(runs, "transfer", _reader(name)), label) for name, label in _ROWS]
    found = [curve for curves_of_row, _ in rows for curve in curves_of_row]
    if not found:
        return None
    panels = scope_panels(c.scope for c in found)
    runs = [run for run in runs if run.config["method"] in {c.method for c in found}]
    refreshes = _refreshes(runs, max(c.steps[-1] for c in found))
    labels = [*(c.label for c in found), *(["mask refresh"] if refreshes else [])]
    caption = describe(runs, "band")
    with new_figure(caption, 3.0, labels, panels, 2, sharex=True, sharey="row") as (figure, axes):
        for line, (curves_of_row, label) in zip(axes, rows, strict=True):
            for one, panel in zip(line, panels, strict=True):
                for curve in curves_of_row:
                    if in_panel(curve.scope, panel):
                        curve.draw(one, floor=0.1)
                one.set_yscale("log")
                one.margins(x=0.02)
                plain_decades(one.yaxis)
                if refreshes:
                    bottom = {"transform": one.get_xaxis_transform(), "label": "mask refresh"}
                    look = {"color": "#777777", "ms": 6, "mew": 0.8}
                    one.plot(refreshes, [0.03] * len(refreshes), "|", **look, **bottom)
            line[0].set_ylabel(label)
        for one in axes[-1]:
            one.set_xlabel("Transfer steps")
            thousands(one.xaxis)
    return figure


def _refreshes(runs: Sequence[Run], last: int) -> list[int]:
    """Steps after which masks were chosen again, if the runs agree on them."""
    found = {(run.config.get("transfer") or {}).get("mask_every", 0) for run in runs}
    every = found.pop() if len(found) == 1 else 0
    return list(range(every, last - every, every)) if isinstance(every, int) and every > 0 else []


def _reader(name: str) -> Any:
    def read(row: dict[str, Any]) -> float | None:
        value = (row.get("validation") or row.get("train") or {}).get(name)
        return value if value is not None and value > 0 else None

    return read
