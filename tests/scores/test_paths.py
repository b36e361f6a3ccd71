"""Activation patterns of arbitrary models, however they write their ReLUs."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntt_eqx import scores
from ntt_eqx._scores._paths import activation_pattern, apply_gated, without_normalisation

RELUS = {
    "relu": jax.nn.relu,
    "maximum": lambda z: jnp.maximum(z, 0.0),
    "maximum_left": lambda z: jnp.maximum(0, z),
    "maximum_of_zeros": lambda z: jnp.maximum(z, jnp.zeros_like(z)),
    "where": lambda z: jnp.where(z > 0, z, 0.0),
    "where_le": lambda z: jnp.where(z <= 0, 0.0, z),
    "clip": lambda z: jnp.clip(z, 0),
    "jit": jax.jit(jax.nn.relu),
    "checkpoint": jax.checkpoint(jax.nn.relu),
}


class Net(eqx.Module):
    first: eqx.nn.Linear
    norm: eqx.nn.LayerNorm
    second: eqx.nn.Linear
    relu: str = eqx.field(static=True)

    def __init__(self, relu, key):
        keys = jax.random.split(key)
        self.first = eqx.nn.Linear(3, 4, key=keys[0])
        self.norm = eqx.nn.LayerNorm(4)
        self.second = eqx.nn.Linear(4, 2, key=keys[1])
        self.relu = relu

    def __call__(self, x):
        return self.second(RELUS[self.relu](self.norm(self.first(x))))


@pytest.mark.parametrize("relu", sorted(RELUS))
def test_finds_every_way_to_write_a_relu(relu, getkey):
    model = Net(relu, getkey())
    x = jax.random.normal(getkey(), (5, 3))
    pattern = eqx.filter_jit(lambda m, x: jax.vmap(lambda s: activation_pattern(m, s))(x))(model, x)
    on = np.asarray(jax.vmap(lambda s: model.norm(model.first(s)) > 0)(x))
    assert len(pattern) == 1
    np.testing.assert_array_equal(np.asarray(pattern[0]), on if relu != "where_le" else ~on)

    # the gates of one network in another: its own units are switched as the first one's were
    gated = jax.vmap(lambda s, p: apply_gated(without_normalisation(model), s, p))(x, pattern)
    expected = jax.vmap(lambda s, o: model.second(jnp.where(o, model.first(s), 0.0)))(x, on)
    np.testing.assert_allclose(gated, expected, rtol=1e-6, atol=1e-6)


def test_all_spellings_score_alike(getkey):
    key, x = getkey(), jax.random.normal(getkey(), (5, 3))
    trees = [scores.PathExclusion()(Net(relu, key), x) for relu in ("relu", "where", "clip")]
    for tree in trees[1:]:
        np.testing.assert_allclose(tree.first.weight, trees[0].first.weight, rtol=1e-6)


def test_loops_are_refused(getkey):
    linear = eqx.nn.Linear(3, 3, key=getkey())

    class Loop(eqx.Module):
        layer: eqx.nn.Linear

        def __call__(self, x):
            return jax.lax.fori_loop(0, 3, lambda i, h: jax.nn.relu(self.layer(h)), x)

    with pytest.raises(NotImplementedError, match="unroll the loop"):
        scores.PathExclusion()(Loop(linear), jnp.ones((2, 3)))
