"""Every score against its definition, in float64: differences and sums over paths."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ntt_eqx as ntt
from ntt_eqx import apply_mask, make_mask, scores, sparsify
from ntt_eqx._scores._base import split_weights

STEP = 1e-5


@pytest.fixture(autouse=True)
def _float64(x64):
    """Definitions are checked in float64."""


@pytest.fixture
def sparse(tiny, to64, getkey):
    model = to64(tiny)
    return sparsify(model).with_mask(make_mask(scores.Random(getkey())(model), 0.6))


def cross_entropy(logits, y):
    return -jnp.mean(jnp.log(jax.nn.softmax(logits))[jnp.arange(len(y)), y])


def relaxed(sparse, tree):
    """The model with weights `c ⊙ w` for a real mask `c`."""
    stored, rest = split_weights(eqx.nn.inference_mode(sparse.model), sparse.mask)
    return eqx.combine(jax.tree.map(jnp.multiply, tree, stored), rest)


def derivative_by_mask(sparse, objective, leaf, entry):
    """`∂/∂c_j objective(c ⊙ w)` at `c = mask`, by a central difference."""
    c = jax.tree.map(lambda m: m.astype(jnp.float64), sparse.mask)
    leaves, treedef = jax.tree.flatten(c)

    def at(offset):
        moved = list(leaves)
        moved[leaf] = moved[leaf].at[entry].add(offset)
        return float(objective(relaxed(sparse, jax.tree.unflatten(treedef, moved))))

    return (at(STEP) - at(-STEP)) / (2 * STEP)


def some_entries(sparse, seed=0, each=4):
    rng = np.random.default_rng(seed)
    for leaf, mask in enumerate(jax.tree.leaves(sparse.mask)):
        for _ in range(each):
            yield leaf, tuple(int(rng.integers(size)) for size in mask.shape)


def check_by_differences(tree, sparse, objective, sign=abs, **tolerance):
    leaves = jax.tree.leaves(tree)
    kinds = set()
    for leaf, entry in some_entries(sparse):
        kinds.add(bool(jax.tree.leaves(sparse.mask)[leaf][entry]))
        expected = sign(derivative_by_mask(sparse, objective, leaf, entry))
        np.testing.assert_allclose(leaves[leaf][entry], expected, **tolerance)
    assert kinds == {True, False}, "pruned and kept weights should both be among the entries"


def test_snip(sparse, batch, to64):
    x, y = to64(batch[0]), batch[1]
    objective = lambda m: cross_entropy(jax.vmap(m)(x), y)
    tree = scores.Snip()(sparse, (x, y))
    check_by_differences(tree, sparse, objective, rtol=1e-6, atol=1e-9)


def test_logit_snip(sparse, batch, to64):
    x = to64(batch[0])
    objective = lambda m: jnp.sum(jax.vmap(m)(x) ** 2)
    check_by_differences(scores.LogitSnip()(sparse, x), sparse, objective, rtol=1e-6, atol=1e-8)


def test_loss_gradient(sparse, batch, to64):
    """Pruned weights get no score: a `SparseModel` hides them from its loss."""
    x = to64(batch[0])
    loss = lambda model, x: jnp.sum(jax.vmap(model)(x) ** 2)
    got = jax.tree.leaves(scores.LossGradient(loss)(sparse, x))
    expected = jax.tree.leaves(scores.LogitSnip()(sparse, x))
    for g, e, m in zip(got, expected, jax.tree.leaves(sparse.mask), strict=True):
        np.testing.assert_allclose(g, jnp.where(m, e, 0.0), rtol=1e-12)


def test_loss_gradient_is_complete(tiny, to64):
    """With the midpoints of (0, 1] the scores add up to L(w) - L(0), here all of one sign."""
    model = to64(tiny)

    def loss(sparse, x):
        dense = jax.tree.leaves(eqx.filter(sparse.to_dense(), eqx.is_inexact_array))
        return sum(jnp.sum(jnp.square(w)) for w in dense if w.ndim > 1 and w.shape[-1] > 1)

    points = tuple((i + 0.5) / 8 for i in range(8))
    tree = scores.LossGradient(loss, points)(model, jnp.zeros((1, 2, 5, 5)))
    total = sum(float(leaf.sum()) for leaf in jax.tree.leaves(tree))
    assert total == pytest.approx(float(loss(sparsify(model), None)), rel=1e-12)


def test_grasp(sparse, batch, to64):
    """w ⊙ Hg is half the derivative of the masked gradient's squared norm, of either sign."""
    x, y = to64(batch[0]), batch[1]
    temperature = 1.7

    @eqx.filter_jit
    def flow(model):
        weights, rest = split_weights(model, sparse.mask)
        loss = lambda w: cross_entropy(jax.vmap(eqx.combine(w, rest))(x) / temperature, y)
        slopes = jax.grad(loss)(weights)
        squares = jax.tree.map(lambda m, g: jnp.sum(jnp.where(m, g**2, 0.0)), sparse.mask, slopes)
        return sum(jax.tree.leaves(squares)) / 2

    tree = scores.GraSP(temperature)(sparse, (x, y))
    check_by_differences(tree, sparse, flow, sign=lambda d: d, rtol=1e-5, atol=1e-9)
    signs = {bool((leaf > 0).any()) for leaf in jax.tree.leaves(tree)}
    assert signs == {True}
    assert any(bool((leaf < 0).any()) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("kind", ["tiny", "normalised"])
def test_synflow_is_the_strength_of_the_paths_through_a_weight(kind, request, to64, getkey):
    """R is linear in each |w|: without the weight, R falls by just its score."""
    model = to64(request.getfixturevalue(kind))
    sparse = sparsify(model).with_mask(make_mask(scores.Random(getkey())(model), 0.6))

    @eqx.filter_jit
    def strength(mask):
        kept = apply_mask(model, mask)
        h = jax.nn.relu(
            jax.lax.conv(jnp.ones((1, 2, 5, 5)), abs(kept.conv.weight), (1, 1), "VALID")
        )
        h = jax.vmap(model.pool)(h).reshape(-1)  # normalisation weights are 1 at the start
        return jnp.sum(abs(kept.output.weight) @ jax.nn.relu(abs(kept.hidden.weight) @ h))

    tree = jax.tree.leaves(scores.SynFlow()(sparse, jnp.zeros((1, 2, 5, 5))))
    masks, treedef = jax.tree.flatten(sparse.mask)
    for leaf, entry in some_entries(sparse):
        on, off = list(masks), list(masks)
        on[leaf] = on[leaf].at[entry].set(True)
        off[leaf] = off[leaf].at[entry].set(False)
        lost = strength(jax.tree.unflatten(treedef, on)) - strength(
            jax.tree.unflatten(treedef, off)
        )
        # a pool of equal entries takes its gradient from one of them; the score is linear there
        if leaf != 0:
            np.testing.assert_allclose(tree[leaf][entry], lost, rtol=1e-9, atol=1e-12)
    layers = [float(jnp.sum(jnp.where(m, leaf, 0.0))) for leaf, m in zip(tree, masks, strict=True)]
    np.testing.assert_allclose(layers, float(strength(sparse.mask)), rtol=1e-9)


def test_synflow_scales_with_a_normalisation(normalised, to64):
    model = to64(normalised)
    heavier = eqx.tree_at(lambda m: m.norm.weight, model, jnp.array([-2.0, 1.0, 1.0, 1.0]))
    x = jnp.zeros((1, 2, 5, 5))
    plain, scaled = scores.SynFlow()(model, x), scores.SynFlow()(heavier, x)
    np.testing.assert_allclose(scaled.conv.weight[0], 2 * plain.conv.weight[0])
    np.testing.assert_allclose(scaled.conv.weight[1:], plain.conv.weight[1:])


def test_synflow_survives_float32_overflow(getkey):
    """R is about 1e60, the ranking that of float64."""
    model = eqx.nn.MLP(5, 3, 7, 9, key=getkey(), dtype=jnp.float64)
    model = jax.tree.map(lambda a: a * 1e6 if eqx.is_inexact_array(a) else a, model)
    short = jax.tree.map(lambda a: a.astype(jnp.float32) if eqx.is_inexact_array(a) else a, model)
    exact = scores.SynFlow()(model, jnp.zeros((1, 5)))
    got = scores.SynFlow()(short, jnp.zeros((1, 5), jnp.float32))
    assert float(exact.layers[0].weight.max()) > 1e38
    ratios = [
        (np.asarray(g, np.float64) / np.asarray(e)).ravel()
        for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(exact), strict=True)
    ]
    ratios = np.concatenate(ratios)
    np.testing.assert_allclose(ratios, ratios[0], rtol=1e-3)
    assert got.layers[0].weight.dtype == jnp.float32


