"""Errors that end a command with one sentence instead of a traceback."""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from .._errors import MissingExtra as MissingExtra, require as require_extra


class ExperimentError(ValueError):
    """Something that the user can put right: a wrong setting, a broken file, a run in use."""


class NetworkFailed(Exception):
    """One network cannot be made, though others of its comparison can.

    Attributes:
        stage: the phase that failed: `"mask"`, `"transfer"` or `"train"`.
        step: the first step whose loss is NaN or infinite; `None` where no step failed.
    """

    def __init__(self, message: str, *, stage: str, step: int | None = None):
        super().__init__(message)
        self.stage = stage
        self.step = step


class Interrupted(Exception):
    """The user or the system asked the run to stop; what was done is saved."""


def require(module: str) -> Any:
    """Import `module`, which only the `cli` extra brings; `MissingExtra` says how to install it."""
    return require_extra("this command", module, "cli")


def check_choice(what: str, value: str, allowed: Iterable[str]) -> str:
    """Return `value` if it is one of `allowed`; `ExperimentError` names the nearest and all."""
    names = list(allowed)
    if value not in names:
        hint = did_you_mean(value, names)
        raise ExperimentError(f"unknown {what} {value!r}.{hint} Allowed: {', '.join(names)}.")
    return value


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """A question about the allowed name that is nearest to `name`; empty where none is near."""
    near = get_close_matches(name, allowed, n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
