"""What a run can be told: typed settings, presets, and configuration files."""

import dataclasses
import json
import math
import re
import types
import typing
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeVar

from .._masks import NM, AbstractPattern, Block, Channels
from ._errors import ExperimentError
from ._files import read_json

Method = Literal[
    "dense",
    "ntt",
    "ntt-ambient",
    "random",
    "magnitude",
    "snip",
    "logit-snip",
    "grasp",
    "synflow",
    "ntk-sap",
    "px",
    "ntt-gradient",
]
FirstMask = Literal[
    "magnitude",
    "random",
    "logit-snip",
    "synflow",
    "ntk-sap",
    "px",
    "ntt-gradient",
    "snip",
    "grasp",
]
Scope = Literal["layer", "global"]
METHODS: tuple[str, ...] = typing.get_args(Method)
SCOPES: tuple[str, ...] = typing.get_args(Scope)

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class TransferSettings:
    """The label-free phase (Neural Tangent Transfer).

    Attributes:
        epochs: passes over the training images.
        batch_size: images a step; cut in halves for the kernel, so even.
        learning_rate: of Adam.
        mask_every: steps between two choices of the mask; 0 keeps the first mask.
        kernel_weight: weight of the kernel distance in the loss.
        l2_weight: weight of the L2 term; left out, the published one: 1e-4, and 1e-5 for LeNet-5.
        initial_mask: the score that the student's first mask comes from; `snip` and `grasp` look at
            labels, the others do not.
        held_out: share of the training images kept aside to watch the distances.
        dataset: transfer on these images instead of those that are trained on.
        log_every: steps between two rows of metrics.jsonl.
    """

    epochs: float = 20.0
    batch_size: int = 64
    learning_rate: float = 5e-4
    mask_every: int = 100
    kernel_weight: float = 1e-3
    l2_weight: float | None = None
    initial_mask: FirstMask = "magnitude"
    held_out: float = 0.002
    dataset: str | None = None
    log_every: int = 100


@dataclasses.dataclass(frozen=True)
class ScoringSettings:
    """The scores that the other methods prune by.

    Attributes:
        examples: training examples that a score sees; left out, the published numbers: 100, and
            128 for CIFAR.
        iterations: rounds of scoring and pruning; left out, the published numbers: 100 for SynFlow
            and PX, 20 for NTK-SAP, 1 for the others.
        schedule: how the density falls over the rounds.
    """

    examples: int | None = None
    iterations: int | None = None
    schedule: Literal["exponential", "linear"] = "exponential"


@dataclasses.dataclass(frozen=True)
class MaskSettings:
    """Which weights a mask may keep, beyond the highest scores.

    Attributes:
        allocation: share a density out over the layers: the same in all, or `erk` (Erdős–Rényi
            kernel: small layers stay denser).
        pattern: keep weights together: N:M, as 2:4, along inputs; blocks, as block:4x4; filters;
            inputs (whole input channels). Left out, single weights.
        ablation: a check of the method: `shuffle` the mask within each layer, `reinitialise` the
            weights under it, or `invert` the scores.
    """

    allocation: Literal["uniform", "erk"] = "uniform"
    pattern: str | None = None
    ablation: Literal["shuffle", "reinitialise", "invert"] | None = None

    @property
    def label(self) -> str:
        """What tables and legends call it; empty for plain masks."""
        erk = "erk" if self.allocation == "erk" else None
        return ", ".join(part for part in (erk, self.pattern, self.ablation) if part)


@dataclasses.dataclass(frozen=True)
class TrainingSettings:
    """The supervised phase.

    Attributes:
        epochs: passes over the training images.
        batch_size: images a step.
        learning_rate: of Adam.
        l2: weight of the L2 term on the kept weights.
        held_out: share of the training images that is not trained on.
        rescale: divide the initial weights by the square root of their layer's density.
        evaluate_every: steps between two looks at the test images; left out, one epoch.
    """

    epochs: float = 50.0
    batch_size: int = 64
    learning_rate: float = 1e-3
    l2: float = 1e-8
    held_out: float = 0.1
    rescale: bool = False
    evaluate_every: int | None = None


@dataclasses.dataclass(frozen=True)
class EvolutionSettings:
    """How networks are trained side by side, and what is watched.

    Attributes:
        steps: training steps.
        optimizer: of all networks.
        learning_rate: of the optimiser.
        batch_size: images a step; left out, all of them.
        snapshots: how often the outputs are written down.
        inputs: test images whose outputs are followed.
        kernel_inputs: test images on which the tangent kernels are compared.
    """

    steps: int = 100
    optimizer: Literal["sgd", "adam"] = "sgd"
    learning_rate: float = 1e-3
    batch_size: int | None = None
    snapshots: int = 50
    inputs: int = 64
    kernel_inputs: int = 32


