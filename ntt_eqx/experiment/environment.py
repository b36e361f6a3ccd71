"""What computed a result: the command, the versions of packages, the machine."""

import contextlib
import contextvars
import platform
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import jax

from .. import __version__

_PACKAGES = ("jax", "jaxlib", "equinox", "optax", "grain", "numpy")
_command: contextvars.ContextVar[str] = contextvars.ContextVar("command", default="")


@contextlib.contextmanager
def as_command(text: str) -> Iterator[None]:
    """While the body runs, reports say that `text` made them."""
    token = _command.set(text)
    try:
        yield
    finally:
        _command.reset(token)


def command() -> str:
    """What the user typed; empty where that is not known."""
    return _command.get()


def environment() -> dict[str, Any]:
    """The versions of what computes, and the machine, as JSON values."""
    return {
        "versions": {"ntt-eqx": __version__, **{name: _version(name) for name in _PACKAGES}},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": [device.device_kind for device in jax.devices()],
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
