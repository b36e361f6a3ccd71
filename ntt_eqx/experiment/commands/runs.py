"""`ntt-eqx runs`."""

import dataclasses
from pathlib import Path

from tyro.conf import Positional

from ..methods import Line, method
from ..progress import Display
from ..results import Run, find_runs


@dataclasses.dataclass(frozen=True)
class Runs:
    """List the networks in a directory: done, unfinished, failed or broken."""

    directory: Positional[Path] = Path("runs")  # where to look, with everything below
    verify: bool = True  # do not compare every file of every run with its digest

    def run(self) -> int:
        """List the networks; returns the exit status."""
        found = find_runs(self.directory, verify=self.verify)
        with Display() as display:
            if not found:
                display.say(f"{self.directory}: no runs.")
                return 0
            header = ["State", "Dataset", "Model", "Method", "Scope", "Density", "Seed"]
            right = [*([False] * 5), True, True, True, False]
            display.table(([*header, "Test (%)", "Directory"], list(map(_line, found)), right))
            for run in found:
                if run.note:
                    display.say(run.note)
        return 0


def _line(run: Run) -> list[str]:
    config, accuracy = run.config, (run.result or {}).get("test_accuracy")
    dataset, model, name, seed = (
        str(config.get(field, "?")) for field in ("dataset", "model", "method", "seed")
    )
    density = f"{config['density']:g}" if "density" in config else "?"
    scope = Line.of({"method": name, **config, **(run.result or {})}).scope
    names = [dataset, model, method(name).label, scope or "–", density, seed]
    reached = "–" if accuracy is None else f"{100 * accuracy:.2f}"
    return [run.state, *names, reached, str(run.directory)]
