"""`Cell`: one network of a comparison, with all that its result depends on."""

import dataclasses
import hashlib
import json
import re
from pathlib import Path
from typing import Any

from ._errors import ExperimentError
from ._files import read_json, write_json
from .settings import (
    CompareSettings,
    MaskSettings,
    Method,
    Scope,
    ScoringSettings,
    TrainingSettings,
    TransferSettings,
    to_json,
)

FORMAT = 1
NTT_METHODS = ("ntt", "ntt-ambient")
_UNSCORED = ("dense", "random", "magnitude")
_ITERATIONS = {"synflow": 100, "px": 100, "ntk-sap": 20}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One network to make: the unit that is run, skipped when done, resumed and retried.

    Attributes:
        dataset: images that the network is trained and tested on.
        model: name of the architecture.
        method: how its mask is chosen.
        scope: whether weights are ranked per layer or over all layers; `None` for a dense network.
        density: share of weights kept.
        seed: decides the dense initialisation, the mask's randomness and the order of the data.
        transfer: settings of the label-free phase, `None` for methods without one.
        scoring: settings of the score, `None` for methods that need no data.
        training: settings of the supervised phase, `None` to stop before it.
        start: SHA-256 of the model file that training starts from, `None` to start from `method`.
        mask: settings of the mask, `None` for plain ones.
    """

    dataset: str
    model: str
    method: Method
    scope: Scope | None
    density: float
    seed: int
    transfer: TransferSettings | None
    scoring: ScoringSettings | None
    training: TrainingSettings | None
    start: str | None = None
    mask: MaskSettings | None = None

    @property
    def name(self) -> str:
        """A short name for people: method, scope, density and seed."""
        if self.scope is None:
            return f"{self.method} seed {self.seed}"
        mask = f" ({self.mask.label})" if self.mask is not None else ""
        return f"{self.method} {self.scope} {self.density:g}{mask} seed {self.seed}"

    @property
    def folder(self) -> str:
        """The name of this cell's directory; it ends in a hash of everything above."""
        parts = [self.dataset, self.model, self.method]
        if self.scope is not None:
            parts += [self.scope, f"{self.density:g}"]
        slug = "-".join(re.sub(r"[^A-Za-z0-9.+]+", "-", part).strip("-") for part in parts)
        return f"{slug[:100]}-seed{self.seed}-{self.fingerprint[:8]}"

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the cell's canonical JSON: two cells share it if and only if they agree."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def settings_id(self) -> str:
        """Eight hex digits that tell apart results got under different settings."""
        shared = {"transfer", "scoring", "training", "start", "mask"}
        chosen = {key: value for key, value in self.to_json().items() if key in shared}
        return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:8]

    def to_json(self) -> dict[str, Any]:
        """The cell as plain JSON values.

        Settings that came after format 1 are left out where they change nothing, so that older
        results keep their place.
        """
        found = {"format": FORMAT, **to_json(self)}
        if found["mask"] is None:
            del found["mask"]
        if found["scoring"] is not None and found["scoring"]["schedule"] == "exponential":
            del found["scoring"]["schedule"]
        return found


def plan(settings: CompareSettings) -> list[Cell]:
    """The cells of a comparison, each once, in the order in which they run.

    A dense network has no density and no scope, so there is one for each seed. Settings that a
    method does not use are left out of its cells: a change of the transfer settings keeps the
    results of every other method.
    """
    cells = [
        make_cell(settings, dataset, model, method, scope, density, seed)
        for dataset in settings.datasets
        for model in settings.models
        for seed in settings.seeds
        for density in settings.densities
        for method in settings.methods
        for scope in settings.scopes
    ]
    return list(dict.fromkeys(cells))


def make_cell(
    settings: CompareSettings,
    dataset: str,
    model: str,
    method: Method,
    scope: Scope,
    density: float,
    seed: int,
) -> Cell:
    """One cell of a comparison, with the published values put in where settings were left out."""
    transfer = scoring = None
    if method in NTT_METHODS:
        transfer = settings.transfer
        if transfer.l2_weight is None:
            transfer = dataclasses.replace(
                transfer, l2_weight=1e-5 if model.startswith("lenet-5") else 1e-4
            )
        if transfer.dataset == dataset:
            transfer = dataclasses.replace(transfer, dataset=None)
    score = transfer.initial_mask if transfer is not None else method
    if score not in _UNSCORED:
        scoring = settings.scoring
        if scoring.examples is None:
            examples = 128 if dataset.startswith("cifar") else 100
            scoring = dataclasses.replace(scoring, examples=examples)
        if scoring.iterations is None:
            scoring = dataclasses.replace(scoring, iterations=_ITERATIONS.get(score, 1))
        if scoring.iterations == 1:
            scoring = dataclasses.replace(scoring, schedule="exponential")
    dense = method == "dense"
    return Cell(
        dataset=dataset,
        model=model,
        method=method,
        scope=None if dense else scope,
        density=1.0 if dense else density,
        seed=seed,
        transfer=transfer,
        scoring=scoring,
        training=settings.training,
        mask=None if dense or settings.mask == MaskSettings() else settings.mask,
    )


def claim(cell: Cell, directory: Path) -> None:
    """Write the cell's configuration into its directory, or check the one that is there.

    **Raises:**

    `ExperimentError`: when the directory belongs to another configuration or a newer version.
    """
    path = directory / "config.json"
    if not path.exists():
        write_json(path, cell.to_json())
        return
    found = read_json(path)
    if found == cell.to_json():
        return
    if isinstance(found, dict) and isinstance(found.get("format"), int):
        if found["format"] > FORMAT:
            raise ExperimentError(
                f"{path}: written by a newer version (format {found['format']}, this one reads "
                f"up to {FORMAT}); update ntt-eqx or choose another folder with --out."
            )
        changed = sorted(k for k in cell.to_json() if found.get(k) != cell.to_json()[k])
        raise ExperimentError(
            f"{directory}: holds a run with another configuration ({', '.join(changed)} differ); "
            "choose another folder with --out."
        )
    raise ExperimentError(f"{path}: not the configuration of an ntt-eqx run.")
