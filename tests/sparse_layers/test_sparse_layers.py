"""Layers that store kept weights alone do what the masked layers do."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.refusals import unchecked
from hypothesis import given, settings, strategies as st

import ntt_eqx as ntt
from ntt_eqx._sparse_layers._costs import pays
from ntt_eqx._sparse_layers._index import KeptIndex, group_sizes

pytestmark = pytest.mark.usefixtures("x64")

everything = lambda path, layer: True
slow = lambda *values: pytest.param(*values, marks=pytest.mark.slow)


def with_masks(model, draw):
    sparse = ntt.sparsify(model)
    return sparse.with_mask(jax.tree.map(lambda m: jnp.asarray(draw(m.shape)), sparse.mask))


def scattered(density, seed=0):
    rng = np.random.default_rng(seed)
    return lambda shape: rng.random(shape) < density


def close(one, two, tolerance=1e-12):
    one, two = np.asarray(one), np.asarray(two)
    assert one.shape == two.shape and one.dtype == two.dtype
    scale = max(1.0, float(np.abs(two).max(initial=0.0)))
    np.testing.assert_allclose(one, two, rtol=0, atol=tolerance * scale)


def as_dense(sparse):
    """The plain model, made without the layers under test."""
    return ntt.masked_layers(sparse).to_dense() if isinstance(sparse, ntt.SparseModel) else sparse


def kept_only(gradient, sparse):
    """Gradients by kept weights, and by all arrays without a mask, of a masked model."""
    none = lambda leaf: leaf is None
    pairs = zip(jax.tree.leaves(gradient.model, is_leaf=none), sparse.masks, strict=True)
    return [g if m is None else g[np.asarray(m)] for g, m in pairs if g is not None]


def assert_same(sparse, x):
    """Outputs, and gradients by inputs, values and biases, of batches and of single samples."""
    layers = ntt.sparse_layers(sparse, everything)
    w = jnp.cos(jnp.arange(jax.eval_shape(jax.vmap(sparse), x).size, dtype=x.dtype))

    @eqx.filter_jit
    def of_batch(model, x):
        outputs = lambda model, x: jax.vmap(model)(x)
        loss = lambda pair: jnp.sum(jnp.sin(outputs(*pair)) * w.reshape(outputs(*pair).shape))
        return outputs(model, x), eqx.filter_grad(loss)((model, x))

    @eqx.filter_jit
    def of_samples(model, x):
        loss = lambda model, x: jnp.sum(jnp.sin(model(x)))
        return jax.vmap(lambda x: eqx.filter_grad(loss)(model, x))(x)

    for function in (of_batch, of_samples):
        want, got = function(sparse, x), function(layers, x)
        if function is of_batch:
            close(got[0], want[0])
            close(got[1][1], want[1][1])
            want, got = want[1][0], got[1][0]
            wanted = kept_only(want, sparse)
        else:
            each = [
                kept_only(jax.tree.map(lambda g, n=n: g[n], want), sparse) for n in range(len(x))
            ]
            wanted = [jnp.stack(parts) for parts in zip(*each, strict=True)]
        for one, two in zip(jax.tree.leaves(got), wanted, strict=True):
            close(one, two)
    back = ntt.masked_layers(layers)
    assert jax.tree.structure(back) == jax.tree.structure(sparse)
    assert eqx.tree_equal(back.mask, sparse.mask)
    assert eqx.tree_equal(back.to_dense(), sparse.to_dense())


@pytest.mark.parametrize(
    "shape, density",
    [
        ((1, 1), 1.0),
        slow((1, 7), 0.5),
        slow((9, 1), 0.5),
        ((5, 4), 0.0),
        slow((5, 4), 1.0),
        ((30, 40), 0.1),
    ],
)
def test_a_dense_layer(shape, density, getkey):
    layer = eqx.nn.Linear(shape[1], shape[0], use_bias=density != 0.5, key=getkey())
    x = jax.random.normal(getkey(), (3, shape[1]))
    assert_same(with_masks(layer, scattered(density)), x)


@pytest.mark.parametrize("batch", [0, 1, 17, 400])
def test_a_dense_layer_by_batches_of_every_size(batch, getkey):
    """Few samples, lanes of samples, and blocks of lanes with and without a rest."""

    def draw(shape):
        mask = scattered(0.1)(shape)
        mask[3] = True  # a full row, an empty one, and an empty column
        mask[5] = False
        mask[:, 2] = False
        return mask

    mask = draw((20, 30))
    index = KeptIndex(mask)
    values = jax.random.normal(getkey(), (index.kept,))
    plain = eqx.nn.Linear(30, 20, use_bias=False, key=getkey())
    layer = ntt.SparseLinear(plain, mask)
    product = lambda values, x: eqx.tree_at(lambda one: one.values, layer, values)(x)
    x, y = jax.random.normal(getkey(), (batch, 30)), jax.random.normal(getkey(), (batch, 20))
    sums = lambda f, v, x: jnp.sum(jnp.sin(jax.vmap(lambda x: f(v, x))(x)) * y)
    matrix = np.zeros((20, 30))
    matrix[mask] = values
    dense = lambda w, x: w @ x
    got = jax.jit(jax.grad(lambda v, x: sums(product, v, x), (0, 1)))(values, x)
    want = jax.grad(lambda w, x: sums(dense, w, x), (0, 1))(jnp.asarray(matrix), x)
    close(got[0], want[0][mask])
    close(got[1], want[1])


def test_scalar_features(getkey):
    model = eqx.nn.Sequential(
        [eqx.nn.Linear("scalar", 6, key=getkey()), eqx.nn.Linear(6, "scalar", key=getkey())]
    )
    assert_same(with_masks(model, scattered(0.5)), jax.random.normal(getkey(), (3,)))


CONVOLUTIONS = [
    (eqx.nn.Conv1d(2, 4, 3, stride=2, padding=1, key=jax.random.key(0)), (2, 9)),
    (eqx.nn.Conv2d(3, 6, 3, padding="SAME", dilation=2, key=jax.random.key(0)), (3, 6, 5)),
    (eqx.nn.Conv2d(4, 6, (2, 3), stride=(1, 2), groups=2, key=jax.random.key(0)), (4, 5, 6)),
    (
        eqx.nn.Conv2d(
            4, 4, 3, padding=((1, 0), (2, 1)), padding_mode="REFLECT", groups=4,
            use_bias=False, key=jax.random.key(0),
        ),
        (4, 4, 5),
    ),
    (
        eqx.nn.Conv3d(2, 3, 2, padding=1, padding_mode="CIRCULAR", key=jax.random.key(0)),
        (2, 3, 4, 3),
    ),
    (eqx.nn.Conv2d(1, 1, 1, key=jax.random.key(0)), (1, 1, 1)),
]  # fmt: skip


@pytest.mark.parametrize(
    "number, density",
    [
        (1, 0.3),
        (2, 0.3),
        *(slow(n, 0.3) for n in (0, 3, 4, 5)),
        *(slow(n, density) for n in range(6) for density in (0.0, 1.0)),
    ],
)
def test_a_convolution(number, density, getkey):
    conv, shape = CONVOLUTIONS[number]
    widen = lambda leaf: leaf.astype(jnp.float64) if eqx.is_inexact_array(leaf) else leaf
    conv = jax.tree.map(widen, conv)
    assert_same(with_masks(conv, scattered(density)), jax.random.normal(getkey(), (2, *shape)))


@settings(max_examples=6, deadline=None)
@given(st.data())
def test_an_index_of_any_mask(data):
    rows, columns = data.draw(st.integers(0, 40)), data.draw(st.integers(0, 40))
    density = data.draw(st.floats(0, 1))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    mask = rng.random((rows, columns)) < density * rng.random((rows, 1)) ** 3
    index = KeptIndex(mask)
    np.testing.assert_array_equal(index.mask(), mask)
    values = rng.normal(size=mask.sum())
    matrix = np.zeros(mask.shape)
    matrix[mask] = values
    np.testing.assert_array_equal(index.scatter(jnp.asarray(values)), matrix)
    for side, size, other in ((index.rows, rows, columns), (index.columns, columns, rows)):
        assert sorted(np.asarray(side.place)[:size]) == sorted(np.asarray(side.place))
        for group in side.groups:
            assert np.all(np.asarray(group.others) < other)


def test_groups_divide_the_rows_where_it_pays():
    """One group of equal rows; two where a few rows are much fuller than the others."""
    assert group_sizes(np.full(500, 20)) == [500]
    assert group_sizes(np.array([2000] * 4 + [20] * 4000)) == [4, 4000]
    assert group_sizes(np.zeros(0, int)) == []


class Net(eqx.Module):
    """A convolution, an embedding of its own, and two dense layers."""

    conv: eqx.nn.Conv2d
    hidden: eqx.nn.Linear
    weight_mixed: jax.Array
    norm: eqx.nn.LayerNorm

    def __init__(self, key):
        self.conv = eqx.nn.Conv2d(1, 4, 3, padding=1, key=key)
        self.hidden = eqx.nn.Linear(64, 12, key=key)
        self.weight_mixed = jax.random.normal(key, (5, 12))
        self.norm = eqx.nn.LayerNorm(12)

    def __call__(self, x):
        x = jax.nn.relu(self.conv(x))
        return self.weight_mixed @ self.norm(jax.nn.relu(self.hidden(jnp.ravel(x))))


@pytest.fixture
def net(getkey):
    return with_masks(Net(getkey()), scattered(0.2))


@pytest.mark.parametrize(
    "optimizer",
    [
        slow(optax.sgd(0.1, momentum=0.9)),
        optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(1e-2, weight_decay=1e-2)),
    ],
    ids=["sgd", "adamw"],
)
def test_training_is_that_of_the_masked_model(net, optimizer, getkey):
    """With L2, clipping and decay: pruned weights have no part in any of them."""
    x, y = jax.random.normal(getkey(), (20, 1, 4, 4)), jnp.arange(20) % 5
    config = ntt.TrainConfig(l2_weight=1e-2)
    layers = ntt.sparse_layers(net, everything)
    step = eqx.filter_jit(ntt.train_step)
    masked, kept = (ntt.train_init(model, config, optimizer) for model in (net, layers))
    for _ in range(4):
        masked, one = step(masked, (x, y))
        kept, two = step(kept, (x, y))
        close(two.loss, one.loss)
    got, want = ntt.masked_layers(kept.model), masked.model
    assert eqx.tree_equal(got.mask, want.mask)
    for one, two in zip(
        jax.tree.leaves(eqx.filter(got.to_dense(), eqx.is_inexact_array)),
        jax.tree.leaves(eqx.filter(want.to_dense(), eqx.is_inexact_array)),
        strict=True,
    ):
        close(one, two)
    found = ntt.evaluate(kept.model, (x, y))
    assert found["loss"] == pytest.approx(ntt.evaluate(masked.model, (x, y))["loss"], abs=1e-12)


def test_decay_of_a_recipe(net, getkey):
    """Values are weights, wherever weights are told from biases."""
    layers = ntt.sparse_layers(net, everything)
    marks = jax.tree.leaves(ntt.prunable_weights(layers.model))
    leaves = jax.tree.leaves(layers.model)
    marked = [leaf.shape for leaf, mark in zip(leaves, marks, strict=True) if mark]
    values = [layers.model.conv.values, layers.model.hidden.values, layers.model.weight_mixed]
    assert marked == [v.shape for v in values]
    recipe = ntt.Recipe(weight_decay=0.5, optimizer="sgd", momentum=0.9)
    batch = (jax.random.normal(getkey(), (20, 1, 4, 4)), jnp.arange(20) % 5)
    step = eqx.filter_jit(ntt.train_step)
    steps = [step(recipe.init(m, 3), batch)[0].model for m in (net, layers)]
    one, two = steps[0], ntt.masked_layers(steps[1])
    close(two.to_dense().hidden.weight, one.to_dense().hidden.weight)
    close(two.to_dense().hidden.bias, one.to_dense().hidden.bias)


def test_leaves_and_counts(net):
    """Kept weights, and no array of the size of a weight, in the model and in the optimiser."""
    layers = ntt.sparse_layers(net, everything)
    kept = {name: int(m.sum()) for name, m in zip("ch", jax.tree.leaves(net.mask)[:2], strict=True)}
    assert layers.model.conv.values.shape == (kept["c"],)
    assert layers.model.hidden.values.shape == (kept["h"],)
    assert [m.shape for m in jax.tree.leaves(layers.masks)] == [(5, 12)]
    assert float(layers.density()) == pytest.approx(float(net.density()), rel=1e-6)
    assert list(layers.densities()) == [".conv.values", ".hidden.values", ".weight_mixed"]
    shares = [list(m.densities().values()) for m in (layers, net)]
    np.testing.assert_allclose(*shares, rtol=1e-6)
    state = ntt.train_init(layers, ntt.TrainConfig(), optax.adam(1e-3))
    arrays = [leaf for leaf in jax.tree.leaves(state.opt_state) if eqx.is_inexact_array(leaf)]
    others = 5 * 12 + 4 + 12 + 2 * 12  # the matrix that stays, biases, the normalisation
    assert sum(a.size for a in arrays) == 2 * (kept["c"] + kept["h"] + others)


def test_memory_of_a_training_state(getkey):
    """Weights, indices and Adam's moments at 3 %, beside the dense weights."""
    layer = eqx.nn.Linear(1024, 1024, use_bias=False, dtype=jnp.float32, key=getkey())
    layers = ntt.sparse_layers(with_masks(layer, scattered(0.03)), everything)
    state = ntt.train_init(layers, ntt.TrainConfig(), optax.adam(1e-3))
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(state) if eqx.is_array(leaf))
    assert held <= 0.3 * layer.weight.nbytes


