"""Errors of an export that are not the fault of the model."""

from typing import Any

from .._errors import require as require_extra


class ExportError(RuntimeError):
    """An exported file does not compute what the model computes."""


def require(caller: str, module: str) -> Any:
    """Import `module`, which only the extra `export` brings; `MissingExtra` if it cannot be."""
    return require_extra(f"{caller}:", module, "export")