def test_synflow_says_when_scaling_is_not_enough(getkey):
    model = eqx.nn.MLP(5, 3, 7, 9, key=getkey(), dtype=jnp.float32)
    model = jax.tree.map(lambda a: a * 1e15 if eqx.is_inexact_array(a) else a, model)
    with pytest.raises(ValueError, match="SynFlow: the scores overflow"):
        scores.SynFlow()(model, jnp.zeros((1, 5), jnp.float32))


def test_path_exclusion_is_a_sum_over_paths(getkey):
    """R and its derivatives, path by path."""
    model = eqx.nn.MLP(3, 2, 4, 2, key=getkey(), dtype=jnp.float64)
    sparse = sparsify(model).with_mask(make_mask(scores.Random(getkey())(model), 0.6))
    x = jax.random.normal(getkey(), (5, 3), jnp.float64)
    w = [np.asarray(layer.weight) for layer in sparse.to_dense().layers]
    stored = [np.asarray(layer.weight) for layer in model.layers]
    keep = [np.asarray(leaf) for leaf in jax.tree.leaves(sparse.mask)]
    carried = np.zeros(2)
    for sample in np.asarray(x):
        z1 = w[0] @ sample + np.asarray(model.layers[0].bias)
        z2 = w[1] @ np.maximum(z1, 0) + np.asarray(model.layers[1].bias)
        for i, a, b, k in itertools.product(range(3), range(4), range(4), range(2)):
            path = keep[0][a, i] * keep[1][b, a] * keep[2][k, b]
            carried[k] += sample[i] ** 2 * path * (z1[a] > 0) * (z2[b] > 0)
    expected = [np.zeros_like(m) for m in w]
    for i, a, b, k in itertools.product(range(3), range(4), range(4), range(2)):
        one, two, three = w[0][a, i] ** 2, w[1][b, a] ** 2, w[2][k, b] ** 2
        expected[0][a, i] += carried[k] * stored[0][a, i] ** 2 * two * three
        expected[1][b, a] += carried[k] * one * stored[1][b, a] ** 2 * three
        expected[2][k, b] += carried[k] * one * two * stored[2][k, b] ** 2
    got = jax.tree.leaves(scores.PathExclusion()(sparse, x))
    for g, e in zip(got, expected, strict=True):
        np.testing.assert_allclose(g, e, rtol=1e-12)