@pytest.mark.slow
def test_transformations_in_every_order(net, getkey):
    """Forward mode, second derivatives, scan, and models side by side."""
    layers = ntt.sparse_layers(net, everything)
    x = jax.random.normal(getkey(), (3, 1, 4, 4))
    loss = lambda model, x: jnp.sum(jnp.sin(model(x)))
    hessian = lambda model: jax.jit(jax.vmap(jax.hessian(lambda x: loss(model, x))))(x)
    close(hessian(layers), hessian(net))
    carried = eqx.filter_jit(
        lambda model: jax.lax.scan(lambda c, x: (c + loss(model, x), None), 0.0, x)
    )
    close(carried(layers)[0], carried(net)[0])
    remat = jax.grad(lambda x: jnp.sum(jax.vmap(jax.checkpoint(lambda x: loss(layers, x)))(x)))
    plain = jax.grad(lambda x: jnp.sum(jax.vmap(lambda x: loss(net, x))(x)))
    close(jax.jit(remat)(x), jax.jit(plain)(x))
    times = lambda model, t: jax.tree.map(lambda a: a * t if eqx.is_inexact_array(a) else a, model)
    twice = eqx.filter_jit(
        lambda model: jax.vmap(lambda t: jax.vmap(times(model, t))(x))(jnp.array([1.0, 2.0]))
    )
    close(twice(layers), twice(net))
    by_values = lambda model, t: loss(times(model, t), x[0])
    for derivative in (jax.grad, jax.jacfwd, lambda f: jax.grad(jax.grad(f))):
        one, two = (jax.jit(derivative(lambda t, m=m: by_values(m, t)))(1.5) for m in (layers, net))
        close(one, two)


