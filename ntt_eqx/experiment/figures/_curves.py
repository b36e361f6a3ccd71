"""The curves that figures draw, gathered from the metrics of finished cells."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .._errors import ExperimentError
from ..metrics import read_metrics
from ..results import Run
from ._style import method_order


@dataclasses.dataclass(frozen=True)
class Curve:
    """One quantity against steps, for one method at one density, for every seed.

    Attributes:
        method: how the mask was chosen.
        scope: `layer`, `global`, or `None`.
        mask: how weights are kept together or ablated; empty for plain masks.
        steps: where the quantity was taken.
        values: one list for each seed.
    """

    method: str
    scope: str | None
    mask: str
    steps: Sequence[int]
    values: Sequence[Sequence[float]]


def curves(
    runs: Iterable[Run], phase: str, pick: Callable[[dict[str, Any]], float | None]
) -> list[Curve]:
    """The curves of `runs`, one for each method and scope, in the order of legends.

    **Arguments:**

    - `runs`: finished cells of one dataset, model and density.
    - `phase`: `"transfer"` or `"train"`.
    - `pick`: the value of a row of metrics, `None` where the row lacks it.
    """
    groups: dict[tuple[str, str | None, str, str], list[list[tuple[int, float]]]] = {}
    for run in runs:
        path = run.directory / "metrics.jsonl"
        rows = [row for row in read_metrics(path) if row.get("phase") == phase]
        try:
            picked = [(row["step"], pick(row)) for row in rows]
            points = [(int(step), float(value)) for step, value in picked if value is not None]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ExperimentError(
                f"{path}: its rows are not those of a run ({error!r})."
            ) from error
        if points:
            result = run.result or {}
            key = (
                run.config["method"],
                run.config.get("scope"),
                str(result.get("mask") or ""),
                str(result.get("settings_id", "")),
            )
            groups.setdefault(key, []).append(points)
    found = []
    for (method, scope, mask, _), members in groups.items():
        shared = sorted(set.intersection(*(set(step for step, _ in m) for m in members)))
        lookup = [dict(m) for m in members]
        found.append(Curve(method, scope, mask, shared, [[m[s] for s in shared] for m in lookup]))
    return sorted(found, key=lambda c: (method_order(c.method), c.scope != "layer", c.mask))
