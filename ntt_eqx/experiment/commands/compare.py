"""`ntt-eqx compare`."""

import dataclasses
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro

from .._errors import Diverged, ExperimentError
from .._files import check_folder, locked, read_json, write_json
from ..cells import Cell, plan
from ..estimate import estimate, show_plan
from ..images import ImageShelf
from ..loop import StopRequest
from ..progress import Display, make_display
from ..report import write_page, write_tables
from ..results import CELLS, Run, read_result
from ..running import RunContext, check_cells, run_cell
from ..settings import PRESETS, CompareSettings, check, to_json
from ..table import make_rows, table_cells
from ._options import RunOptions, accuracies, check_names

_PACKAGES = ("ntt-eqx", "jax", "jaxlib", "equinox", "optax", "grain", "numpy")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compare(RunOptions):
    """Make and train sparse networks by several methods, and compare them.

    Every method at every scope, density and seed is a unit of its own: finished ones are skipped
    and an interrupted one is continued when the same command is given again with the same --out.
    Ends with a table, figures and report.html. The defaults shown are those of the chosen preset.
    """

    # what is compared
    settings: Annotated[CompareSettings, tyro.conf.arg(name="")] = PRESETS["quick"]
    # where defaults come from: `quick` ends within minutes, `paper` is the published protocol.
    # Single options and --config change it
    preset: Literal["quick", "paper"] = "quick"
    # JSON file with fields like those of config.json's `settings`; options override it
    config: Path | None = None
    out: Path = Path("runs/compare")
    plan_only: bool = False  # show what would be done, and stop

    def run(self) -> int:
        """Run the comparison; returns the exit status."""
        settings = check_names(check(self.settings))
        cells, shelf, out = plan(settings), ImageShelf(self.data_dir), self.out
        check_cells(cells, shelf)
        with make_display() as display, StopRequest() as stop:
            if self.plan_only:
                check_folder(out)
                show_plan(cells, out, shelf, display, None)
                return 0
            with locked(out):
                _record(out, settings)
                context = RunContext(shelf, display, stop, self.checkpoint_every)
                show_plan(cells, out, shelf, display, estimate(cells, out, context))
                failures = run_cells(cells, out, context)
                finish(cells, out, display)
        return 1 if failures else 0


def run_cells(cells: Sequence[Cell], out: Path, context: RunContext) -> list[str]:
    """Run every cell that is not done; tables are written after each.

    A cell whose loss diverges is left as it is and the others go on.

    Returns one message for each cell that failed. Raises `Interrupted` when a stop was asked for.
    """
    failures: list[str] = []
    results: list[dict[str, Any]] = []
    several = len({(cell.dataset, cell.model) for cell in cells}) > 1
    for number, cell in enumerate(cells, start=1):
        directory = out / CELLS / cell.folder
        done = (directory / "result.json").exists()
        title = f"[{number}/{len(cells)}] {cell.name}"
        title += f" ({cell.dataset}, {cell.model})" if several else ""
        try:
            result = run_cell(cell, directory, context, title)
        except Diverged as error:
            failures.append(str(error))
            context.display.say(str(error))
            continue
        results.append(result)
        write_tables(results, out)
        if not done and result["test_accuracy"] is not None:
            context.display.say(f"{title}: {accuracies(result)}")
    return failures


def finish(cells: Sequence[Cell], out: Path, display: Display) -> None:
    """Write the tables, figures and page of the finished cells, and show the table."""
    runs = [
        Run(directory, "done", cell.to_json(), read_result(directory))
        for cell in cells
        if ((directory := out / CELLS / cell.folder) / "result.json").exists()
    ]
    results = [run.result for run in runs if run.result is not None]
    if not results:
        return
    write_tables(results, out)
    title = ", ".join(dict.fromkeys(name for c in cells for name in (c.dataset, c.model)))
    figures = write_page(runs, out, title, display.say)
    display.table(*table_cells(make_rows(results)))
    names = sorted({path.stem for path in figures})
    display.say(f"results: {out / 'results.json'}, {out / 'table.md'}, {out / 'report.html'}")
    display.say(f"figures: {out / 'figures'} ({', '.join(names)}; PNG and SVG)")


def _record(out: Path, settings: CompareSettings) -> None:
    """Write what was asked for, with the versions of what computes it, into `out/config.json`.

    Raises `ExperimentError` when `out` belongs to another command or program.
    """
    path = out / "config.json"
    if path.exists():
        found = read_json(path)
        if not isinstance(found, dict) or found.get("command") != "compare":
            raise ExperimentError(
                f"{out}: is not the directory of an `ntt-eqx compare`; choose another folder "
                "with --out."
            )
    write_json(
        path,
        {
            "command": "compare",
            "settings": to_json(settings),
            "versions": {name: _version(name) for name in _PACKAGES},
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
