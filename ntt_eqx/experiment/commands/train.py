"""`ntt-eqx train`."""

import dataclasses
import hashlib
from pathlib import Path

from .._errors import ExperimentError
from ..model_file import load_model
from ..presets import PRESETS
from ..results import model_path
from ..settings import MaskSettings, TrainingSettings, from_json
from ._options import NetworkOptions, make_one


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train(NetworkOptions):
    """Train one network on labels: one from a file, or a fresh one pruned by a method."""

    # model file, or directory of a run that holds one, whose seed holds if there is no --seed; left
    # out, --model, --method, --scope and --density say what to train
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
        for name in ("method", "density", "scope", "mask", "transfer", "scoring"):
            value = getattr(self, name)
            if value != type(self).__dataclass_fields__[name].default:
                options = f"{name}.*" if dataclasses.is_dataclass(value) else name
                raise ExperimentError(
                    f"train: --{options} is how a fresh network is pruned, and --start trains the "
                    f"one in {start} as it is; leave one of them out."
                )
        header = load_model(start).header
        seed = self.seed if self.seed is not None else header.get("seed") or 0
        cell = dataclasses.replace(self, seed=seed).cell(mask=self.mask, training=self.training)
        if self.model != type(self).model and cell.model != header["model"]:
            raise ExperimentError(
                f"train: --model is {cell.model}, and --start trains the {header['model']} in "
                f"{start}; leave one of them out."
            )
        mask = header.get("mask")
        cell = dataclasses.replace(
            cell,
            model=header["model"],
            method=header.get("method") or "dense",
            scope=header.get("scope"),
            density=float(header.get("density") or 1.0),
            transfer=None,
            scoring=None,
            mask=mask and from_json(MaskSettings, mask, where=f"{start}: its mask"),
            start=hashlib.sha256(start.read_bytes()).hexdigest(),
            origin=header.get("settings_id"),
        )
        return make_one(cell, self, start)
