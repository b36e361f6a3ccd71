"""Programs that nobody drew by hand, their kernels in tiles over eight devices, beside the oracles.

The explicit Jacobian, on one device and in float64, is what values and gradients are compared with;
`tests/ntk/test_programs.py` explains the programs.
"""

import jax
import pytest
from helpers.programs import cases, check
from helpers.tiers import drawn
from hypothesis import HealthCheck, given, settings

import ntt_eqx as ntt

EXACT = 1e-9

pytestmark = pytest.mark.usefixtures("gathers", "x64")

quiet = settings(
    derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)


def assert_exact(case):
    exchange = (None, True, False)[case.seed % 3]

    def in_tiles(function):
        def call(*arguments):
            with ntt.distribute(exchange=exchange):
                return jax.jit(function)(*arguments)

        return call

    kernel, gradient = check(case, evaluator=in_tiles)
    assert kernel < EXACT and gradient < EXACT, (kernel, gradient)


@settings(quiet, max_examples=2)
@given(case=cases(most=4))
def test_any_program_in_tiles(case):
    assert_exact(case)


@pytest.mark.slow
@settings(quiet, max_examples=drawn(6))
@given(case=cases())
def test_many_programs_in_tiles(case):
    assert_exact(case)
