"""`python -m ntt_eqx`: the command `ntt-eqx`, where its script is not on the path."""

import sys

from .experiment.cli import main

if __name__ == "__main__":
    sys.exit(main())