@dataclasses.dataclass(frozen=True)
class CompareSettings:
    """Everything that `compare` computes depends on.

    Attributes:
        datasets: image sets to train on; `ntt-eqx data` lists them.
        models: networks to prune.
        methods: ways to choose the sparse network; `ntt` is Neural Tangent Transfer with the
            active kernel, `ntt-ambient` with the ambient one.
        scopes: rank weights within each layer, or over all layers at once.
        densities: shares of weights to keep.
        seeds: one network, one data order and one result for each.
        transfer: the label-free phase.
        scoring: the scores of the other methods.
        mask: which weights a mask may keep.
        training: the supervised phase.
    """

    datasets: tuple[str, ...] = ("fashion-mnist-mini",)
    models: tuple[str, ...] = ("lenet-300-100",)
    methods: tuple[Method, ...] = ("ntt", "random", "snip", "dense")
    scopes: tuple[Scope, ...] = ("layer",)
    densities: tuple[float, ...] = (0.03,)
    seeds: tuple[int, ...] = (0,)
    transfer: TransferSettings = dataclasses.field(default_factory=TransferSettings)
    scoring: ScoringSettings = dataclasses.field(default_factory=ScoringSettings)
    mask: MaskSettings = dataclasses.field(default_factory=MaskSettings)
    training: TrainingSettings = dataclasses.field(default_factory=TrainingSettings)


PRESETS: Mapping[str, CompareSettings] = types.MappingProxyType(
    {
        "quick": CompareSettings(
            transfer=TransferSettings(epochs=20.0, held_out=0.02),
            training=TrainingSettings(epochs=25.0),
        ),
        "paper": CompareSettings(
            datasets=("fashion-mnist",),
            methods=("ntt", "random", "snip", "logit-snip", "dense"),
            seeds=(0, 1, 2, 3, 4),
        ),
    }
)
"""`quick`: a comparison within three minutes. `paper`: the published protocol."""


def check(settings: CompareSettings) -> CompareSettings:
    """Return `settings` if every value in it can be used.

    **Raises:**

    `ExperimentError`: naming the first field that cannot, what it holds and what it may hold.
    """
    for name in ("datasets", "models", "methods", "scopes", "densities", "seeds"):
        values = getattr(settings, name)
        if not values:
            raise ExperimentError(f"{name}: give at least one.")
        if len(set(values)) != len(values):
            raise ExperimentError(f"{name}: {_show(values)} names one of them twice.")
    for density in settings.densities:
        _in_range("densities", density, low=0.0, high=1.0, open_low=True)
    for seed in settings.seeds:
        _in_range("seeds", seed, low=0, high=2**31 - 1)
    t, s, r = settings.transfer, settings.scoring, settings.training
    _in_range("transfer.epochs", t.epochs, low=0.0, open_low=True)
    _in_range("transfer.batch_size", t.batch_size, low=2)
    if t.batch_size % 2:
        raise ExperimentError(
            f"transfer.batch_size: {t.batch_size} is odd, and a batch is cut in two halves; "
            f"use {t.batch_size + 1}."
        )
    _in_range("transfer.learning_rate", t.learning_rate, low=0.0, high=1e30, open_low=True)
    _in_range("transfer.mask_every", t.mask_every, low=0)
    _in_range("transfer.kernel_weight", t.kernel_weight, low=0.0)
    if t.l2_weight is not None:
        _in_range("transfer.l2_weight", t.l2_weight, low=0.0)
    _in_range("transfer.held_out", t.held_out, low=0.0, high=0.9)
    _in_range("transfer.log_every", t.log_every, low=1)
    if s.examples is not None:
        _in_range("scoring.examples", s.examples, low=2)
    if s.iterations is not None:
        _in_range("scoring.iterations", s.iterations, low=1)
    _in_range("training.epochs", r.epochs, low=0.0, open_low=True)
    _in_range("training.batch_size", r.batch_size, low=1)
    _in_range("training.learning_rate", r.learning_rate, low=0.0, high=1e30, open_low=True)
    _in_range("training.l2", r.l2, low=0.0)
    _in_range("training.held_out", r.held_out, low=0.0, high=0.9)
    if r.evaluate_every is not None:
        _in_range("training.evaluate_every", r.evaluate_every, low=1)
    _check_mask(settings)
    return settings


def check_evolution(settings: EvolutionSettings) -> EvolutionSettings:
    """`check` for the settings of an output evolution."""
    for name in ("steps", "snapshots", "inputs", "kernel_inputs"):
        _in_range(f"evolution.{name}", getattr(settings, name), low=1)
    if settings.batch_size is not None:
        _in_range("evolution.batch_size", settings.batch_size, low=1)
    _in_range("evolution.learning_rate", settings.learning_rate, low=0.0, high=1e30, open_low=True)
    return settings


def parse_pattern(text: str | None) -> AbstractPattern | None:
    """The pattern that `text` names.

    **Raises:**

    `ExperimentError`: for any other text, with those that there are.
    """
    if text is None:
        return None
    if text in ("filters", "inputs"):
        return Channels(0 if text == "filters" else 1)
    try:
        if found := re.fullmatch(r"(\d{1,4}):(\d{1,4})", text):
            return NM(int(found[1]), int(found[2]))
        if found := re.fullmatch(r"block:(\d{1,6})x(\d{1,6})", text):
            return Block((int(found[1]), int(found[2])))
    except ValueError as error:
        raise ExperimentError(f"mask.pattern: {text!r}: {error}") from None
    raise ExperimentError(
        f"mask.pattern: {_show(text)} is none; there are N:M (2:4), block:ROWSxCOLUMNS "
        "(block:4x4), filters and inputs."
    )