def test_ntk_sap(getkey):
    """The derivative by the mask of the summed distances, for the draws that it makes itself."""
    model = eqx.nn.MLP(3, 2, 4, 1, key=getkey(), dtype=jnp.float64)
    sparse = sparsify(model).with_mask(make_mask(scores.Random(getkey())(model), 0.6))
    key, shape, epsilon = getkey(), (7, 3), 0.3

    def initialise(key):
        move = lambda w: w + jax.random.normal(key, w.shape, w.dtype)
        return jax.tree.map(lambda w: move(w) if eqx.is_inexact_array(w) else w, model)

    score = scores.NTKSAP(key, rounds=2, epsilon=epsilon, initialise=initialise)
    tree = jax.tree.leaves(score(sparse, jnp.zeros(shape)))

    @eqx.filter_jit
    def objective(c):
        total = 0.0
        for round_key in jax.random.split(key, 2):
            keys = jax.random.split(round_key, 3)
            theta, rest = split_weights(initialise(keys[0]), sparse.mask)
            x = jax.random.normal(keys[1], shape, jnp.float64)
            leaves, treedef = jax.tree.flatten(theta)
            draws = zip(jax.random.split(keys[2], len(leaves)), leaves, strict=True)
            moved = [w + epsilon * jax.random.normal(k, w.shape, w.dtype) for k, w in draws]
            moved = jax.tree.unflatten(treedef, moved)
            first, second = (eqx.combine(jax.tree.map(jnp.multiply, c, w), rest)
                             for w in (theta, moved))  # fmt: skip
            total += jnp.sum((jax.vmap(first)(x) - jax.vmap(second)(x)) ** 2)
        return total

    c, treedef = jax.tree.flatten(jax.tree.map(lambda m: m.astype(jnp.float64), sparse.mask))
    for leaf, entry in some_entries(sparse):
        at = lambda t, leaf=leaf, entry=entry: float(
            objective(treedef.unflatten([m.at[entry].add(t) if i == leaf else m
                                         for i, m in enumerate(c)]))
        )  # fmt: skip
        expected = abs((at(STEP) - at(-STEP)) / (2 * STEP))
        np.testing.assert_allclose(tree[leaf][entry], expected, rtol=1e-5, atol=1e-7)


class BatchNormed(eqx.Module):
    first: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    second: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key)
        self.first = eqx.nn.Linear(3, 4, key=keys[0], dtype=jnp.float64)
        self.norm = eqx.nn.BatchNorm(4, "batch", mode="batch", dtype=jnp.float64)
        self.second = eqx.nn.Linear(4, 2, key=keys[1], dtype=jnp.float64)

    def __call__(self, x, state):
        h, state = self.norm(self.first(x), state)
        return self.second(jax.nn.relu(h)), state


