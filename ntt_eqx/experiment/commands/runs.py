"""`ntt-eqx runs`."""

import dataclasses
from pathlib import Path

from tyro.conf import Positional

from ..methods import method
from ..progress import Display
from ..results import find_runs


@dataclasses.dataclass(frozen=True)
class Runs:
    """List the networks in a directory: done, unfinished, failed or broken."""

    directory: Positional[Path] = Path("runs")  # where to look, with everything below

    def run(self) -> int:
        """List the networks; returns the exit status."""
        found = find_runs(self.directory)
        with Display() as display:
            if not found:
                display.say(f"{self.directory}: no runs.")
                return 0
            body = []
            for run in found:
                config = run.config
                accuracy = (run.result or {}).get("test_accuracy")
                name = lambda key, config=config: str(config.get(key, "?"))
                body.append(
                    [
                        run.state,
                        name("dataset"),
                        name("model"),
                        method(name("method")).label,
                        str(config.get("scope") or "–"),
                        f"{config['density']:g}" if "density" in config else "?",
                        name("seed"),
                        "–" if accuracy is None else f"{100 * accuracy:.2f}",
                        str(run.directory),
                    ]
                )
            header = ["State", "Dataset", "Model", "Method", "Scope", "Density", "Seed"]
            right = [*([False] * 5), True, True, True, False]
            display.table([*header, "Test (%)", "Directory"], body, right)
            for run in found:
                if run.note:
                    display.say(run.note)
        return 0