def _check_mask(settings: CompareSettings) -> None:
    mask, pattern = settings.mask, parse_pattern(settings.mask.pattern)
    ntt = [name for name in settings.methods if name in ("ntt", "ntt-ambient")]
    what = "mask.pattern" if pattern is not None else "mask.allocation"
    if (
        (pattern is not None or mask.allocation != "uniform")
        and ntt
        and settings.transfer.mask_every
    ):
        raise ExperimentError(
            f"{what}: {ntt[0]} chooses its mask again by magnitude alone; keep its first mask with "
            "--transfer.mask-every 0."
        )
    if (mask.allocation != "uniform" or isinstance(pattern, NM)) and "global" in settings.scopes:
        raise ExperimentError(
            f"{what}: sets the densities of layers, which only scope layer keeps."
        )
    if isinstance(pattern, NM):
        share = pattern.n / pattern.m
        if settings.densities != (share,) or mask.allocation != "uniform":
            raise ExperimentError(
                f"mask.pattern: {mask.pattern} keeps {share:g} of each layer; use --densities "
                f"{share:g} and no other allocation."
            )
    if mask.ablation == "invert" and ntt:
        raise ExperimentError(f"mask.ablation: {ntt[0]} has no scores to invert.")


def load_config(path: Path, base: CompareSettings) -> CompareSettings:
    """`base` with the fields that the JSON file at `path` gives.

    **Raises:**

    `ExperimentError`: naming the file and the field, for an unknown field or a wrong type.
    """
    value = read_json(path)
    if isinstance(value, dict):
        value = {key: entry for key, entry in value.items() if key != "preset"}
    return from_json(CompareSettings, value, where=str(path), base=base)


def from_json(kind: type[_T], value: Any, *, where: str, base: _T | None = None) -> _T:
    """Build the settings class `kind` from a decoded JSON object, checking names and types.

    **Arguments:**

    - `kind`: a settings dataclass.
    - `value`: the decoded object; fields that it lacks keep their value in `base`.
    - `where`: what to call the object in messages.
    - `base`: the starting point; the defaults of `kind` when `None`.
    """
    base = kind() if base is None else base
    if not isinstance(value, dict):
        raise ExperimentError(f"{where}: expected an object with fields, got {_show(value)}.")
    hints = typing.get_type_hints(kind)
    changes = {}
    for name, entry in value.items():
        if name not in hints:
            near = get_close_matches(name, hints, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ExperimentError(
                f"{where}: unknown field {name!r}.{hint} Fields: {', '.join(hints)}."
            )
        place = f"{where}: field {name!r}" if ": field" not in where else f"{where}.{name!r}"
        changes[name] = _convert(hints[name], entry, place, getattr(base, name))
    return dataclasses.replace(base, **changes)  # pyright: ignore[reportArgumentType]


def to_json(settings: Any) -> Any:
    """A settings object as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(settings)))


def _convert(hint: Any, value: Any, where: str, base: Any) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_json(typing.cast(type, hint), value, where=where, base=base)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (hint,) = (a for a in arguments if a is not type(None))
        return _convert(hint, value, where, base)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ExperimentError(f"{where} must be a list, got {_show(value)}.")
        return tuple(_convert(arguments[0], v, f"{where}[{i}]", None) for i, v in enumerate(value))
    if origin is Literal:
        if value not in arguments:
            raise ExperimentError(
                f"{where} must be one of {', '.join(map(str, arguments))}, got {_show(value)}."
            )
        return value
    accepted = {float: (int, float), int: (int,), str: (str,), bool: (bool,)}[hint]
    if not isinstance(value, accepted) or (isinstance(value, bool) and hint is not bool):
        raise ExperimentError(f"{where} must be of type {hint.__name__}, got {_show(value)}.")
    try:
        return hint(value)
    except OverflowError:  # an integer that no float holds
        raise ExperimentError(f"{where} is too large: {_show(value)}.") from None


def _in_range(
    name: str,
    value: float | int,
    *,
    low: float | int,
    high: float | int = math.inf,
    open_low: bool = False,
) -> None:
    above = value > low if open_low else value >= low
    finite = isinstance(value, int) or math.isfinite(value)
    if not (finite and above and value <= high):
        bound = f"above {low:g}" if open_low else f"at least {low:g}"
        top = "" if high == math.inf else f" and at most {high:g}"
        raise ExperimentError(f"{name}: {value!r} must be a number {bound}{top}.")


def _show(value: Any) -> str:
    try:
        text = json.dumps(value, default=repr)
    except (ValueError, TypeError, RecursionError):  # what no JSON file holds, or holds too deep
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."
