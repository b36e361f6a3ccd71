"""Errors that end a command with one sentence instead of a traceback."""

import importlib
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any


class ExperimentError(ValueError):
    """Something that the user can put right: a wrong setting, a broken file, a run in use."""


class MissingExtra(ImportError):
    """A package of the `cli` extra is not installed."""


class Diverged(ArithmeticError):
    """A loss became NaN or infinite.

    Attributes:
        stage: `"transfer"` or `"train"`.
        step: the first step whose loss is not finite.
    """

    def __init__(self, message: str, *, stage: str, step: int):
        super().__init__(message)
        self.stage = stage
        self.step = step


class Interrupted(Exception):
    """The user or the system asked the run to stop; what was done is saved."""


def require(module: str) -> Any:
    """Import `module`, which only the `cli` extra brings; `MissingExtra` says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        if error.name is not None and error.name.split(".")[0] != package:
            raise
        raise MissingExtra(
            f"this command needs the package {package!r}; install it with: "
            "pip install 'ntt-eqx[cli]'",
            name=package,
        ) from None


def check_choice(what: str, value: str, allowed: Iterable[str], several: str = "Allowed") -> str:
    """Return `value` if it is one of `allowed`; `ExperimentError` names the nearest and all."""
    names = list(allowed)
    if value in names:
        return value
    near = get_close_matches(str(value), names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ExperimentError(f"unknown {what} {value!r}.{hint} {several}: {', '.join(names)}.")
