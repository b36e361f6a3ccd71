"""Programs that nobody drew by hand: the kernel and its gradient are those of both oracles.

`programs.py` draws them, in float64, of dense, convolutional, recurrent, gated, tied, complex and
parameter-only pieces, with masks, metrics, sketches and blocks. They are evaluated by NumPy, which
compiles nothing.
"""

import itertools

import jax
import pytest
from helpers.pieces import PIECES
from helpers.programs import NARROW, NUMBERED, Case, Program, Sample, cases, check, step, tolerance
from helpers.tiers import as_users_compile, drawn
from hypothesis import HealthCheck, example, given, settings, strategies as st

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
    most = tolerance(case.program)
    assert kernel < most and gradient < most, (kernel, gradient)


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


@settings(quiet, max_examples=7)
@example(case=EMPTY)
@given(case=cases())
def test_any_program(case):
    assert_exact(case)


EDGES = ("embedding", "stack", "hollow", "dense", "learned", "count", "function", "join")
NOT_EDGES = tuple(sorted(set(PIECES) - set(EDGES)))


@as_users_compile
@settings(quiet, max_examples=4)
@given(case=cases(without=NOT_EDGES, most=4, samples=NUMBERED))
def test_any_dtype_and_size(case):
    """Indices of any dtype into tables of any length; lengths 0 and 1; another byte order."""
    assert_exact(case)


@pytest.mark.parametrize("dtype", NARROW)
@settings(quiet, max_examples=2)
@given(data=st.data())
def test_narrow_numbers(dtype, data):
    assert_exact(data.draw(cases(dtype=dtype, most=4)))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", NARROW)
@settings(quiet, max_examples=drawn(3))
@given(data=st.data())
def test_many_narrow_numbers(dtype, data):
    assert_exact(data.draw(cases(dtype=dtype)))


@pytest.mark.slow
@settings(quiet, max_examples=drawn(10))
@given(case=cases(without=NOT_EDGES, large=True))
def test_many_dtypes_and_sizes(case):
    assert_exact(case)


@pytest.mark.slow
@settings(quiet, max_examples=drawn(3))
@given(case=cases())
def test_compiled_under_debug_nans(case):
    """JAX's own check, of what is compiled and of what runs between."""
    compiled = lambda function: lambda *arguments: jax.jit(function)(*arguments)
    with jax.debug_nans(True):
        kernel, gradient = check(case, evaluator=compiled)
    assert kernel < 1e-9 and gradient < 1e-9


@pytest.mark.slow
@settings(quiet, max_examples=drawn(30))
@given(case=cases())
def test_many_programs(case):
    assert_exact(case)
