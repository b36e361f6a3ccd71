"""Activation patterns of arbitrary models, however they write their ReLUs."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntt_eqx import scores, sparsify
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


def _named(layers, x):
    hidden = jax.nn.relu(x @ layers["w1"] + layers["b1"])
    return hidden @ layers["out"]["kernel"] + layers["out"]["shift"]


def _in_pairs(layers, x):
    for weight, bias in layers[:-1]:
        x = jax.nn.relu(jnp.dot(x, weight) + jnp.expand_dims(bias, 0))
    return (x @ layers[-1][0])[0] + layers[-1][1]


def _looped(layers, x):
    apply = lambda weight, bias, x: (x @ weight + bias).reshape(-1)
    one = lambda h, _: (jax.nn.relu(apply(layers["w"], layers["b"], x)) + 0 * h, None)
    hidden, _ = jax.lax.scan(one, jnp.zeros(5), None, length=2)
    return apply(*layers["out"], hidden)


@pytest.mark.parametrize("score", [scores.SynFlow(), scores.PathExclusion()])
@pytest.mark.parametrize("masked", [False, True])
def test_biases_of_plain_functions_are_left_out_whatever_their_names(score, masked, getkey):
    mlp = eqx.nn.MLP(3, 2, 5, 1, key=getkey())
    (w1, b1), (w2, b2) = [(layer.weight.T, layer.bias) for layer in mlp.layers]
    named = eqx.Partial(_named, {"w1": w1, "b1": b1, "out": {"kernel": w2, "shift": b2}})
    pairs = eqx.Partial(lambda p, x: _in_pairs(p, x[None]), [(w1, b1), (w2, b2)])
    looped = eqx.Partial(_looped, {"w": w1, "b": b1, "out": (w2, b2)})
    x = jax.random.normal(getkey(), (4, 3))
    kept = [layer.weight > -0.1 for layer in mlp.layers]

    def scored(model):
        full = sparsify(model)
        order = kept if model is mlp else [kept[n].T for n in range(2)]
        leaves, treedef = jax.tree.flatten(full.mask)
        order = [next(m for m in order if m.shape == leaf.shape) for leaf in leaves]
        sparse = full.with_mask(treedef.unflatten(order)) if masked else full
        found = jax.tree.leaves(score(sparse, x))
        return found if model is mlp else [s.T for s in sorted(found, key=lambda s: -s.shape[1])]

    loops = (looped,) if isinstance(score, scores.SynFlow) else ()
    for model in (named, pairs, *loops):
        for found, expected in zip(scored(model), scored(mlp), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-5)


class Shifted(eqx.Module):
    """A layer whose biases and positions have names of their own."""

    weight: jax.Array
    b: jax.Array
    positions: jax.Array
    head: eqx.nn.Linear

    def __call__(self, x):
        h = self.weight @ (x - self.positions) + (self.b + self.positions[0])
        return self.head(jax.nn.relu(h))


@pytest.mark.parametrize("score", [scores.SynFlow(), scores.PathExclusion()])
def test_what_is_added_to_a_signal_is_a_bias_in_modules_too(score, getkey):
    mlp, x = eqx.nn.MLP(3, 2, 5, 1, key=getkey()), jax.random.normal(getkey(), (4, 3))
    first, head = mlp.layers
    with_positions = Shifted(first.weight, first.bias, jnp.zeros(3), head)
    far = eqx.tree_at(lambda m: (m.b, m.positions), with_positions, replace_fn=lambda b: b + 1e-3)
    expected = jax.tree.leaves(score(mlp, x))
    for model in (with_positions, far):
        for found, e in zip(jax.tree.leaves(score(model, x)), expected, strict=True):
            np.testing.assert_allclose(found, e, rtol=1e-5)


@pytest.mark.parametrize("score", [scores.SynFlow(), scores.PathExclusion()])
def test_a_weight_with_an_update_beside_it_is_no_bias(score, getkey):
    """`w + down @ up` is a weight, and what leads through `w` are paths."""
    weight, x = jax.random.normal(getkey(), (5, 3)), jax.random.normal(getkey(), (4, 3))
    down, up, head = jnp.zeros((5, 1)), jnp.zeros((1, 3)), jax.random.normal(getkey(), (2, 5))
    lora = eqx.Partial(
        lambda p, x: p["head"] @ jax.nn.relu((p["w"] + p["down"] @ p["up"]) @ x),
        {"w": weight, "down": down, "up": up, "head": head},
    )
    plain = eqx.Partial(
        lambda p, x: p["head"] @ jax.nn.relu(p["w"] @ x), {"w": weight, "head": head}
    )
    found, expected = (score(model, x).args[0] for model in (lora, plain))
    if isinstance(score, scores.SynFlow):  # the updates are ones in the paths of the data of PX
        np.testing.assert_allclose(found["head"], expected["head"], rtol=1e-5)
    assert (np.asarray(found["head"]) > 0).any()
