"""All cells of a comparison: planned, run one after another, tabulated."""

import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from ..data import DATASETS, DatasetError, check_dataset_name
from ..models import MODELS
from ._errors import Diverged, ExperimentError, check_choice
from ._files import read_json, write_json
from .cells import Cell
from .images import ImageShelf
from .methods import available_methods, check_fits
from .progress import Display
from .report import write_figures, write_tables
from .results import CELLS, Run, read_result
from .run_cell import Surroundings, dense_initialisation, run_cell
from .settings import CompareSettings, to_json
from .table import make_rows, plain_cells


def check_names(settings: CompareSettings) -> None:
    """Check the names in `settings` against what there is.

    **Raises:**

    `ExperimentError`: for an unknown dataset, model or method, with the allowed ones.
    """
    for name in (*settings.datasets, settings.transfer.dataset):
        if name is not None:
            check_dataset(name)
    for name in settings.models:
        check_choice("model", name, MODELS)
    for name in settings.methods:
        check_choice("method", name, available_methods())


def check_dataset(name: str) -> None:
    """Raise `ExperimentError` unless `name` is a dataset, some of its classes, two, or a folder."""
    for part in [] if name.startswith("npy:") else name.split("+"):
        check_choice("dataset", part.partition(":")[0], DATASETS)
    try:
        check_dataset_name(name)
    except DatasetError as error:
        raise ExperimentError(str(error)) from error


def check_cells(cells: Sequence[Cell], shelf: ImageShelf) -> None:
    """Check every mask and every dataset that `cells` need before anything is computed.

    **Raises:**

    `ExperimentError`: for a mask that does not fit its network, or images without labels.
    """
    teachers: dict[tuple[str, str], Any] = {}
    for cell in cells:
        images = shelf.load(cell.dataset)
        if cell.training is not None:
            images.check_labelled()
        place = (cell.dataset, cell.model)
        if place not in teachers:
            teachers[place] = dense_initialisation(cell, images)
        check_fits(cell, teachers[place])


def run_sweep(cells: Sequence[Cell], out: Path, around: Surroundings) -> list[str]:
    """Run every cell that is not done; tables are written after each.

    A cell whose loss diverges is left as it is and the others go on.

    **Arguments:**

    - `cells`: what to do.
    - `out`: the directory of the comparison; each cell gets its own below `out/cells`.
    - `around`: data, display and the like.

    **Returns:**

    One message for each cell that failed.

    **Raises:**

    `Interrupted`: when a stop was asked for.
    """
    failures: list[str] = []
    results: list[dict[str, Any]] = []
    for number, cell in enumerate(cells, start=1):
        directory = out / CELLS / cell.folder
        done = (directory / "result.json").exists()
        title = f"[{number}/{len(cells)}] {cell.name}"
        if len({c.dataset for c in cells}) > 1 or len({c.model for c in cells}) > 1:
            title += f" ({cell.dataset}, {cell.model})"
        try:
            result = run_cell(cell, directory, around, title)
        except Diverged as error:
            failures.append(str(error))
            around.display.say(str(error))
            continue
        results.append(result)
        write_tables(results, out)
        if not done and result["test_accuracy"] is not None:
            around.display.say(
                f"{title}: test accuracy {100 * result['test_accuracy']:.2f} %, "
                f"train accuracy {100 * result['train_accuracy']:.2f} %"
            )
    return failures


def finish(cells: Sequence[Cell], out: Path, display: Display) -> list[dict[str, Any]]:
    """Write the tables and figures of the finished cells, and show the table."""
    runs = [
        Run(directory, "done", cell.to_json(), read_result(directory))
        for cell in cells
        if ((directory := out / CELLS / cell.folder) / "result.json").exists()
    ]
    results = [run.result for run in runs if run.result is not None]
    if not results:
        return []
    write_tables(results, out)
    figures = write_figures(runs, out / "figures", display.say)
    display.table(*plain_cells(make_rows(results)))
    names = sorted({path.stem for path in figures})
    display.say(f"results: {out / 'results.json'}, {out / 'table.md'}")
    display.say(f"figures: {out / 'figures'} ({', '.join(names)}; PNG and SVG)")
    return results


def record_command(out: Path, command: str, settings: CompareSettings) -> None:
    """Write what was asked for, with the versions of what computes it, into `out/config.json`.

    **Raises:**

    `ExperimentError`: when `out` belongs to another command or program.
    """
    path = out / "config.json"
    if path.exists():
        found = read_json(path)
        if not isinstance(found, dict) or found.get("command") != command:
            raise ExperimentError(
                f"{out}: is not the directory of an `ntt-eqx {command}`; choose another folder "
                "with --out."
            )
    names = ("ntt-eqx", "jax", "jaxlib", "equinox", "optax", "grain", "numpy")
    write_json(
        path,
        {
            "command": command,
            "settings": to_json(settings),
            "versions": {name: _version(name) for name in names},
            "python": platform.python_version(),
            "platform": platform.platform(),
            "devices": [device.device_kind for device in jax.devices()],
        },
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
