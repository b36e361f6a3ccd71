"""Errors that several rooms raise, and packages that are not there."""

import importlib
from typing import Any


class DivergenceError(ArithmeticError):
    """A loss became NaN or infinite.

    Attributes:
        phase: what was running.
        step: the step after which it was seen.
        value: the loss.
        reason: what was wrong, and what to do; `None` where nothing speaks against the optimiser's
            steps being too long.
    """

    def __init__(self, phase: str, step: int, value: float, reason: str | None = None):
        """Say where it happened, why, and what to try."""
        said = reason or (
            "Try a smaller learning rate or gradient clipping (optax.clip_by_global_norm), and "
            "check that the inputs are standardised."
        )
        super().__init__(f"{phase}: the loss became {value} at step {step}. {said}")
        self.phase = phase
        self.step = step
        self.value = value
        self.reason = reason


class MissingExtra(ImportError):
    """A package of an extra is not installed."""


def require(caller: str, module: str, extra: str) -> Any:
    """Import `module`, which only an extra of this package brings.

    **Raises:**

    `MissingExtra` with the command that installs it, when the package itself is missing.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        if error.name is not None and error.name.split(".")[0] != package:
            raise
        raise MissingExtra(
            f"{caller} needs the package {package!r}; install it with: "
            f"pip install 'ntt-eqx[{extra}]'",
            name=package,
        ) from None
