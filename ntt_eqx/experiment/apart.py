"""Words for the settings in which networks of one line differ."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .cells import ONLY_WATCH
from .methods import Line
from .results import Run
from .settings import MaskSettings, ScoringSettings, TrainingSettings, TransferSettings, to_json

_PARTS: dict[str, Any] = {
    "transfer": TransferSettings(),
    "scoring": ScoringSettings(),
    "training": TrainingSettings(),
    "mask": MaskSettings(),
}


def told_apart(runs: Sequence[Run]) -> list[Run]:
    """Runs whose results say in `settings` what their configurations differ in.

    Trainings and the types of numbers are compared among all networks of the same images and model,
    other settings among those that would stand under one name in a table. Where nothing differs,
    `settings` is missing.
    """
    configs = [_flat(run.config) for run in runs]
    trained = _differing(configs, [_place(run) for run in runs], _is_shared)
    made = _differing(configs, [_line(run) for run in runs], lambda name: not _is_shared(name))
    return [
        _told(run, config, [*one, *other])
        for run, config, one, other in zip(runs, configs, made, trained, strict=True)
    ]


def _is_shared(name: str) -> bool:
    return name.startswith("training.") or name == "x64"


def _place(run: Run) -> tuple[Any, ...]:
    return run.config.get("dataset"), run.config.get("model")


def _line(run: Run) -> tuple[Any, ...]:
    line = Line.of({**run.config, "mask": (run.result or {}).get("mask")})
    return (*_place(run), run.config.get("density"), line)


def _differing(
    configs: Sequence[Mapping[str, Any]],
    groups: Sequence[tuple[Any, ...]],
    asked: Callable[[str], bool],
) -> list[list[str]]:
    """For each configuration the `asked` names whose values differ within its group."""
    found: dict[tuple[Any, ...], list[str]] = {}
    for group in dict.fromkeys(groups):
        members = [c for c, other in zip(configs, groups, strict=True) if other == group]
        names = sorted({name for member in members for name in member if asked(name)})
        values = {name: {_word(member.get(name)) for member in members} for name in names}
        found[group] = [name for name in names if len(values[name]) > 1]
    return [found[group] for group in groups]


def _told(run: Run, config: Mapping[str, Any], names: Sequence[str]) -> Run:
    if run.result is None or not names:
        return run
    words = ", ".join(f"{name} {_word(config.get(name))}" for name in names)
    return dataclasses.replace(run, result={**run.result, "settings": words})


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a configuration by the names of their options, defaults filled in."""
    start, x64 = config.get("origin") or config.get("start"), config.get("x64", False)
    found: dict[str, Any] = {"start": start, "x64": x64}
    for part, usual in _PARTS.items():
        given = config.get(part)
        values = {**to_json(usual), **given} if isinstance(given, Mapping) else {}
        values = {name: value for name, value in values.items() if name not in ONLY_WATCH}
        found |= {f"{part}.{name.replace('_', '-')}": value for name, value in values.items()}
    code = config.get("code")
    if isinstance(code, Mapping):
        found |= {f"code of {name}": digest for name, digest in code.items()}
    return found


def _word(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return " ".join(map(_word, value)) or "none"
    text = str(value)
    return text[:8] if len(text) == 64 else text  # a digest
