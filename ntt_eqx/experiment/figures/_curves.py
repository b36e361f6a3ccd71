"""The curves that figures draw, gathered from the metrics of finished cells."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .._errors import ExperimentError
from ..methods import method, method_order
from ..metrics import read_metrics
from ..results import Run
from ._style import line_label, spread

_FEWEST = 3  # two points are a ruled line


@dataclasses.dataclass(frozen=True)
class Curve:
    """One quantity against steps, for one method at one density, for every seed."""

    method: str  # how the mask was chosen
    scope: str | None  # `layer`, `global`, or `None`
    mask: str  # how weights are kept together or ablated; empty for plain masks
    steps: Sequence[int]  # where the quantity was taken
    values: Sequence[Sequence[float]]  # one list for each seed

    @property
    def label(self) -> str:
        """What the legend calls it."""
        return line_label(self.method, mask=self.mask)

    def draw(
        self, axes: Any, *, scale: float = 1.0, floor: float = 0.0, band: float = 0.15
    ) -> None:
        """Draw the mean, and a band of one standard deviation where there are several seeds."""
        mean, deviation = spread(self.values)
        style, order = method(self.method), 3 if method(self.method).kernel else 2
        look = {"color": style.colour, "zorder": order, "label": self.label}
        every = max(1, -(-len(self.steps) // 6))
        axes.plot(
            self.steps, scale * mean, ls=style.dashes, marker=style.marker, ms=3.2, **look,
            markevery=(method_order(self.method) % every, every),
        )  # fmt: skip
        if len(self.values) > 1:
            low = (mean - deviation).clip(min=floor * mean)
            high = scale * (mean + deviation)
            axes.fill_between(self.steps, scale * low, high, color=style.colour, alpha=band, lw=0)


def curves(
    runs: Iterable[Run],
    phase: str,
    pick: Callable[[dict[str, Any]], float | None],
    *,
    first: int = 0,
) -> list[Curve]:
    """The curves of `runs`, one for each method and scope, in the order of legends.

    Returns those of at least three points.
    """
    groups: dict[tuple[str, str | None, str, str], list[dict[int, float]]] = {}
    for run in runs:
        path = run.directory / "metrics.jsonl"
        rows = [row for row in read_metrics(path) if row.get("phase") == phase]
        try:
            picked = [(row["step"], pick(row)) for row in rows]
            points = {int(step): float(value) for step, value in picked if value is not None}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ExperimentError(
                f"{path}: its rows are not those of a run ({error!r})."
            ) from error
        if points:
            result = run.result or {}
            names = str(result.get("mask") or ""), str(result.get("settings_id", ""))
            key = (run.config["method"], run.config.get("scope"), *names)
            groups.setdefault(key, []).append(points)
    found = []
    for (name, scope, mask, _), members in groups.items():
        shared = sorted(step for step in set.intersection(*map(set, members)) if step >= first)
        if len(shared) >= _FEWEST:
            values = [[member[step] for step in shared] for member in members]
            found.append(Curve(name, scope, mask, shared, values))
    return sorted(found, key=lambda c: (method_order(c.method), c.scope != "layer", c.mask))
