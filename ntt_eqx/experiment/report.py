"""Tables, figures and one page of both, from what is on disk."""

import base64
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ._errors import ExperimentError, require
from ._files import encode_json
from .cells import slug
from .environment import command, environment
from .figures import (
    accuracy_figure,
    densities_figure,
    distances_figure,
    kernel_figure,
    line_of,
    masks_figure,
    render_figure,
    sparsity_figure,
)
from .manifest import RunFolder, read_file
from .methods import Line
from .model_file import decode_model
from .progress import Display, duration
from .published import published_beside
from .results import MODEL, Run
from .settings import MaskSettings, from_json
from .table import Cells, latex, markdown, shown, summarise, to_csv

REPORT_FILES = ("results.json", "table.md", "table.csv", "table.tex", "report.html")
"""The content of a report, without its figures."""

_NOTE = """\
±: standard error. Of several seeds it is that of their mean, sample standard deviation / \
sqrt(seeds); of one seed that of its test images, sqrt(p (1 - p) / n) for an accuracy p on n of \
them. Over: mean difference from that row, seed by seed, in points; for masks of a kind from \
random ones of that kind, if there are some. Scope: how the kept weights are shared out over the \
layers; layer ranks within each, global over all at once, erk keeps Erdős–Rényi shares."""
_SHORT_NOTE = (
    "±: standard error, over seeds or, of one, of its test images. Over: difference, seed by seed."
)
_CAPTIONS = {
    "accuracy": "Test accuracy while the networks train.",
    "sparsity": "Test error after training against the share of weights kept, both logarithmic.",
    "kernel": "The tangent kernel of fixed test images while the networks train: alignment with "
    "their labels, effective rank (exponential of the spectrum's entropy), largest eigenvalues.",
    "distances": "Distance of the student's kernel and outputs to its teacher's on held-out images "
    "during the transfer.",
    "masks": "Masks of the first layer: weights kept at each input, and single units.",
    "densities": "Share of weights kept in each layer.",
    "evolution": "Outputs on fixed test images while the networks train on the same batches.",
    "spectrum": "Eigenvalues of the tangent kernels before training.",
}


def write_tables(
    results: Sequence[dict[str, Any]], run: RunFolder, failed: Sequence[Run] = ()
) -> Cells:
    """Write `results.json`, `table.md`, `table.csv` and `table.tex` into the folder `run`.

    Below the table in `table.md` stand what its numbers are, which networks of the comparison
    `failed` and are not in it, and the published numbers of the protocol that was followed. Returns
    the table.
    """
    table = summarise(results)
    cells = shown(table)
    tables = {"md": markdown(cells), "csv": to_csv(table), "tex": latex(cells)}
    tables["md"] += "".join(f"\n{text}\n" for text in _notes(results, failed))
    if beside := published_beside(results):
        tables["md"] += f"\n{beside}"
    texts = {f"table.{kind}": as_text(text) for kind, text in tables.items()}
    run.write({"results.json": encode_json(sorted(results, key=_place)), **texts})
    return cells


def show_table(table: Cells, display: Display) -> None:
    """Show a table, and say what ± is if there is one."""
    display.table(table)
    if any("±" in cell for line in table[1] for cell in line):
        display.say(_SHORT_NOTE)


def write_page(
    runs: Sequence[Run],
    run: RunFolder,
    title: str,
    display: Display,
    settings: Mapping[str, Any] | None = None,
    failed: Sequence[Run] = (),
) -> list[str]:
    """Draw the figures of `runs` into `figures/` of `run`, and put them with the table on a page.

    It says which other networks `failed`. Returns the names of the figures.
    """
    with display.busy("drawing figures"):
        figures = draw_figures(runs, display.say)
    results = [found.result for found in runs if found.result is not None]
    notes = " ".join(_notes(results, failed))
    page = Page(title, shown(summarise(results)), notes, _facts(results))
    save_page(run, dataclasses.replace(page, settings=settings), figures)
    return sorted({name.rpartition(".")[0] for name in figures})