def test_ntk_sap_takes_the_statistics_of_its_own_draws(getkey):
    """They are held fixed; the statistics that the model has play no part."""
    model = ntt.StatefulModel(*eqx.nn.make_with_state(BatchNormed)(getkey()))
    sparse = sparsify(model).with_mask(make_mask(scores.Random(getkey())(model), 0.6))
    key, shape, epsilon = getkey(), (7, 3), 0.3
    score = scores.NTKSAP(key, rounds=1, epsilon=epsilon, initialise=lambda key: model)
    keys = jax.random.split(jax.random.split(key, 1)[0], 3)
    x = jax.random.normal(keys[1], shape, jnp.float64)
    theta = [model.model.first.weight, model.model.second.weight]
    draws = zip(theta, jax.random.split(keys[2], 2), strict=True)
    moved = [w + epsilon * jax.random.normal(k, w.shape, w.dtype) for w, k in draws]
    masks = [m.astype(jnp.float64) for m in jax.tree.leaves(sparse.mask)]
    first, norm, second = model.model.first, model.model.norm, model.model.second
    hidden = jax.vmap(lambda x: (masks[0] * theta[0]) @ x + first.bias)(x)
    mean, var = hidden.mean(0), hidden.var(0)

    def outputs(c, w):
        def one(x):
            h = (c[0] * w[0]) @ x + first.bias
            h = jax.nn.relu((h - mean) / jnp.sqrt(var + norm.eps))
            return (c[1] * w[1]) @ h + second.bias

        return jax.vmap(one)(x)

    distance = lambda c: jnp.sum((outputs(c, theta) - outputs(c, moved)) ** 2)
    expected = [jnp.abs(g) for g in jax.grad(distance)(masks)]
    warm = ntt.warm_up(sparse, 3 + 5 * jax.random.normal(getkey(), (9, 3), jnp.float64))
    for given in (sparse, warm):
        for got, e in zip(jax.tree.leaves(score(given, x)), expected, strict=True):
            np.testing.assert_allclose(got, e, rtol=1e-6, atol=1e-9)


def test_ntk_sap_redraws_weights_from_their_layer(getkey):
    """A layer of one value keeps it, whatever is drawn; a mixed one is mixed anew."""
    mixed = eqx.nn.Sequential(
        [eqx.nn.Linear(3, 3, key=getkey(), dtype=jnp.float64), eqx.nn.Lambda(jnp.square)]
    )
    flat = eqx.tree_at(lambda m: m[0].weight, mixed, jnp.full((3, 3), 0.5))
    key, x = getkey(), jnp.zeros((5, 3))
    fixed = lambda model: scores.NTKSAP(key, rounds=1, initialise=lambda key: model)(model, x)
    redrawn = lambda model: scores.NTKSAP(key, rounds=1)(model, x)
    assert eqx.tree_equal(redrawn(flat), fixed(flat), rtol=1e-12)
    assert not eqx.tree_equal(redrawn(mixed), fixed(mixed), rtol=1e-3)


def test_lamp_of_a_layer_without_weights_is_that_of_a_dense_layer():
    """Each pruned weight would be the largest if it alone came back, and none could be ranked."""
    dense = eqx.nn.Linear(3, 2, key=jax.random.key(0))
    empty = sparsify(dense).with_mask(jax.tree.map(jnp.zeros_like, sparsify(dense).mask))
    assert eqx.tree_equal(scores.LAMP()(empty), scores.LAMP()(dense))


@pytest.mark.parametrize(
    "values", [[3, -1, 2, 1, 0, 3], [0, 0, 0, 0, 0, 0], [1e-30, 2e-30, 1, 1, 5, -4]]
)
def test_lamp(values):
    """Each weight among those that are kept and not smaller; a pruned one as if it came back."""
    weight = jnp.asarray(values, jnp.float64).reshape(2, 3)
    model = eqx.tree_at(
        lambda m: m.weight, eqx.nn.Linear(3, 2, key=jax.random.key(0)), weight
    )  # fmt: skip
    keep = np.array([[True, False, True], [True, True, False]])
    sparse = sparsify(model)
    sparse = sparse.with_mask(eqx.tree_at(lambda m: m.weight, sparse.mask, jnp.asarray(keep)))
    (got,) = jax.tree.leaves(scores.LAMP()(sparse))
    for entry, w in np.ndenumerate(np.asarray(weight)):
        others = np.array(keep)
        others[entry] = True
        chosen = np.asarray(weight)[others & (np.abs(weight) >= abs(w))]
        expected = w**2 / np.sum(chosen**2) if w else 0.0
        np.testing.assert_allclose(got[entry], expected, rtol=1e-12)
