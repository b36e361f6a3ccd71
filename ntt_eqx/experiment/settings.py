"""The settings of a run: one schema for flags, JSON files, checks and the run's identity."""

import dataclasses
import fractions
import functools
import json
import math
import re
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

from .. import (
    NM,
    AbstractPattern,
    Block,
    Channels,
    ConstantFanIn,
    Recipe,
    coupled_channels,
    few_channels,
)
from ._errors import ExperimentError, did_you_mean
from ._files import read_json
from .methods import FirstMask, Scope, split_scope
from .own import find_method

_T = TypeVar("_T")


def _number(
    default: Any, low: float | int = 0, high: float | int = math.inf, *, above: bool = False
) -> Any:
    """A field whose numbers are at least `low` (with `above`: greater) and at most `high`."""
    return dataclasses.field(default=default, metadata={"range": (low, high, above)})


@dataclasses.dataclass(frozen=True)
class TransferSettings:
    """The label-free phase (Neural Tangent Transfer)."""

    epochs: float = _number(20.0, above=True)  # passes over the training images
    batch_size: int = _number(64, 2)  # images a step; cut in halves for the kernel, so even
    learning_rate: float = _number(5e-4, high=1e30, above=True)  # of Adam
    decay: float = _number(1.0, high=1)  # share of it that a cosine falls to at the end
    # random directions of the outputs, new at every step, along which `ntt-sketch` compares kernels
    sketch_size: int | None = _number(2, 1)
    mask_every: int = _number(100)  # steps between two choices of the mask; 0 keeps the first mask
    # share of the steps in which the density falls from 1 (all weights) to its value, by the cubic
    # of Zhu & Gupta (2017); 0 for the last density from the first step on
    gradual: float = _number(0.0, high=1)
    kernel_weight: float = _number(1e-3)  # weight of the kernel distance in the loss
    # weight of the L2 term; left out, the published one: 1e-4, and 1e-5 for LeNet-5
    l2_weight: float | None = _number(None)
    # the score that the student's first mask comes from; `snip` and `grasp` look at labels, the
    # others do not
    initial_mask: FirstMask = "magnitude"
    # share of the training images kept aside to watch the distances
    held_out: float = _number(0.002, high=0.9)
    dataset: str | None = None  # transfer on these images instead of those that are trained on
    log_every: int = _number(100, 1)  # steps between two rows of metrics.jsonl


@dataclasses.dataclass(frozen=True)
class ScoringSettings:
    """The scores that the other methods prune by."""

    # training examples that a score sees; left out, those of SNIP: 100, and 128 for CIFAR
    examples: int | None = _number(None, 2)
    # rounds of scoring and pruning; left out, the published numbers: 100 for SynFlow and PX, 20 for
    # NTK-SAP, 1 for the others
    iterations: int | None = _number(None, 1)
    # how the density falls over the rounds
    schedule: Literal["exponential", "linear"] = "exponential"


@dataclasses.dataclass(frozen=True)
class MaskSettings:
    """Which weights a mask may keep, beyond the highest scores."""

    # `erk` is the scope `erk` for every method
    allocation: Literal["uniform", "erk"] = "uniform"
    # keep weights together: N:M, as 2:4, along inputs; blocks, as block:4x4; fan-in (as many inputs
    # for each output), fan-in:16 (the same ones for 16 outputs); filters; inputs (whole input
    # channels); channels (in all layers that make or read them; a density counts channels);
    # few-channels:1/6 (single weights, all between a random sixth of the channels). Left out,
    # single weights
    pattern: str | None = None
    # a check of the method: `shuffle` the mask within each layer; keep only its `shares` of the
    # layers, by a shuffled mask on the initial weights; take it on the `initial` weights, which a
    # transfer changes; `reinitialise` the weights under it; or `invert` the scores
    ablation: Literal["shuffle", "shares", "initial", "reinitialise", "invert"] | None = None

    @property
    def label(self) -> str:
        """What tables and legends call it; empty for plain masks."""
        erk = "erk" if self.allocation == "erk" else None
        return ", ".join(part for part in (erk, self.pattern, self.ablation) if part)


