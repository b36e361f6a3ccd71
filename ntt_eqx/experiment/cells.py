"""`Cell`: one network of a comparison, with all that its result depends on."""

import dataclasses
import hashlib
import itertools
import json
import re
from typing import Any, Literal

import jax
from jaxtyping import PRNGKeyArray

from .._step_info import key_of_seed
from .._types import x64_is_enabled
from ._errors import ExperimentError
from ._files import decode_object
from .manifest import RunFolder
from .methods import Line
from .own import digest_of, find_method
from .settings import (
    CompareSettings,
    MaskSettings,
    ScoringSettings,
    TrainingSettings,
    TransferSettings,
    lines_of,
    to_json,
)
from .together import by_first

FORMAT = 1
_LATER_TRAINING = (
    *("optimizer", "momentum", "nesterov", "schedule", "milestones", "step_factor"),
    *("final_share", "warm_up", "weight_decay", "decay", "label_smoothing", "ema", "crop", "flip"),
    *("kernel_images", "labels"),
)
ONLY_WATCH = ("evaluate_every", "kernel_images")
"""Settings of a training on which its network does not depend."""
CONFIG = "config.json"


def random_key(seed: int, purpose: int) -> PRNGKeyArray:
    """A key of a seed: of weights (0), mask (1), dropout (2), ablation (3), few channels (4)."""
    return jax.random.fold_in(key_of_seed(seed), purpose)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One network to make: the unit that is run, skipped when done, resumed and retried."""

    dataset: str  # images that the network is trained and tested on
    model: str  # name of the architecture
    method: str  # how its mask is chosen
    # whether weights are ranked per layer or over all layers; `None` for a dense network
    scope: Literal["layer", "global"] | None
    density: float  # share of weights kept
    seed: int  # decides the dense initialisation, the mask's randomness and the order of the data
    # settings of the label-free phase, `None` for methods without one
    transfer: TransferSettings | None
    scoring: ScoringSettings | None  # settings of the score, `None` for methods that need no data
    # settings of the supervised phase, `None` to stop before it
    training: TrainingSettings | None = None
    # SHA-256 of the model file that training starts from, `None` to start from `method`
    start: str | None = None
    # the `settings_id` of the network in that file, `None` where it does not say
    origin: str | None = None
    mask: MaskSettings | None = None  # settings of the mask, `None` for plain ones
    # SHA-256 of what decides a user's own method, model and images, by the fields that name them
    code: tuple[tuple[str, str], ...] = ()
    # whether JAX has 64-bit types, of which initial weights are then made: other ones, of any seed
    x64: bool = dataclasses.field(default_factory=x64_is_enabled)

    @property
    def name(self) -> str:
        """A short name for people: method, scope, density and seed."""
        if self.method == "dense":
            return f"dense seed {self.seed}"
        line = self.line
        mask = f"({line.mask})" if line.mask else ""
        words = (self.method, line.scope, f"{self.density:g}", mask)
        return " ".join([*filter(None, words), f"seed {self.seed}"])

    @property
    def line(self) -> Line:
        """The line of tables and figures to which it belongs."""
        return Line.of({**vars(self), "mask": self.mask and self.mask.label})

    def key(self, purpose: int) -> PRNGKeyArray:
        """The `random_key` of its seed."""
        return random_key(self.seed, purpose)

    @property
    def folder(self) -> str:
        """The name of this cell's directory; it ends in a hash of everything above."""
        parts = [self.dataset, self.model, self.method]
        if self.method != "dense":
            parts += [*filter(None, [self.scope]), f"{self.density:g}"]
        name = "-".join(map(slug, parts))[:100]
        return f"{name}-seed{self.seed}-{self.fingerprint[:8]}"

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the cell's canonical JSON: two cells share it if and only if they agree."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def settings_id(self) -> str:
        """Eight hex digits that tell apart results got under different settings."""
        shared = {"transfer", "scoring", "training", "start", "mask", "code", "x64"}
        cell = self
        if cell.training is not None:
            idle = {name: getattr(TrainingSettings, name) for name in ONLY_WATCH}
            cell = dataclasses.replace(cell, training=dataclasses.replace(cell.training, **idle))
        chosen = {key: value for key, value in cell.to_json().items() if key in shared}
        if self.origin is not None:  # of other seeds the file is another, and the settings are not
            chosen["start"] = self.origin
        return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:8]

    def to_json(self) -> dict[str, Any]:
        """The cell as plain JSON values.

        Settings that came after format 1 are left out where they change nothing, so that older
        results keep their place.
        """
        found = {"format": FORMAT, **to_json(self)}
        for name, usual in (("mask", None), ("origin", None), ("x64", False)):
            if found[name] == usual:
                del found[name]
        idle = to_json(TrainingSettings())
        code = dict(found.pop("code"))
        if code:
            found["code"] = code
        later = {
            "transfer": {"decay": 1.0, "sketch_size": None, "gradual": 0.0},
            "scoring": {"schedule": "exponential"},
            "training": {name: idle[name] for name in _LATER_TRAINING},
        }
        for part, values in later.items():
            for name, value in values.items():
                if found[part] is not None and found[part][name] == value:
                    del found[part][name]
        return found


