"""`benchmarks/search.py`: densities that fall to shares given for each layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.scripts import BENCHMARKS

import ntt_eqx as ntt

SHARES = (0.05, 0.3, 1.0)


@pytest.fixture
def search(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import search

    return search


@pytest.mark.parametrize("fallen", [0.2, 0.7, 1.0])
def test_every_layer_is_as_far_on_its_way(search, fallen):
    class View:
        def weights(self):
            keys = jax.random.split(jax.random.key(0), 3)
            shapes = ((30, 20), (20, 30), (3, 20))
            return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]

    refresh = search.FallingShares(shares=SHARES)
    sizes = [w.size for w in View().weights()]
    left = [1 - (1 - share) * fallen for share in SHARES]
    density = sum(size * part for size, part in zip(sizes, left, strict=True)) / sum(sizes)
    mask = ntt.make_mask(refresh.scores(View()), ntt.Sparsity(density, "global"))
    for kept, w, part in zip(mask, View().weights(), left, strict=True):
        assert abs(int(kept.sum()) - part * w.size) <= 1
        least = jnp.min(jnp.where(kept, jnp.abs(w), jnp.inf))
        assert least >= jnp.max(jnp.where(kept, 0.0, jnp.abs(w)))  # the largest are kept


@pytest.mark.parametrize("shares", ["equal", "output"])
def test_a_transfer_ends_at_the_shares(search, shares, getkey):
    net = ntt.models.Perceptron((1, 4, 5), 3, units=(20, 30), key=getkey())
    x = np.random.default_rng(0).normal(size=(128, 1, 4, 5)).astype(np.float32)
    variant = search.Variant(12, shares=shares, gradual=True, sketch_size=2)
    mask = variant(net, (x, None), 0.3, jax.random.key(1)).mask
    expected = search.by_rule(shares, net, 0.3).density.values()
    for kept, share in zip(jax.tree.leaves(mask), expected, strict=True):
        assert abs(int(kept.sum()) - share * kept.size) <= 1