@dataclasses.dataclass(frozen=True)
class TrainingSettings:
    """The supervised phase: a `Recipe`, and what is looked at."""

    epochs: float = _number(50.0, above=True)  # passes over the training images
    batch_size: int = _number(64, 1)  # images a step
    optimizer: Literal["adam", "sgd"] = "adam"
    learning_rate: float = _number(1e-3, high=1e30, above=True)  # of the optimiser, at its highest
    momentum: float = _number(0.0, high=1)  # of SGD
    nesterov: bool = False  # whether the momentum of SGD is Nesterov's
    # course of the rate: `steps` lowers it at the milestones; `cosine` and `linear` end at
    # --training.final-share of it
    schedule: Literal["constant", "steps", "cosine", "linear"] = "constant"
    # shares of the training at which `steps` lowers the rate
    milestones: tuple[float, ...] = _number((0.5, 0.75), high=1)
    step_factor: float = _number(0.1, high=1e30)  # what a milestone multiplies the rate by
    final_share: float = _number(0.0, high=1)  # share of the rate at which a schedule ends
    warm_up: float = _number(0.0, high=1)  # share of the training in which the rate rises from 0
    # decay of the weights (not of biases and normalisations): half of it is the coefficient of
    # their squares in the loss
    weight_decay: float = _number(0.0, high=1e30)
    # whether it passes through the optimiser (`l2`), or beside it (`decoupled`, as in AdamW)
    decay: Literal["l2", "decoupled"] = "l2"
    l2: float = _number(1e-8)  # weight of the L2 term on the kept weights
    # share of the target that is spread over all classes
    label_smoothing: float = _number(0.0, high=1)
    # decay of a moving average of the weights, which is what is tested and stored; 0 for none
    ema: float = _number(0.0, high=1)
    crop: int = _number(0)  # pixels of padding from which a random crop is cut
    flip: bool = False  # flip half of the images, left to right
    held_out: float = _number(0.1, high=0.9)  # share of the training images that is not trained on
    # labelled images to train on, as many of each class as there can be; left out, all that are not
    # held out. Transfers, and scores that need no label, see all images in either case
    labels: int | None = _number(None, 1)
    rescale: bool = False  # divide the initial weights by the square root of their layer's density
    # steps between two looks at the test images; left out, one epoch
    evaluate_every: int | None = _number(None, 1)
    # test images whose tangent kernel is recorded at each look (spectrum, alignment with labels);
    # 0 for none, a few dozen are enough
    kernel_images: int = _number(0)

    def recipe(self) -> Recipe:
        """The recipe of these settings; `ExperimentError` for fields that contradict each other."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(Recipe)}
        try:
            return Recipe(**fields)
        except ValueError as error:
            said = str(error).removeprefix("Recipe: ")
            names = "|".join(fields)
            said = re.sub(rf"^({names})\b(?!=)|\b({names})(?==)", r"training.\g<0>", said)
            raise ExperimentError(said) from None


@dataclasses.dataclass(frozen=True)
class EvolutionSettings:
    """How networks are trained side by side, and what is watched."""

    steps: int = _number(100, 1)  # training steps
    optimizer: Literal["sgd", "adam"] = "sgd"  # of all networks
    learning_rate: float = _number(1e-3, high=1e30, above=True)  # of the optimiser
    batch_size: int | None = _number(None, 1)  # images a step; left out, all of them
    snapshots: int = _number(50, 1)  # how often the outputs are written down
    inputs: int = _number(64, 1)  # test images whose outputs are followed
    kernel_inputs: int = _number(32, 1)  # test images on which the tangent kernels are compared


@dataclasses.dataclass(frozen=True)
class CompareSettings:
    """Everything that `compare` computes depends on."""

    # image sets to train on; `ntt-eqx data` lists them
    datasets: tuple[str, ...] = ("fashion-mnist-mini",)
    models: tuple[str, ...] = ("lenet-300-100",)  # networks to prune
    # ways to choose the sparse network: dense (none), ntt (Neural Tangent Transfer with the active
    # kernel), ntt-ambient, ntt-sketch (a few random directions of the ambient one), random,
    # weighted-random (inputs that vary more are likelier), magnitude, lamp, wanda, snip,
    # logit-snip, grasp, synflow, ntk-sap, px, ntt-gradient, gmp, rigl, set, lottery-ticket;
    # METHOD@SCOPE sets the scope of one, as random@erk; package.module:Object or
    # ./file.py:Object is your own
    methods: tuple[str, ...] = (
        *("ntt", "random@erk", "weighted-random@erk", "snip", "synflow", "magnitude", "dense"),
    )
    # how weights are shared out over the layers: as published (ntt, random, wanda: layer; snip,
    # grasp, synflow, ntk-sap, px, lamp, magnitude: global); ranked within each layer; over all
    # layers at once; or within ERK shares (Erdős–Rényi kernel: small layers stay denser)
    scopes: tuple[Scope, ...] = ("published",)
    # shares of weights to keep; of groups, where --mask.pattern keeps these whole
    densities: tuple[float, ...] = _number((0.03,), high=1, above=True)
    # one network, one data order and one result for each
    seeds: tuple[int, ...] = _number((0,), high=2**31 - 1)
    # the label-free phase
    transfer: TransferSettings = dataclasses.field(default_factory=TransferSettings)
    # the scores of the other methods
    scoring: ScoringSettings = dataclasses.field(default_factory=ScoringSettings)
    # which weights a mask may keep
    mask: MaskSettings = dataclasses.field(default_factory=MaskSettings)
    # the supervised phase
    training: TrainingSettings = dataclasses.field(default_factory=TrainingSettings)


def check(settings: _T, place: str = "") -> _T:
    """Return `settings` if every value in it can be used; `ExperimentError` names one that cannot.

    `place` stands before the names of the fields.
    """
    for field in dataclasses.fields(settings):  # pyright: ignore[reportArgumentType]
        name, value = place + field.name, getattr(settings, field.name)
        if isinstance(value, tuple):
            if not value:
                raise ExperimentError(f"{name}: give at least one.")
            if len(set(value)) != len(value):
                raise ExperimentError(f"{name}: {_show(value)} names one of them twice.")
        for entry in value if isinstance(value, tuple) else (value,):
            if dataclasses.is_dataclass(entry):
                check(entry, f"{name}.")
            elif entry is not None and "range" in field.metadata:
                _check_range(name, entry, *field.metadata["range"])
    if isinstance(settings, TransferSettings) and settings.batch_size % 2:
        raise ExperimentError(
            f"{place}batch_size: {settings.batch_size} is odd, and a batch is cut in two halves; "
            f"use {settings.batch_size + 1}."
        )
    if isinstance(settings, TransferSettings) and settings.gradual:
        if settings.initial_mask != "magnitude" or not settings.mask_every:
            raise ExperimentError(
                f"{place}gradual: the first mask keeps all weights and others follow it; leave out "
                f"{place}initial_mask and {place}mask_every."
            )
    if isinstance(settings, TrainingSettings):
        settings.recipe()
    if isinstance(settings, CompareSettings):
        _check_mask(settings)
        _check_labels(settings)
    return settings


def parse_pattern(text: str | None) -> AbstractPattern | Callable[..., AbstractPattern] | None:
    """The pattern that `text` names; a function of `(model, x, key=key)` where the model decides.

    Raises `ExperimentError` for any other text, with those there are.
    """
    if text is None:
        return None
    if text == "channels":
        return lambda model, x, *, key: coupled_channels(model, x)
    if text in ("filters", "inputs"):
        return Channels(axis=0 if text == "filters" else 1)
    try:
        if found := re.fullmatch(r"(\d{1,4}):(\d{1,4})", text):
            return NM(int(found[1]), int(found[2]))
        if found := re.fullmatch(r"fan-in(?::(\d{1,6}))?", text):
            return ConstantFanIn(int(found[1] or 1))
        if found := re.fullmatch(r"block:(\d{1,6})x(\d{1,6})", text):
            return Block(shape=(int(found[1]), int(found[2])))
        if found := re.fullmatch(r"few-channels(?::(1/[1-9]\d{0,5}|0?\.\d{1,9}))?", text):
            share = float(fractions.Fraction(found[1] or "1/6"))
            if share > 0:
                return functools.partial(few_channels, share=share)
    except ValueError as error:
        raise ExperimentError(f"mask.pattern: {text!r}: {error}") from None
    raise ExperimentError(
        f"mask.pattern: {_show(text)} is none; there are N:M (2:4), block:ROWSxCOLUMNS "
        "(block:4x4), fan-in, fan-in:OUTPUTS (fan-in:16), filters, inputs, channels, few-channels "
        "and few-channels:SHARE (few-channels:1/6)."
    )


def load_config(path: Path, base: CompareSettings) -> CompareSettings:
    """`base` with the fields that the JSON file at `path` gives; see `from_json`.

    A comparison's `config.json` gives its `settings`.
    """
    value = read_json(path)
    if isinstance(value, dict) and isinstance(value.get("settings"), dict):
        value = value["settings"]  # the `config.json` of a comparison
    return from_json(CompareSettings, value, where=str(path), base=base)


def from_json(kind: type[_T], value: Any, *, where: str, base: _T | None = None) -> _T:
    """The settings `base` with what a decoded JSON object changes, its names and types checked.

    Raises `ExperimentError` naming `where` and the field, for an unknown field or a wrong type.
    """
    base = kind() if base is None else base
    if not isinstance(value, dict):
        raise ExperimentError(f"{where}: expected an object with fields, got {_show(value)}.")
    hints = typing.get_type_hints(kind)
    changes = {}
    for name, entry in value.items():
        if name not in hints:
            raise ExperimentError(
                f"{where}: unknown field {name!r}.{did_you_mean(name, hints)} "
                f"Fields: {', '.join(hints)}."
            )
        place = f"{where}: field {name!r}" if ": field" not in where else f"{where}.{name!r}"
        changes[name] = _convert(hints[name], entry, place, getattr(base, name))
    return dataclasses.replace(base, **changes)  # pyright: ignore[reportArgumentType]


def to_json(settings: Any) -> Any:
    """A settings object as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(settings)))


