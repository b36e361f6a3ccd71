"""Runs, sweeps, tables and figures; the command line `ntt-eqx`. Needs the extra `cli`."""

from ._compare import compare as compare
from ._errors import ExperimentError as ExperimentError
