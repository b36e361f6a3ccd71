"""Tables and figures from what is on disk."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ._errors import ExperimentError, require
from ._files import write_text
from .figures import (
    accuracy_figure,
    densities_figure,
    distances_figure,
    masks_figure,
    save_figure,
    sparsity_figure,
)
from .figures._style import line_label, method_order
from .model_file import load_model
from .results import MODEL, Run, results_of, save_results
from .table import Row, latex, make_rows, markdown, to_csv

TABLES = ("table.md", "table.csv", "table.tex")


def write_tables(results: Sequence[dict[str, Any]], out: Path) -> list[Row]:
    """Write `results.json`, `table.md`, `table.csv` and `table.tex` into `out`."""
    results = sorted(results, key=_place)
    save_results(out / "results.json", list(results))
    rows = make_rows(results)
    for name, render in zip(TABLES, (markdown, to_csv, latex), strict=True):
        write_text(out / name, render(rows))
    return rows


def write_figures(runs: Sequence[Run], out: Path, on_problem: Callable[[str], None]) -> list[Path]:
    """Draw every figure that `runs` have the data for, as PNG and SVG, into `out`.

    Curves and masks are drawn for each dataset, model and density apart; the file names say which
    as soon as there is more than one.

    **Arguments:**

    - `runs`: finished cells.
    - `out`: a folder, made when needed.
    - `on_problem`: told about files that cannot be drawn from; the other figures are still drawn.
    """
    require("matplotlib")
    runs = [run for run in runs if run.result is not None]
    groups = _by(runs, ("dataset", "model"))
    written: list[Path] = []
    for (dataset, model), members in groups.items():
        place = f"-{_slug(dataset)}-{_slug(model)}" if len(groups) > 1 else ""
        written += _save(sparsity_figure(results_of(members)), out / f"sparsity{place}")
        dense = [run for run in members if run.config["method"] == "dense"]
        sparse = [run for run in members if run.config["method"] != "dense"]
        densities = _by(sparse, ("density",)) or {(1.0,): []}
        for (density,), cells in densities.items():
            suffix = place + (f"-{density:g}" if len(densities) > 1 else "")
            drawn: dict[str, Callable[[], Any]] = {
                "accuracy": lambda cells=cells, dense=dense: accuracy_figure([*cells, *dense]),
                "distances": lambda cells=cells: distances_figure(cells),
                "densities": lambda cells=cells: densities_figure(results_of(cells)),
                "masks": lambda cells=cells: _masks(cells),
            }
            for name, draw in drawn.items():
                try:
                    written += _save(draw(), out / f"{name}{suffix}")
                except ExperimentError as error:
                    on_problem(f"{name}{suffix} is not drawn: {error}")
    return written


def _masks(runs: Sequence[Run]) -> Any | None:
    first: dict[tuple[str, str | None, str], Run] = {}
    for run in sorted(runs, key=lambda r: r.config["seed"]):
        kind = str((run.result or {}).get("mask") or "")
        first.setdefault((run.config["method"], run.config.get("scope"), kind), run)
    several = len({scope for _, scope, _ in first if scope}) > 1
    masks, shape = {}, ()
    order = lambda key: (method_order(key[0]), key[1] != "layer", key[2])
    for method, scope, kind in sorted(first, key=order):
        loaded = load_model(first[method, scope, kind].directory / MODEL)
        shape = tuple(loaded.header["arguments"]["input_shape"])
        label = line_label(method, scope, several_scopes=several, mask=kind)
        masks[label] = np.asarray(jax.tree.leaves(loaded.model.mask)[0])
    return masks_figure(masks, shape) if masks else None


def _save(figure: Any | None, stem: Path) -> list[Path]:
    return [] if figure is None else save_figure(figure, stem)


def _by(runs: Sequence[Run], names: Sequence[str]) -> dict[tuple[Any, ...], list[Run]]:
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault(tuple(run.config[name] for name in names), []).append(run)
    return groups


def _place(result: dict[str, Any]) -> tuple[Any, ...]:
    return (
        result["dataset"],
        result["model"],
        -result["density"],
        method_order(result["method"]),
        result.get("scope") or "",
        result["seed"],
    )


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.+]+", "-", name).strip("-")
