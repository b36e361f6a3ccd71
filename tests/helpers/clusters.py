"""A small network and labelled clusters that it learns."""

import numpy as np

from .models import Dropping


def network(key):
    return Dropping((6, 16, 3), key)


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
