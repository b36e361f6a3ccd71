"""Calls that must be refused, in the words that users see: a table of them makes a test."""

import contextlib

import equinox as eqx
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

X = np.linspace(-1.0, 1.0, 12, dtype=np.float32).reshape(4, 3)
Y = np.array([0, 1, 1, 0], np.int32)

ASKS_FOR_ONE = r"fails on one sample.*called as model\(x\), for a sample without a batch axis"
HOLDS_THEM = "needs a key goes into a module that holds it; pair `model.x, state.` with its state"


@contextlib.contextmanager
def unchecked():
    """Without the tests' type checker, as users run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        yield


def refusals(cases):
    """A test that every case of `name -> (call, message)` is a plain `ValueError` that says so."""

    @pytest.mark.parametrize("name", cases)
    def test(name):
        call, message = cases[name]
        with unchecked(), pytest.raises(ValueError, match=f"(?s){message}") as caught:
            call()
        assert type(caught.value) is ValueError
        assert len(str(caught.value)) < 1000

    return test


def linear(inputs=3, outputs=2, **options):
    return eqx.nn.Linear(inputs, outputs, key=jax.random.key(0), **options)


def broken(value):
    return eqx.tree_at(lambda m: m.bias, linear(), jnp.asarray([0.0, value]))


class Wrapped(eqx.Module):
    """A linear layer that is called in an unusual way."""

    layer: eqx.nn.Linear = eqx.field(default_factory=linear)


class Batched(Wrapped):
    def __call__(self, x):
        return jax.vmap(self.layer)(x)


class NeedsKey(Wrapped):
    def __call__(self, x, key):
        return self.layer(x + jax.random.normal(key, x.shape))


class NeedsState(Wrapped):
    def __call__(self, x, state):
        return self.layer(x), state


class ReturnsState(Wrapped):
    def __call__(self, x):
        return self.layer(x), {"count": x}


class Grid(Wrapped):
    def __call__(self, x):
        return jnp.stack([self.layer(x), self.layer(x)])
