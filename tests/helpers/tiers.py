"""Which cases of a test run by default, and which only with `-m slow`.

A default case takes a few seconds at most. Where each case compiles programs of its own, one or two
stand for their kind by default, and `-m slow` runs the rest.
"""

import jax
import pytest


def default_only(values, *chosen):
    """The values of a parameter; all but the `chosen` ones are slow."""
    assert all(choice in values for choice in chosen), chosen
    return [v if v in chosen else pytest.param(v, marks=pytest.mark.slow) for v in values]


def slow(*values):
    """One slow case of a parametrised test."""
    return pytest.param(*values, marks=pytest.mark.slow)


def as_users_compile(test):
    """A test with narrow unsigned indices, which XLA takes for signed ones without its emitters.

    Where `conftest.py` leaves the emitters of fusions out by default, it is a slow one.
    """
    return pytest.mark.slow(test) if jax.__version_info__ < (0, 11) else test
