"""`python -m ntt_eqx.experiment` is `ntt-eqx`."""

import sys

from .cli import main

sys.exit(main())
