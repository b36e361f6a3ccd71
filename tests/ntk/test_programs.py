"""Programs that nobody drew by hand: the kernel and its gradient are those of both oracles.

`programs.py` draws them, in float64, of dense, convolutional, recurrent, gated, tied, complex and
parameter-only pieces, with masks, metrics, sketches and blocks. They are evaluated by NumPy, which
compiles nothing. The variable `NTT_EQX_PROGRAMS` says how many the slow run takes.
"""

import itertools
import os

import jax
import pytest
from helpers.programs import Case, Program, Sample, cases, check, step
from hypothesis import HealthCheck, example, given, settings

EXACT = 1e-9

pytestmark = pytest.mark.usefixtures("gathers", "x64")

quiet = settings(
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


programs_seen = itertools.count(1)


def assert_exact(case):
    if next(programs_seen) % 40 == 0:
        jax.clear_caches()  # every program is another one
    kernel, gradient = check(case)
    assert kernel < EXACT and gradient < EXACT, (kernel, gradient)


# One sample at a time, and a value without entries on the way.
EMPTY = Case(
    Program(
        Sample((4,)), (step("decay", (0,)), step("rearrange", (1,), how="mean")), ((2, True),), 2
    ),
    n=2,
    m=3,
    density=0.9,
    metric=True,
    max_bytes=4001,
)


@settings(quiet, max_examples=40)
@example(case=EMPTY)
@given(case=cases())
def test_any_program(case):
    assert_exact(case)


@pytest.mark.slow
@settings(quiet, max_examples=int(os.environ.get("NTT_EQX_PROGRAMS", "150")))
@given(case=cases())
def test_many_programs(case):
    assert_exact(case)