def test_gradients_of_models_side_by_side(net, getkey):
    """With weights of its own for each, as an ensemble has them."""
    layers = ntt.sparse_layers(net, everything).model.hidden
    x = jax.random.normal(getkey(), (3, 64))
    values = jax.random.normal(getkey(), (2, *layers.values.shape))

    def gradient(values, x):
        layer = eqx.tree_at(lambda layer: layer.values, layers, values)
        return jax.grad(lambda v: jnp.sum(jnp.sin(jax.vmap(_with(layer, v))(x))))(values)

    _with = lambda layer, v: eqx.tree_at(lambda layer: layer.values, layer, v)
    got = jax.vmap(gradient, in_axes=(0, None))(values, x)
    close(got, jnp.stack([gradient(v, x) for v in values]))


def test_the_kernel(net, getkey):
    layers = ntt.sparse_layers(net, everything)
    x = jax.random.normal(getkey(), (5, 1, 4, 4))
    close(ntt.ntk(layers, x[:3], x[3:]), ntt.ntk(net, x[:3], x[3:]))
    assert ".hidden.values" in str(ntt.explain(layers, x))


@pytest.mark.parametrize("dtype, tolerance", [slow(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_narrow_models(dtype, tolerance, getkey):
    """In their own dtype, with sums in float32."""
    layer = eqx.nn.Linear(40, 30, dtype=dtype, key=getkey())
    sparse = with_masks(layer, scattered(0.2))
    layers = ntt.sparse_layers(sparse, everything)
    x = jax.random.normal(getkey(), (32, 40), dtype)
    loss = lambda model: jnp.sum(jnp.sin(jax.vmap(model)(x)).astype(jnp.float32))
    close(*(jax.vmap(m)(x).astype(jnp.float32) for m in (layers, sparse)), tolerance)
    got, want = eqx.filter_grad(loss)(layers), eqx.filter_grad(loss)(sparse)
    assert got.model.values.dtype == dtype
    wanted = kept_only(want, sparse)[0]
    close(got.model.values.astype(jnp.float32), wanted.astype(jnp.float32), tolerance)


@pytest.mark.slow
def test_after_compaction(getkey):
    model = ntt.models.LeNet300100((1, 4, 4), key=getkey())
    sparse = with_masks(model, scattered(0.1))
    x = jax.random.normal(getkey(), (4, 1, 4, 4))
    layers = ntt.sparse_layers(ntt.compact(sparse, x).model, everything)
    close(jax.vmap(layers)(x), jax.vmap(sparse)(x))


def test_which_layers_are_replaced(net, monkeypatch):
    only = ntt.sparse_layers(net, lambda path, layer: path == ".hidden")
    assert isinstance(only.model.hidden, ntt.SparseLinear)
    assert type(only.model.conv) is eqx.nn.Conv2d and len(jax.tree.leaves(only.masks)) == 2
    assert eqx.tree_equal(ntt.sparse_layers(net, lambda path, layer: False), net)
    large = np.zeros((2000, 1000), bool)
    large[:, :10] = True
    layer = eqx.nn.Linear(1000, 2000, key=jax.random.key(0))
    assert pays(layer, large, 64) and not pays(layer, ~large, 64)


class Own(eqx.nn.Linear):
    """A layer that may do anything."""


def test_what_is_refused(net, getkey):
    layers = ntt.sparse_layers(net, everything)
    needs_all = [
        lambda: ntt.prune(layers, ntt.scores.Magnitude(), 0.1),
        lambda: ntt.sparsify(layers.model),
        lambda: ntt.compact(layers, jnp.ones((1, 1, 4, 4))),
        lambda: ntt.export.to_csr(layers),
        lambda: ntt.ntt_init(layers, ntt.NTTConfig(density=0.1, num_steps=1), optax.sgd(0.1)),
    ]
    for call in needs_all:
        with pytest.raises(ValueError, match="masked_layers"):
            call()
    for function in (ntt.sparse_layers, ntt.masked_layers):
        message = f"{function.__name__}: needs a SparseModel"
        with unchecked(), pytest.raises(ValueError, match=message):
            function(net.model)
    with pytest.raises(ValueError, match="inside jit"):
        eqx.filter_jit(lambda net: ntt.sparse_layers(net, everything))(net)
    own = with_masks(Own(3, 3, key=getkey()), scattered(0.5))
    assert type(ntt.sparse_layers(own, everything).model) is Own
    for layer, x in ((layers.model.hidden, (2, 64)), (layers.model.conv, (4, 4))):
        with pytest.raises(ValueError, match=r"use jax\.vmap"):
            layer(jnp.ones(x))


def test_stacks_of_layers_stay_masked(getkey):
    """Their weights have an axis more than those of one layer."""
    layers = eqx.filter_vmap(lambda key: eqx.nn.Linear(8, 8, key=key))(
        jax.random.split(getkey(), 3)
    )
    sparse = ntt.prune(layers, ntt.scores.Magnitude(), 0.3)
    found = ntt.sparse_layers(sparse, lambda path, layer: True)
    assert eqx.tree_equal(found, sparse)


def test_a_model_that_reads_a_weight_is_told_what_to_do(getkey):
    class Tied(eqx.Module):
        layer: eqx.nn.Linear

        def __call__(self, x):
            return self.layer.weight.T @ self.layer(x)

    model = Tied(eqx.nn.Linear(30, 20, use_bias=False, key=getkey()))
    sparse = ntt.prune(model, ntt.scores.Magnitude(), 0.2)
    layers = ntt.sparse_layers(sparse, where=lambda path, layer: True)
    with pytest.raises(AttributeError, match="has no `weight`. Leave layers whose weight the"):
        layers(jnp.ones(30))
    assert not hasattr(layers.model.layer, "weight")
    left = ntt.sparse_layers(sparse, where=lambda path, layer: False)
    np.testing.assert_array_equal(left(jnp.ones(30)), sparse(jnp.ones(30)))
