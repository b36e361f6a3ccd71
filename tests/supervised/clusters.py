"""A small network and labelled clusters that it learns."""

import equinox as eqx
import jax
import numpy as np


class Net(eqx.Module):
    """Two layers with dropout between them; the key is optional."""

    first: eqx.nn.Linear
    dropout: eqx.nn.Dropout
    second: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key)
        self.first = eqx.nn.Linear(6, 16, key=keys[0])
        self.dropout = eqx.nn.Dropout(0.5)
        self.second = eqx.nn.Linear(16, 3, key=keys[1])

    def __call__(self, x, *, key=None):
        return self.second(self.dropout(jax.nn.relu(self.first(x)), key=key))


rng = np.random.default_rng(0)
CENTRES = rng.normal(size=(3, 6)) * 2


def examples(count, seed=0):
    """Three noisy clusters, learnable in a few steps."""
    draw = np.random.default_rng(seed)
    y = draw.integers(0, 3, size=count).astype(np.int32)
    return (CENTRES[y] + draw.normal(size=(count, 6))).astype(np.float32), y


def stream(count, batch=16):
    for seed in range(count):
        yield examples(batch, seed)
