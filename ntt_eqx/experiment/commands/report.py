"""`ntt-eqx report`."""

import dataclasses
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from .._errors import ExperimentError
from ..apart import told_apart
from ..claims import claimed
from ..manifest import check_folder, has_manifest, read_manifest
from ..own import enter
from ..progress import Display
from ..report import REPORT_FILES, show_table, write_page, write_tables
from ..results import Run, find_runs


@dataclasses.dataclass(frozen=True)
class Report:
    """Build tables (Markdown, CSV, LaTeX), figures and report.html again from what is on disk."""

    directories: Positional[tuple[Path, ...]]  # comparisons or single runs, with everything below
    out: Path | None = None  # where to write; left out, `report` in the first directory
    figures: bool = True  # draw no figures
    # code of your own networks, package.module:Object, without which their masks are not drawn
    models: tuple[str, ...] = ()

    def run(self) -> int:
        """Build tables, figures and the page; returns the exit status."""
        if not self.directories:
            raise ExperimentError("report: give at least one directory.")
        for name in self.models:
            enter("model", name)
        found = {
            run.directory.resolve(): run for path in self.directories for run in find_runs(path)
        }
        done, again, seen = [], [], set()
        for run in found.values():
            if run.state == "done":
                network = _network(run)
                (again if network in seen else done).append(run)
                seen.add(network)
        places = ", ".join(map(str, self.directories))
        if not done:
            raise ExperimentError(f"report: no finished run in {places}.")
        out = self.out or self.directories[0] / "report"
        check_folder(out)
        kind = read_manifest(out).kind if has_manifest(out) else "report"
        with Display() as display, claimed(out, kind) as page:
            page.check_unchanged(REPORT_FILES)
            for run in found.values():
                if run.state != "done":
                    display.say(f"left out: {run.directory} is {run.state}. {run.note}".rstrip())
            for run in again:
                display.say(f"left out: {run.directory} is a network that another folder has, too.")
            done = told_apart(done)
            failed = [run for run in found.values() if run.state == "failed"]
            table = write_tables([run.result for run in done if run.result], page, failed)
            if self.figures:
                write_page(done, page, places, display, failed=failed)
            show_table(table, display)
            display.say(f"written: {out}")
        return 0


def _network(run: Run) -> tuple[Any, ...]:
    """The identity of the network in a folder, however its training was watched."""
    result = run.result or {}
    names = ("dataset", "model", "method", "scope", "mask", "density", "seed", "settings_id")
    return tuple(result.get(name) for name in names)