@dataclasses.dataclass(frozen=True)
class Page:
    """What stands in a `report.html` beside its figures."""

    title: str
    table: Cells
    note: str = ""  # below the table
    facts: Mapping[str, str] = dataclasses.field(default_factory=dict)  # seeds, times and the like
    settings: Mapping[str, Any] | None = None  # all of them, as JSON values


def save_page(run: RunFolder, page: Page, figures: Mapping[str, bytes]) -> None:
    """Write figures, and `report.html`: a table and the PNG ones in one page without links.

    Figures of an earlier report that are not among them are removed.
    """
    jinja2 = require("jinja2")
    loader = jinja2.PackageLoader(__package__)
    template = jinja2.Environment(loader=loader, autoescape=True).get_template("report.html")
    header, body, right = page.table
    made = environment()
    versions = {**{n: v for n, v in made["versions"].items() if v}, "Python": made["python"]}
    text = template.render(
        title=page.title,
        header=header,
        body=body,
        right=right,
        note=page.note,
        figures=[_figure(name, png) for name, png in figures.items() if name.endswith(".png")],
        facts={
            **({"Command": command()} if command() else {}),
            **page.facts,
            "Versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
            "Machine": ", ".join([made["platform"], *dict.fromkeys(made["devices"])]),
        },
        settings=json.dumps(page.settings, indent=2) if page.settings else "",
    )
    contents = {f"figures/{name}": content for name, content in figures.items()}
    run.remove([name for name in run.names("figures/") if name not in contents])
    run.write({**contents, "report.html": as_text(text)})


def _figure(name: str, content: bytes) -> dict[str, Any]:
    kind = name.removesuffix(".png").partition("-")[0]
    return {
        "kind": kind,
        "caption": _CAPTIONS.get(kind, kind),  # the figure itself names data, model and density
        "content": base64.b64encode(content).decode(),
        "width": int.from_bytes(content[16:20], "big") // 2,  # of the PNG's header
    }


def _facts(results: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Numbers of networks and seeds, and the time that they took."""
    spent = {
        name: duration(sum(result.get(field) or 0.0 for result in results))
        for name, field in (
            ("in all", "seconds"),
            ("choosing masks", "mask_seconds"),
            ("transfer", "transfer_seconds"),
            ("training", "train_seconds"),
        )
        if any(result.get(field) for result in results)
    }
    return {
        "Networks": str(len(results)),
        "Seeds": ", ".join(map(str, sorted({result["seed"] for result in results}))),
        **({"Time": ", ".join(f"{name} {text}" for name, text in spent.items())} if spent else {}),
    }


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
            draw(f"kernel{suffix}", kernel_figure, [*cells, *dense])
            draw(f"distances{suffix}", distances_figure, cells)
            draw(f"densities{suffix}", densities_figure, cells)
            draw(f"masks{suffix}", _masks, cells)
    return drawn


def _notes(results: Sequence[dict[str, Any]], failed: Sequence[Run]) -> list[str]:
    """The notes below a table: the meaning of its numbers, and the networks that are missing."""
    trained = any(result.get("test_accuracy") is not None for result in results)
    seeds: dict[str, list[int]] = {}
    for run in failed:
        config = run.config
        asked = config.get("mask")
        mask = asked and from_json(MaskSettings, asked, where=str(run.directory)).label
        name = Line.of({**config, "mask": mask}).label(scoped=True)
        place = ", ".join((config["dataset"], config["model"], f"{config['density']:g}", name))
        seeds.setdefault(place, []).append(config["seed"])
    missing = "; ".join(f"{place}, seed {', '.join(map(str, n))}" for place, n in seeds.items())
    return [
        *([_NOTE] if trained else []),
        *([f"Failed, and not in the table: {missing}."] if missing else []),
    ]


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