def _check_range(
    name: str, value: float | int, low: float | int, high: float | int, above: bool
) -> None:
    finite = isinstance(value, int) or math.isfinite(value)
    if not finite or not (low < value if above else low <= value) or value > high:
        bound = f"above {low:g}" if above else f"at least {low:g}"
        top = "" if high == math.inf else f" and at most {high:g}"
        raise ExperimentError(f"{name}: {value!r} must be a number {bound}{top}.")


def lines_of(settings: CompareSettings) -> list[tuple[str, str | None]]:
    """Each method with each of its scopes; `None` for one that has none, such as `dense`.

    Raises `ExperimentError` for an unknown method, or one that cannot have its scope.
    """
    lines = []
    for text in settings.methods:
        name, own = split_scope(text)
        published = find_method(name).scope
        if published is None and own is not None:
            raise ExperimentError(f"method {text!r}: {name} has no scope to choose.")
        for scope in settings.scopes if own is None else (own,):
            follows = published is None or scope == "published"
            lines.append((name, published if follows else scope))
    return list(dict.fromkeys(lines))


def _check_mask(settings: CompareSettings) -> None:
    mask, pattern = settings.mask, parse_pattern(settings.mask.pattern)
    lines = lines_of(settings)
    for name, scope in lines:
        if scope == "global" and (mask.allocation != "uniform" or isinstance(pattern, NM)):
            what = "mask.pattern" if pattern is not None else "mask.allocation"
            raise ExperimentError(
                f"{what}: sets the densities of layers, which only scope layer keeps; {name} has "
                "scope global here."
            )
    if isinstance(pattern, NM):
        share = pattern.n / pattern.m
        erk = "erk" in {mask.allocation, *(scope for _, scope in lines)}
        if settings.densities != (share,) or erk:
            raise ExperimentError(
                f"mask.pattern: {mask.pattern} keeps {share:g} of each layer; use --densities "
                f"{share:g} and no other allocation."
            )
    found = {name: find_method(name) for name, _ in lines}
    unscored = [
        name
        for name, record in found.items()
        if record.kernel or record.find or (record.dynamic and not record.score)
    ]
    if mask.ablation == "invert" and unscored:
        raise ExperimentError(f"mask.ablation: {unscored[0]} has no scores to invert.")
    changing = [name for name, record in found.items() if record.dynamic]
    if mask.ablation is not None and changing:
        raise ExperimentError(
            f"mask.ablation: {changing[0]} changes its mask in training, which {mask.ablation} "
            "comes before; leave one of them out."
        )
    free = [name for name, record in found.items() if record.find]
    if free and (pattern is not None or mask.allocation != "uniform"):
        what = "mask.pattern" if pattern is not None else "mask.allocation"
        raise ExperimentError(f"{what}: {free[0]} finds its mask itself.")


def _check_labels(settings: CompareSettings) -> None:
    """Refuse a transfer whose first mask sees labels that the training is not given."""
    first = settings.transfer.initial_mask
    transfers = any(find_method(name).kernel for name, _ in lines_of(settings))
    if settings.training.labels is not None and transfers and find_method(first).labels:
        raise ExperimentError(
            f"transfer.initial_mask: {first} looks at the labels of all images, of which "
            "training.labels leaves few; use a score that needs none."
        )


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


def _show(value: Any) -> str:
    try:
        text = json.dumps(value, default=repr)
    except (ValueError, TypeError, RecursionError):  # what no JSON file holds, or holds too deep
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."
