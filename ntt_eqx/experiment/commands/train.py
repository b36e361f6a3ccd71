"""`ntt-eqx train`."""

import dataclasses
import hashlib
from pathlib import Path

from .._errors import ExperimentError
from ..model_file import load_model
from ..own import unknown_code
from ..presets import PRESETS
from ..references import is_reference
from ..results import model_path
from ..settings import MaskSettings, TrainingSettings, from_json
from ._options import NetworkOptions, make_one


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train(NetworkOptions):
    """Train one network on labels: one from a file, or a fresh one pruned by a method."""

    # model file, or directory of a run that holds one, whose seed and dataset hold if there is no
    # --seed and no --dataset; left out, --model, --method, --scope and --density say what to train
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
        dataset = self.dataset or header.get("dataset")
        if self.dataset is None and dataset is not None and is_reference(dataset):
            raise ExperimentError(unknown_code("dataset", dataset))
        asked = dataclasses.replace(self, seed=seed, dataset=dataset)
        cell = asked.cell(mask=self.mask, training=self.training)
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
