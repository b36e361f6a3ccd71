"""`ntt-eqx train`."""

import dataclasses
import hashlib
from pathlib import Path

from .._errors import ExperimentError
from ..model_file import load_model
from ..presets import PRESETS
from ..results import model_path
from ..settings import MaskSettings, TrainingSettings
from ._options import NetworkOptions, make_one


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train(NetworkOptions):
    """Train one network on labels: one from a file, or a fresh one pruned by a method."""

    # model file, or directory of a run that holds one; left out, --model, --method, --scope and
    # --density say what to train
    start: Path | None = None
    method: str = "random"
    mask: MaskSettings = MaskSettings()  # which weights a mask may keep
    training: TrainingSettings = PRESETS["quick"].training  # the supervised phase
    out: Path = Path("runs/train")

    def make(self) -> int:
        """Train the network; returns the exit status."""
        if self.start is None:
            return make_one(self.cell(mask=self.mask, training=self.training), self)
        start = model_path(self.start)
        for name in ("method", "density", "scope", "mask"):
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise ExperimentError(
                    f"train: --{name} is how a fresh network is pruned, and --start trains the one "
                    f"in {start} as it is; leave one of them out."
                )
        cell = self.cell(mask=self.mask, training=self.training)
        header = load_model(start).header
        cell = dataclasses.replace(
            cell,
            model=header["model"],
            method=header.get("method", "dense"),
            scope=header.get("scope"),
            density=float(header.get("density", 1.0)),
            transfer=None,
            scoring=None,
            mask=None,
            start=hashlib.sha256(start.read_bytes()).hexdigest(),
        )
        return make_one(cell, self, start)