def plan(settings: CompareSettings) -> list[Cell]:
    """The cells of a comparison, each once, in the order in which they run.

    A dense network has no density and no scope, so there is one for each seed. Settings that a
    method does not use are left out of its cells: a change of the transfer settings keeps the
    results of every other method. The published values stand where settings were left out.
    """
    places = itertools.product(
        *(settings.datasets, settings.models, settings.seeds),
        *(settings.densities, lines_of(settings)),
    )
    cells = []
    for dataset, model, seed, density, (method, asked) in places:
        mask = settings.mask
        if asked == "erk":
            mask = dataclasses.replace(mask, allocation="erk")
        scope: Any = "layer" if asked == "erk" else asked
        transfer = _transfer_of(settings, method, dataset, model)
        scoring = _scoring_of(
            settings, method if transfer is None else transfer.initial_mask, dataset
        )
        cell = Cell(dataset, model, method, scope, density, seed, transfer, scoring)
        cell = dataclasses.replace(cell, training=settings.training, code=_code(cell))
        if method == "dense":
            cell = dataclasses.replace(cell, density=1.0)
        elif mask != MaskSettings():
            cell = dataclasses.replace(cell, mask=mask)
        cells.append(cell)
    return list(dict.fromkeys(cells))


def _transfer_of(
    settings: CompareSettings, method: str, dataset: str, model: str
) -> TransferSettings | None:
    transfer, record = settings.transfer, find_method(method)
    if not record.kernel:
        return None
    if not record.sketched:
        transfer = dataclasses.replace(transfer, sketch_size=None)
    elif transfer.sketch_size is None:
        transfer = dataclasses.replace(transfer, sketch_size=TransferSettings.sketch_size)
    if transfer.l2_weight is None:
        published = 1e-5 if model.startswith("lenet-5") else 1e-4
        transfer = dataclasses.replace(transfer, l2_weight=published)
    if transfer.dataset == dataset:
        transfer = dataclasses.replace(transfer, dataset=None)
    return transfer


def _scoring_of(settings: CompareSettings, method: str, dataset: str) -> ScoringSettings | None:
    scoring, record = settings.scoring, find_method(method)
    if record.score is record.find is None or not record.examples:
        return None
    iterations = scoring.iterations or record.rounds
    return dataclasses.replace(
        scoring,
        examples=scoring.examples or (128 if dataset.startswith("cifar") else 100),
        iterations=iterations,
        schedule=scoring.schedule if iterations > 1 else "exponential",
    )


def _code(cell: Cell) -> tuple[tuple[str, str], ...]:
    """The digests of the user's own code and images that `cell` names."""
    named = {name: (name, getattr(cell, name)) for name in ("method", "model", "dataset")}
    if cell.transfer is not None and cell.transfer.dataset is not None:
        named["transfer.dataset"] = ("dataset", cell.transfer.dataset)
    found = {place: digest_of(*key) for place, key in named.items()}
    return tuple((place, digest) for place, digest in found.items() if digest is not None)


def write_or_check_config(run: RunFolder, asked: dict[str, Any]) -> None:
    """Write down in a run's folder what it is for, or check that what is there is the same."""
    if not run.has(CONFIG):
        run.write_json(CONFIG, asked)
        return
    what = "the configuration of an ntt-eqx run"
    found = by_first(lambda: decode_object(run.path / CONFIG, run.read(CONFIG), what))
    if found == asked:
        return
    if not isinstance(found.get("format", FORMAT), int):
        raise ExperimentError(f"{run.path / CONFIG}: not {what}.")
    known = found.get("format", FORMAT)
    if known > FORMAT:
        raise ExperimentError(
            f"{run.path / CONFIG}: written by a newer version (format {known}, this one reads "
            f"up to {FORMAT}); update ntt-eqx or choose another folder with --out."
        )
    changed = sorted(name for name in asked if found.get(name) != asked[name])
    raise ExperimentError(
        f"{run.path}: holds a run with another configuration ({', '.join(changed)} differ); "
        "choose another folder with --out."
    )


def slug(name: str) -> str:
    """`name` as a part of a file's name."""
    return re.sub(r"[^A-Za-z0-9.+]+", "-", name).strip("-")
