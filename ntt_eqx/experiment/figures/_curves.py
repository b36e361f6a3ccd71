"""Figures over steps: test accuracy, and the distances of outputs and kernels."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from .._errors import ExperimentError
from ..methods import Line, method, method_order
from ..metrics import METRICS, read_metrics
from ..results import Run
from ._style import (
    arrange,
    describe,
    in_panel,
    line_of,
    new_figure,
    plain_decades,
    thousands,
)

_FEWEST = 3  # two points are a ruled line
_MARKS = 40  # refreshes of the mask that are marked one by one
_DISTANCES = {"kernel_distance": "Kernel distance", "target_distance": "Target distance"}
_KERNEL = {
    "alignment": "Alignment with labels",
    "effective_rank": "Effective rank",
    "eigenvalue_1": "Largest eigenvalue",
}


def accuracy_figure(runs: Sequence[Run]) -> Any | None:
    """Test accuracy from the first look after step 0 on, where all networks guess."""
    found = _curves(runs, "train", lambda row: row.get("test", {}).get("accuracy"), first=1)
    if not found:
        return None
    panels, looks = arrange(curve.line for curve in found)
    band = 0.15 if len(found) <= 4 * len(panels) else 0.07
    caption = describe(runs, _BAND)
    with new_figure(caption, 2.1, looks.values(), panels, sharey=True) as (figure, axes):
        for one, panel in zip(axes[0], panels, strict=True):
            for curve in found:
                if in_panel(curve.line, panel):
                    curve.draw(one, looks[curve.line], scale=100.0, band=band)
            _label_steps(one, "Training steps")
        axes[0][0].set_ylabel("Test accuracy (%)")
    return figure


def distances_figure(runs: Sequence[Run]) -> Any | None:
    """Both distances on held-out images; refreshes of the mask are marked along the steps."""
    rows = [_curves(runs, "transfer", _reader(name)) for name in _DISTANCES]
    found = [curve for row in rows for curve in row]
    if not found:
        return None
    panels, looks = arrange(curve.line for curve in found)
    runs = [run for run in runs if run.config["method"] in {c.line.method for c in found}]
    refreshes = _refreshes(runs, max(c.steps[-1] for c in found))
    each = len(refreshes) <= _MARKS  # else one line from the first to the last
    mark = "mask refresh" if each else f"mask refreshes, every {refreshes[0]} steps"
    labels = [*looks.values(), *([mark] if refreshes else [])]
    caption = describe(runs, _BAND)
    with new_figure(caption, 3.0, labels, panels, 2, sharex=True, sharey="row") as (figure, axes):
        for line, row, label in zip(axes, rows, _DISTANCES.values(), strict=True):
            for one, panel in zip(line, panels, strict=True):
                _draw_panel(one, panel, row, looks)
                one.set_yscale("log")
                plain_decades(one.yaxis)
                if refreshes:
                    look: Any = {"color": "#777777", "ms": 6, "mew": 0.8, "lw": 0.8, "label": mark}
                    look["transform"] = one.get_xaxis_transform()
                    at = refreshes if each else [refreshes[0], refreshes[-1]]
                    one.plot(at, [0.03] * len(at), "|" if each else "|-", **look)
                _label_steps(one, "")
            line[0].set_ylabel(label)
        for one in axes[-1]:
            one.set_xlabel("Transfer steps")
    return figure


def kernel_figure(runs: Sequence[Run]) -> Any | None:
    """Tangent kernel in training: alignment with labels, effective rank, largest eigenvalues."""
    rows = [_curves(runs, "train", _of_kernel(name)) for name in _KERNEL]
    found = [curve for row in rows for curve in row]
    if not found:
        return None
    panels, looks = arrange(curve.line for curve in found)
    caption = describe([run for run in runs if line_of(run) in looks], _BAND)
    with new_figure(caption, 4.2, looks.values(), panels, 3, sharex=True, sharey="row") as (
        figure,
        axes,
    ):
        for line, row, label in zip(axes, rows, _KERNEL.values(), strict=True):
            for one, panel in zip(line, panels, strict=True):
                _draw_panel(one, panel, row, looks)
                _label_steps(one, "")
            line[0].set_ylabel(label)
        for one in axes[-1]:
            one.set_yscale("log")
            plain_decades(one.yaxis)
            one.set_xlabel("Training steps")
    return figure


_BAND = "band: ± standard deviation"


def _draw_panel(axes: Any, panel: str | None, row: Sequence["_Curve"], looks: Any) -> None:
    for curve in row:
        if in_panel(curve.line, panel):
            curve.draw(axes, looks[curve.line], floor=0.1)


@dataclasses.dataclass(frozen=True)
class _Curve:
    """One quantity against steps, for one method at one density, for every seed."""

    line: Line
    steps: list[int]  # where the quantity was taken
    values: np.ndarray  # `[seeds, steps]`

    def draw(
        self,
        axes: Any,
        own: Mapping[str, Any],
        *,
        scale: float = 1.0,
        floor: float = 0.0,
        band: float = 0.15,
    ) -> None:
        """Draw the mean, and a band of one sample standard deviation where there are more seeds."""
        style, mean = method(self.line.method), self.values.mean(0)
        look: Any = {"color": style.colour, "ls": style.dashes, "marker": style.marker, "ms": 3.2}
        look |= {"zorder": 3 if style.kernel else 2, **own}
        every = max(1, -(-len(self.steps) // 6))
        marks = (method_order(self.line.method) % every, every)
        axes.plot(self.steps, scale * mean, markevery=marks, **look)
        if len(self.values) > 1:
            deviation = self.values.std(0, ddof=1)
            low = scale * (mean - deviation).clip(min=floor * mean)
            high = scale * (mean + deviation)
            axes.fill_between(self.steps, low, high, color=style.colour, alpha=band, lw=0)


def _curves(
    runs: Iterable[Run],
    phase: str,
    pick: Callable[[dict[str, Any]], float | None],
    first: int = 0,
) -> list[_Curve]:
    """The curves of `runs` with three points or more, by method and scope, in legends' order."""
    groups: dict[tuple[Line, str], list[dict[int, float]]] = {}
    for run in runs:
        rows = [row for row in read_metrics(run.directory) if row.get("phase") == phase]
        try:
            picked = [(row["step"], pick(row)) for row in rows]
            points = {int(step): float(value) for step, value in picked if value is not None}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ExperimentError(
                f"{run.directory / METRICS}: its rows are not those of a run ({error!r})."
            ) from error
        if points:
            key = (line_of(run), str((run.result or {}).get("settings_id", "")))
            groups.setdefault(key, []).append(points)
    found = []
    for (line, _), members in groups.items():
        shared = sorted(step for step in set.intersection(*map(set, members)) if step >= first)
        if len(shared) >= _FEWEST:
            values = np.array([[member[step] for step in shared] for member in members])
            found.append(_Curve(line, shared, values))
    return sorted(found, key=lambda curve: curve.line.order)


def _label_steps(axes: Any, label: str) -> None:
    axes.set_xlabel(label)
    axes.margins(x=0.02)
    thousands(axes.xaxis)


def _refreshes(runs: Sequence[Run], last: int) -> list[int]:
    """Steps after which masks were chosen again, if the runs agree on them."""
    found = {(run.config.get("transfer") or {}).get("mask_every", 0) for run in runs}
    every = found.pop() if len(found) == 1 else 0
    return list(range(every, last - every, every)) if isinstance(every, int) and every > 0 else []


def _reader(name: str) -> Callable[[dict[str, Any]], float | None]:
    def read(row: dict[str, Any]) -> float | None:
        value = (row.get("validation") or row.get("train") or {}).get(name)
        return value if value is not None and value > 0 else None

    return read


def _of_kernel(name: str) -> Callable[[dict[str, Any]], float | None]:
    return lambda row: (row.get("kernel") or {}).get(name)
