"""Errors that several packages raise, and imports of optional packages."""

import importlib
from typing import Any


class DivergenceError(ArithmeticError):
    """A loss became NaN or infinite.

    Attributes:
        phase: the name of the run.
        step: the step of the loss.
        value: the loss.
        reason: what was wrong, and what to do; `None` where nothing speaks against the optimiser's
            steps being too long.
    """

    def __init__(self, phase: str, step: int, value: float, reason: str | None = None):
        """Compose the message: where, why, and what to try."""
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
    """Import `module`, which an extra of this package installs.

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
