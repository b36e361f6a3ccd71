"""The command `ntt-eqx`."""

import sys
from collections.abc import Sequence

from ._errors import MissingExtra


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `ntt-eqx` with `arguments` (those of the process by default).

    **Returns:**

    The exit status: 0 when all went well, 1 when a network failed, 2 for a wrong option or a
    broken file, 130 when the run was interrupted.
    """
    try:
        from .commands import run
    except ImportError as error:
        if not isinstance(error, MissingExtra):
            raise
        print(f"ntt-eqx: {error}", file=sys.stderr)
        return 2
    return run(sys.argv[1:] if arguments is None else list(arguments))
