"""Tables, figures and one page of both, from what is on disk."""

import base64
import html
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ._errors import ExperimentError, require
from ._files import encode_json
from .cells import slug
from .figures import (
    accuracy_figure,
    densities_figure,
    distances_figure,
    line_of,
    masks_figure,
    render_figure,
    sparsity_figure,
)
from .manifest import RunFolder, read_file
from .methods import Line
from .model_file import decode_model
from .progress import Display
from .published import published_beside
from .results import MODEL, Run
from .table import Cells, Row, latex, make_rows, markdown, table_cells, to_csv

_TABLES = {"table.md": markdown, "table.csv": to_csv, "table.tex": latex}
REPORT_FILES = ("results.json", *_TABLES, "report.html")
"""The content of a report, without its figures."""

_STYLE = """\
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; border-top: 2px solid; border-bottom: 2px solid; }
th, td { padding: 0.2rem 0.8rem; text-align: left; } th { border-bottom: 1px solid; }
.n { text-align: right; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
figure { margin: 2rem 0; } img { max-width: 100%; } figcaption { color: #555; }"""
_NOTE = """\
Test accuracy: mean ± sample standard deviation over seeds. Standard error: sqrt(p (1 - p) / n) of \
an accuracy p on the n test images, which all networks share. Scope: how the kept weights are \
shared out over the layers; layer ranks within each, global over all at once, erk keeps \
Erdős–Rényi shares."""
_CAPTIONS = {
    "accuracy": "Test accuracy while the networks train.",
    "sparsity": "Test error after training against the share of weights kept, both logarithmic.",
    "distances": "Distance of the student's kernel and outputs to its teacher's on held-out images "
    "during the transfer.",
    "masks": "Masks of the first layer: weights kept at each input, and single units.",
    "densities": "Share of weights kept in each layer.",
    "evolution": "Outputs on fixed test images while the networks train on the same batches.",
    "spectrum": "Eigenvalues of the tangent kernels before training.",
}


def write_tables(results: Sequence[dict[str, Any]], run: RunFolder) -> list[Row]:
    """Write `results.json`, `table.md`, `table.csv` and `table.tex` into the folder `run`.

    Below the table in `table.md` stand the published numbers of the protocol that was followed.
    """
    rows = make_rows(results)
    tables = {name: as_text(render(rows)) for name, render in _TABLES.items()}
    if beside := published_beside(results):
        tables["table.md"] += as_text(f"\n{beside}")
    run.write({"results.json": encode_json(sorted(results, key=_place)), **tables})
    return rows


def write_page(runs: Sequence[Run], run: RunFolder, title: str, display: Display) -> list[str]:
    """Draw the figures of `runs` into `figures/` of `run`, and put them with the table on a page.

    Returns the names of the figures.
    """
    with display.busy("drawing figures"):
        figures = draw_figures(runs, display.say)
    results = [found.result for found in runs if found.result is not None]
    trained = any(result.get("test_accuracy") is not None for result in results)
    note = _NOTE if trained else ""
    save_page(run, title, table_cells(make_rows(results)), figures, note)
    return sorted({name.rpartition(".")[0] for name in figures})


def save_page(
    run: RunFolder, title: str, table: Cells, figures: Mapping[str, bytes], note: str = ""
) -> None:
    """Write figures, and `report.html`: a table and the PNG ones in one page without links."""
    header, body, right = table
    line = lambda cells, tag: "".join(
        f'<{tag} class="n">{html.escape(c)}</{tag}>' if r else f"<{tag}>{html.escape(c)}</{tag}>"
        for c, r in zip(cells, right, strict=True)
    )
    rows = "\n".join(f"<tr>{line(cells, 'td')}</tr>" for cells in body)
    head = html.escape(title)
    parts = [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{head}</title>\n<style>{_STYLE}</style></head><body>\n<h1>{head}</h1>",
        f'<div class="wide"><table>\n<tr>{line(header, "th")}</tr>\n{rows}\n</table></div>',
        f"<p>{html.escape(note)}</p>",
    ]
    for name, content in figures.items():
        if name.endswith(".png"):
            kind, _, place = name.removesuffix(".png").partition("-")
            caption = html.escape(f"{_CAPTIONS.get(kind, kind)} {place}".strip())
            width = int.from_bytes(content[16:20], "big") // 2  # of the PNG's header
            parts.append(
                f'<figure><img src="data:image/png;base64,{base64.b64encode(content).decode()}" '
                f'width="{width}" alt="{kind}"><figcaption>{caption}</figcaption></figure>'
            )
    page = {"report.html": as_text("\n".join([*parts, "</body></html>\n"]))}
    run.write({f"figures/{name}": content for name, content in figures.items()} | page)


def draw_figures(runs: Sequence[Run], on_problem: Callable[[str], None]) -> dict[str, bytes]:
    """Draw every figure that `runs` have the data for, as PNG and SVG: contents by file name.

    Curves and masks are drawn for each dataset, model and density apart; the file names say which
    as soon as there is more than one.
    """
    require("matplotlib")
    groups = _by([run for run in runs if run.result is not None], ("dataset", "model"))
    drawn: dict[str, bytes] = {}

    def draw(name: str, make: Callable[[Sequence[Run]], Any], members: Sequence[Run]) -> None:
        try:
            figure = make(members)
        except ExperimentError as error:
            on_problem(f"{name} is not drawn: {error}")
        else:
            drawn.update({} if figure is None else render_figure(figure, name))

    for (dataset, model), members in groups.items():
        place = f"-{slug(dataset)}-{slug(model)}" if len(groups) > 1 else ""
        draw(f"sparsity{place}", sparsity_figure, members)
        dense = [run for run in members if run.config["method"] == "dense"]
        densities = _by([run for run in members if run not in dense], ("density",))
        for (density,), cells in (densities or {(1.0,): []}).items():
            suffix = place + (f"-{density:g}" if len(densities) > 1 else "")
            draw(f"accuracy{suffix}", accuracy_figure, [*cells, *dense])
            draw(f"distances{suffix}", distances_figure, cells)
            draw(f"densities{suffix}", densities_figure, cells)
            draw(f"masks{suffix}", _masks, cells)
    return drawn


def as_text(text: str) -> bytes:
    """A text file's content; of a path that is no text, question marks where it is not."""
    return text.encode(errors="replace")


def _masks(runs: Sequence[Run]) -> Any | None:
    first: dict[Line, Run] = {}
    for run in sorted(runs, key=lambda r: r.config["seed"]):
        first.setdefault(line_of(run), run)
    several = len({line.scope for line in first if line.scope}) > 1
    masks, shape = {}, ()
    for line in sorted(first, key=lambda line: line.order):
        folder = first[line].directory
        loaded = decode_model(folder / MODEL, read_file(folder, MODEL))
        shape = tuple(loaded.header["arguments"]["input_shape"])
        masks[line.label(several)] = np.asarray(jax.tree.leaves(loaded.model.mask)[0])
    return masks_figure(masks, shape, list(first.values()))


def _by(runs: Sequence[Run], names: Sequence[str]) -> dict[tuple[Any, ...], list[Run]]:
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault(tuple(run.config[name] for name in names), []).append(run)
    return groups


def _place(result: dict[str, Any]) -> tuple[Any, ...]:
    place = (result["dataset"], result["model"], -result["density"], Line.of(result).order)
    return (*place, result["seed"])
