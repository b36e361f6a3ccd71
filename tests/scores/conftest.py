"""Small models and batches that the tests of scores share."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest


class Tiny(eqx.Module):
    """Convolution, normalisation, ReLU, pool, two dense layers; dropout that must stay off."""

    conv: eqx.nn.Conv2d
    norm: eqx.nn.GroupNorm | eqx.nn.Identity
    pool: eqx.nn.MaxPool2d
    hidden: eqx.nn.Linear
    dropout: eqx.nn.Dropout
    output: eqx.nn.Linear

    def __init__(self, key, normalise=False):
        keys = jax.random.split(key, 3)
        self.conv = eqx.nn.Conv2d(2, 4, 2, key=keys[0])
        self.norm = eqx.nn.GroupNorm(2, 4) if normalise else eqx.nn.Identity()
        self.pool = eqx.nn.MaxPool2d(2, 2)
        self.hidden = eqx.nn.Linear(16, 6, key=keys[1])
        self.dropout = eqx.nn.Dropout(0.5)
        self.output = eqx.nn.Linear(6, 3, key=keys[2])

    def __call__(self, x, *, key=None):
        h = self.pool(jax.nn.relu(self.norm(self.conv(x)))).reshape(-1)
        return self.output(self.dropout(jax.nn.relu(self.hidden(h)), key=key))


class TwoLayers(eqx.Module):
    """`V relu(W x)`, worked by hand: W = [[1, -1], [2, 1]], V = [[1, 2], [-1, 1]]."""

    first: eqx.nn.Linear
    second: eqx.nn.Linear

    def __init__(self):
        linear = eqx.nn.Linear(2, 2, use_bias=False, key=jax.random.key(0))
        set_to = lambda *rows: eqx.tree_at(lambda m: m.weight, linear, jnp.asarray(rows))
        self.first = set_to([1.0, -1.0], [2.0, 1.0])
        self.second = set_to([1.0, 2.0], [-1.0, 1.0])

    def __call__(self, x):
        return self.second(jax.nn.relu(self.first(x)))


@pytest.fixture
def tiny(getkey):
    return Tiny(getkey())


@pytest.fixture
def normalised(getkey):
    return Tiny(getkey(), normalise=True)


@pytest.fixture
def two_layers():
    return TwoLayers()


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, 2, 5, 5)).astype(np.float32)
    return x, np.array([0, 1, 2, 0, 1, 2], np.int32)


@pytest.fixture
def to64():
    """Casts every float array of a tree to float64; the test must enable x64."""

    def cast(tree):
        is_float = lambda leaf: (
            eqx.is_inexact_array(leaf)
            or (isinstance(leaf, np.ndarray) and leaf.dtype == np.float32)
        )
        return jax.tree.map(
            lambda leaf: jnp.asarray(leaf, jnp.float64) if is_float(leaf) else leaf, tree
        )

    return cast
