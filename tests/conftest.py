"""Strict numerics for every test, and a source of fresh keys."""

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def getkey():
    """A function that returns a new PRNG key at every call; the same keys in every run."""
    state = {"key": jax.random.key(20)}

    def fresh():
        state["key"], key = jax.random.split(state["key"])
        return key

    return fresh


@pytest.fixture
def x64():
    """Run the test with 64-bit types enabled."""
    with jax.enable_x64(True):
        yield
