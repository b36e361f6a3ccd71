"""Moments of inputs, Wanda and weighted draws agree with plain sums over inputs."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ntt_eqx as ntt
from ntt_eqx import scores
from ntt_eqx._scores._inputs import InputMoments, input_moments

KEY = jax.random.key(0)


class Net(eqx.Module):
    layers: list

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def moments_of(model, x, where=None):
    sparse = ntt.sparsify(model) if where is None else ntt.sparsify(model, where)
    found = input_moments("test", sparse, x)
    return jax.tree.leaves(found, is_leaf=lambda node: isinstance(node, InputMoments))


def check(found, inputs):
    """`inputs`, `[number, *shape]`: everything that each entry of a weight is multiplied with."""
    inputs = np.asarray(inputs, np.float64)
    assert found.count == len(inputs)
    np.testing.assert_allclose(found.mean, inputs.mean(0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.spread, inputs.std(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.norm, np.sqrt((inputs**2).sum(0)), rtol=1e-5)


def test_dense_layers_see_what_the_masked_network_computes(getkey):
    model = eqx.nn.MLP(5, 3, 7, 1, key=getkey())
    x = jax.random.normal(getkey(), (11, 5)) * jnp.arange(5.0)[None] + 2
    sparse = ntt.prune(model, scores.Random(getkey()), 0.5)
    first, second = moments_of(sparse, x)
    hidden = jax.nn.relu(jax.vmap(ntt.apply_mask(sparse.model, sparse.mask).layers[0])(x))
    check(first, np.broadcast_to(x[:, None], (11, 7, 5)))
    check(second, np.broadcast_to(hidden[:, None], (11, 3, 7)))
    assert first.of_sample and not second.of_sample


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_see_all_positions(getkey, groups):
    conv = eqx.nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=groups, key=getkey())
    x = jax.random.normal(getkey(), (3, 4, 8, 8)) + 1
    (found,) = moments_of(conv, x)
    patches = jax.vmap(
        lambda image: jax.lax.conv_general_dilated_patches(
            image[None], (3, 3), (2, 2), [(1, 1), (1, 1)]
        )[0]
    )(x)
    patches = np.moveaxis(np.asarray(patches).reshape(3, 4, 3, 3, -1), -1, 1).reshape(-1, 4, 3, 3)
    of_output = [patches[:, g * (4 // groups) : (g + 1) * (4 // groups)] for g in range(groups)]
    check(found, np.stack([of_output[i * groups // 6] for i in range(6)], axis=1))
    assert found.of_sample


def test_a_shared_weight_sees_the_inputs_of_all_its_layers(getkey):
    layer = eqx.nn.Linear(4, 4, key=getkey())
    shared = eqx.nn.Shared([layer, layer], lambda pair: pair[1], lambda pair: pair[0])

    class Twice(eqx.Module):
        shared: eqx.nn.Shared

        def __call__(self, x):
            first, second = self.shared()
            return second(jnp.tanh(first(x)))

    x = jax.random.normal(getkey(), (9, 4))
    (found,) = moments_of(Twice(shared), x)
    again = jnp.tanh(jax.vmap(layer)(x))
    check(found, np.broadcast_to(jnp.concatenate([x, again])[:, None], (18, 4, 4)))
    assert not found.of_sample


def test_layers_in_a_loop(getkey):
    """The weight on what the loop walks over sees the sample; that on what it carries does not."""

    class Recurrent(eqx.Module):
        read: eqx.nn.Linear
        step: eqx.nn.Linear

        def __call__(self, x):
            move = lambda h, row: (jnp.tanh(self.read(row) + self.step(h)), None)
            return jax.lax.scan(move, jnp.zeros(6), x)[0]

    model = Recurrent(eqx.nn.Linear(3, 6, key=getkey()), eqx.nn.Linear(6, 6, key=getkey()))
    x = jax.random.normal(getkey(), (5, 4, 3))
    read, step = moments_of(model, x)
    check(read, np.broadcast_to(x.reshape(-1, 1, 3), (20, 6, 3)))
    states = []
    for sample in x:
        h = jnp.zeros(6)
        for row in sample:
            states.append(h)
            h = jnp.tanh(model.read(row) + model.step(h))
    check(step, np.broadcast_to(np.stack(states)[:, None], (20, 6, 6)))
    assert read.of_sample and not step.of_sample


def test_stacked_layers_and_rules_of_their_own(getkey):
    """Each layer of a stack has its own inputs, also where an activation has its own derivative."""

    @jax.custom_vjp
    def straight(x):
        return jnp.sign(x)

    straight.defvjp(lambda x: (jnp.sign(x), None), lambda _, d: (d,))

    class Stack(eqx.Module):
        layers: eqx.nn.Linear

        def __call__(self, x):
            dynamic, static = eqx.partition(self.layers, eqx.is_array)
            step = lambda h, one: (straight(eqx.combine(one, static)(h)), None)
            return jax.lax.scan(step, x, dynamic)[0]

    keys = jax.random.split(getkey(), 3)
    model = Stack(eqx.filter_vmap(lambda key: eqx.nn.Linear(4, 4, key=key))(keys))
    x = jax.random.normal(getkey(), (6, 4))
    (found,) = moments_of(model, x)
    inputs = [x]
    for n in range(2):
        layer = jax.tree.map(lambda leaf, n=n: leaf[n], model.layers)
        inputs.append(
            jnp.sign(jax.vmap(lambda x, layer=layer: layer.weight @ x + layer.bias)(inputs[-1]))
        )
    check(found, np.broadcast_to(np.stack(inputs, 1)[:, :, None], (6, 3, 4, 4)))


def test_embeddings_see_how_often_a_token_comes(getkey):
    model = Net([eqx.nn.Embedding(5, 3, key=getkey())])
    x = jnp.asarray([0, 0, 1, 4])
    (found,) = moments_of(model, x, lambda *_: True)
    one_hot = np.eye(5)[np.asarray(x)]
    check(found, np.broadcast_to(one_hot[:, :, None], (4, 5, 3)))


def test_a_small_spread_beside_a_large_mean(getkey):
    x = 1e4 + jax.random.normal(getkey(), (50, 8))
    (found,) = moments_of(eqx.nn.Linear(8, 2, key=getkey()), x)
    np.testing.assert_allclose(found.spread[0], np.std(np.asarray(x, np.float64), 0), rtol=1e-4)


def test_blocks_of_samples_change_nothing(getkey, monkeypatch):
    model = eqx.nn.Conv2d(2, 3, 3, key=getkey())
    x = jax.random.normal(getkey(), (7, 2, 6, 6))
    (whole,) = moments_of(model, x)
    jax.clear_caches()
    monkeypatch.setattr("ntt_eqx._scores._inputs._BLOCK_BYTES", 1)
    (parts,) = moments_of(model, x)
    np.testing.assert_allclose(whole.spread, parts.spread, rtol=1e-6)


@pytest.mark.parametrize("score", [scores.Wanda(), scores.WeightedRandom(KEY)])
def test_a_weight_that_is_no_layers_weight_is_named(getkey, score):
    class Standardised(eqx.Module):
        linear: eqx.nn.Linear

        def __call__(self, x):
            w = self.linear.weight
            return (w - jnp.mean(w)) @ x

    model = Standardised(eqx.nn.Linear(4, 3, key=getkey()))
    with pytest.raises(ValueError, match=r"\.linear\.weight is used other than"):
        score(model, jnp.ones((2, 4)))


def test_wanda(getkey):
    model = eqx.nn.MLP(5, 3, 7, 1, key=getkey())
    x = jax.random.normal(getkey(), (11, 5))
    found = jax.tree.leaves(scores.Wanda()(model, x))
    inputs = x, jax.nn.relu(jax.vmap(model.layers[0])(x))
    for got, layer, a in zip(found, model.layers, inputs, strict=True):
        norms = np.linalg.norm(a, axis=0)
        np.testing.assert_allclose(got, np.abs(layer.weight) * norms, rtol=1e-5)


def test_weighted_draws_follow_the_variance(getkey):
    """Few of many: the shares of inputs are those of their variances; constant ones come last."""
    model = Net([eqx.nn.Linear(4, 20_000, use_bias=False, key=getkey()), jnp.sum])
    spread = np.asarray([0.0, 1.0, 1.5, 2.0])
    x = 3 + np.asarray([[-1.0], [1.0]]) * spread
    kept = ntt.prune(model, scores.WeightedRandom(getkey()), 0.01, x).mask.layers[0].weight
    share = np.asarray(kept).sum(0) / np.asarray(kept).sum()
    np.testing.assert_allclose(share, spread**2 / (spread**2).sum(), atol=0.05)
    most = ntt.prune(model, scores.WeightedRandom(getkey()), 0.8, x).mask.layers[0].weight
    columns = np.asarray(most).sum(0)
    assert (columns[1:] == 20_000).all() and 3_500 < columns[0] < 4_500
    assert np.asarray(most)[:10_000, 0].sum() > 1_500, "among themselves they are random"


def test_weighted_draws_are_plain_behind_the_first_layer(getkey):
    """Units that vary more have no advantage there: which do changes with the weights."""
    first = eqx.nn.Linear(2, 2, use_bias=False, key=getkey())
    first = eqx.tree_at(lambda m: m.weight, first, jnp.asarray([[1.0, 0.0], [0.0, 100.0]]))
    model = Net([first, eqx.nn.Linear(2, 20_000, use_bias=False, key=getkey()), jnp.sum])
    x = jax.random.normal(getkey(), (30, 2))
    kept = ntt.prune(model, scores.WeightedRandom(getkey()), 0.5, x).mask.layers[1].weight
    assert abs(np.asarray(kept)[:, 0].mean() - 0.5) < 0.02


def test_float64_stays_and_complex_weights_are_refused(getkey, x64):
    x = jax.random.normal(getkey(), (7, 4), jnp.float64)
    layer = lambda dtype: eqx.nn.Linear(4, 3, use_bias=False, dtype=dtype, key=getkey())
    (wide,) = moments_of(layer(jnp.float64), x)
    np.testing.assert_allclose(wide.spread[0], np.std(np.asarray(x), axis=0), rtol=1e-12)
    with pytest.raises(ValueError, match=r"layers\[0\]\.weight is used other than"):
        moments_of(Net([layer(jnp.complex128), jnp.abs]), x.astype(jnp.complex128))
