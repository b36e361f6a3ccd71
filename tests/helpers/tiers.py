"""Which cases of a test run by default, which only with `-m slow`, and how many are drawn there.

A default case takes a few seconds at most. Where each case compiles programs of its own, one or two
stand for their kind by default, and `-m slow` runs the rest.
"""

import os

import jax
import pytest

TIMES = float(os.environ.get("NTT_EQX_DRAWN", "1"))

# These stand for the families of the library's models.
FAMILIES = ("lenet-300-100", "lenet-5", "conv-4", "mlp-1568", "vgg-11-bn", "resnet-20-bn", "vit")


def default_only(values, *chosen):
    """The values of a parameter; all but the `chosen` ones are slow."""
    assert all(choice in values for choice in chosen), chosen
    return [v if v in chosen else pytest.param(v, marks=pytest.mark.slow) for v in values]


def slow(*values):
    """One slow case of a parametrised test."""
    return pytest.param(*values, marks=pytest.mark.slow)


def drawn(count):
    """How many cases a slow test draws: `count`, or `NTT_EQX_DRAWN` times as many.

    Set it to 5, for an hour or two, after a change to the engine or before a release. `.ci/run`
    sets it below 1 on a slow machine.
    """
    return max(1, round(TIMES * count))


def as_users_compile(test):
    """A test with narrow unsigned indices, which XLA takes for signed ones without its emitters.

    Where `conftest.py` leaves the emitters of fusions out by default, it is a slow one.
    """
    return pytest.mark.slow(test) if jax.__version_info__ < (0, 11) else test
