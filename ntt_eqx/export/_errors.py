"""What goes wrong in an export although the model is right, and packages that are not there."""

import importlib
from typing import Any


class ExportError(RuntimeError):
    """An exported file does not compute what the model computes."""


def require(caller: str, module: str) -> Any:
    """Import `module`, which only the extra `export` brings.

    **Raises:**

    `ImportError` with the command that installs it, when the package itself is missing.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        if error.name is not None and error.name.split(".")[0] != package:
            raise
        raise ImportError(
            f"{caller}: needs the package {package!r}; install it with: "
            "pip install 'ntt-eqx[export]'",
            name=package,
        ) from None
