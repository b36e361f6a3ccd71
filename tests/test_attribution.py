"""Products of loss gradients, against explicit gradients; attribution against retraining."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.comparison import random_mask, relative_error
from helpers.tiers import slow

import ntt_eqx as ntt


class Network(eqx.Module):
    conv: eqx.nn.Conv2d
    out: eqx.nn.Linear

    def __init__(self, key):
        one, two = jax.random.split(key)
        self.conv = eqx.nn.Conv2d(1, 2, 3, key=one, dtype=jnp.float64)
        self.out = eqx.nn.Linear(8, 3, key=two, dtype=jnp.float64)

    def __call__(self, x):
        return self.out(jnp.tanh(self.conv(x)).reshape(-1))


def masked(density):
    sparse = ntt.sparsify(Network(jax.random.key(0)))
    return sparse.with_mask(random_mask(sparse.mask, density))


def examples(n, seed):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, 1, 4, 4)), rng.integers(0, 3, n)


def gradients(sparse, batch, loss, kernel):
    """`[N, P]`, of the parameters that train."""
    params, static = eqx.partition(sparse.to_dense(), eqx.is_inexact_array)
    one = jax.grad(lambda p, x, y: loss(eqx.combine(p, static)(x), y))
    found = jax.vmap(one, (None, 0, 0))(params, *map(jnp.asarray, batch))
    if kernel == "active":
        keep = lambda m, g: g if m is None or g is None else jnp.where(m, g, jnp.zeros_like(g))
        found = jax.tree.map(keep, sparse.mask, found, is_leaf=lambda leaf: leaf is None)
    return jnp.concatenate([g.reshape(len(g), -1) for g in jax.tree.leaves(found)], axis=1)


def nll(logits, label):
    return -jax.nn.log_softmax(logits)[label]


def square(outputs, target):
    return jnp.sum((outputs - target) ** 2)


@pytest.mark.parametrize(
    "density, kernel, loss",
    [(0.5, "active", nll), slow(0.0, "ambient", nll), slow(0.5, "active", square)],
)
def test_products_are_those_of_explicit_gradients(density, kernel, loss, x64):
    sparse, train, test = masked(density), examples(7, 1), examples(4, 2)
    if loss is square:
        train, test = ((x, np.cos(x.reshape(len(x), -1)[:, :3])) for x, _ in (train, test))
    how = dict(loss=loss, kernel=kernel, tile=(3, 2))
    one, two = (gradients(sparse, batch, loss, kernel) for batch in (train, test))
    found = ntt.gradient_products(sparse, train, test, **how)
    assert found.shape == (4, 7)
    assert relative_error(found, two @ one.T) < 1e-10
    assert relative_error(ntt.gradient_products(sparse, train, **how), one @ one.T) < 1e-10


def test_what_has_no_gradient_or_no_place_is_refused():
    model = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))
    x, y = np.ones((2, 3), np.float32), np.array([0, 1])
    for labels in (y + 1, y - 1):
        with pytest.raises(ValueError, match=r"loss_model: labels must lie in \[0, 2\)"):
            ntt.gradient_products(model, (x, y), (x, labels))
    with pytest.raises(ValueError, match="loss_model: 2 inputs need integer labels"):
        ntt.gradient_products(model, (x, np.eye(2, dtype=np.float32)))
    turned = eqx.nn.Linear(3, 2, key=jax.random.key(0), dtype=jnp.complex64)
    size = lambda outputs, target: jnp.abs(outputs[0]) * target
    with pytest.raises(ValueError, match="loss_model: x must be real"):
        ntt.gradient_products(turned, (x.astype(np.complex64), y), loss=size)


@pytest.mark.slow
def test_the_default_loss_is_cross_entropy_and_goes_to_disk(tmp_path, x64):
    pytest.importorskip("tensorstore")
    sparse, train, test = masked(0.5), examples(5, 1), examples(3, 2)
    model, z, z_test = ntt.loss_model(sparse, train, test)
    assert isinstance(model, ntt.SparseModel) and z.shape == (5, 17)
    store = ntt.ntk_to_zarr(tmp_path / "products", model, z_test, z, tile=(2, 3))
    expected = ntt.gradient_products(sparse, train, test, loss=nll)
    assert relative_error(store.read().result()[..., 0, 0], expected) < 1e-12


@pytest.mark.parametrize("kernel", ["active", slow("ambient")])
def test_projections_are_unbiased(kernel, x64):
    sparse, batch = masked(0.5), examples(4, 1)
    how = dict(key=jax.random.key(0), kernel=kernel)
    features = ntt.projected_gradients(sparse, batch, 800, batch_size=3, **how)
    explicit = gradients(sparse, batch, nll, kernel)
    exact = explicit @ explicit.T
    lengths = jnp.sqrt(jnp.outer(jnp.diag(exact), jnp.diag(exact)))
    error = jnp.abs(features @ features.T - exact) / lengths
    assert float(error.max()) < 4 * (2 / 800) ** 0.5
    same = ntt.projected_gradients(sparse, (batch[0][:2], batch[1][:2]), 800, **how)
    assert relative_error(same, features[:2]) < 1e-10


def test_integers_that_do_not_fit():
    model = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))
    x, y = np.ones((2, 3), np.float32), np.array([0, 1])
    with pytest.raises(ValueError, match="loss_model: y has integers above"):
        ntt.loss_model(model, (x, y + 2**25), loss=lambda outputs, target: outputs[0])
    margin = lambda outputs, target: outputs.sum() * target
    for far in (np.uint32(2**32 - 1), np.int32(-(2**31))):
        with pytest.raises(ValueError, match="loss_model: y has integers above"):
            ntt.loss_model(model, (x, np.full(2, far)), loss=margin)
    with pytest.raises(ValueError, match="loss_model: batches must be of samples"):
        ntt.gradient_products(model, (x, y), (x[:, :2], y))
    with pytest.raises(ValueError, match="projected_gradients: num_projections"):
        ntt.projected_gradients(model, (x, y), 0, key=jax.random.key(0))


@pytest.mark.slow
def test_attribution_predicts_training_on_subsets():
    """The linear datamodelling score of TRAK: its sum over a subset against the loss after it."""
    data = ntt.data.load_dataset("fashion-mnist-mini:0,2,3,4,6:60")
    read = lambda split, n: ntt.data.as_batch(split, mean=data.mean, std=data.std)
    train, test = read(data.train, 0), read(data.test, 0)
    x, y = train.x[:200].reshape(200, -1), train.y[:200]
    x_test, y_test = test.x[:40].reshape(40, -1), test.y[:40]
    model = eqx.nn.MLP(784, 5, 24, 1, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    subsets = jnp.asarray(np.random.default_rng(0).random((60, 200)) < 0.5, jnp.float32)
    each = lambda p, x, y: jax.vmap(nll)(jax.vmap(eqx.combine(p, static))(x), y)

    def train_on(weights):
        loss = lambda p: jnp.sum(weights * each(p, x, y)) / jnp.sum(weights)
        step = lambda p, _: (jax.tree.map(lambda w, g: w - 0.05 * g, p, jax.grad(loss)(p)), None)
        return jax.lax.scan(step, params, None, 150)[0]

    trained = jax.jit(train_on)(jnp.ones(200))
    after = jax.jit(jax.vmap(train_on))(subsets)
    losses = jax.vmap(lambda p: each(p, x_test, y_test))(after)  # [subsets, test]
    plain = eqx.combine(trained, static)
    products = ntt.gradient_products(plain, (x, y), (x_test, y_test))
    features = [
        ntt.projected_gradients(plain, batch, 400, key=jax.random.key(1))
        for batch in ((x, y), (x_test, y_test))
    ]
    one, two = (np.asarray(f, np.float64) for f in features)
    gram = one.T @ one
    gram += 0.01 * np.trace(gram) / len(gram) * np.eye(len(gram))
    trak = two @ np.linalg.solve(gram, one.T)
    rank = lambda a: np.argsort(np.argsort(a, axis=0), axis=0).astype(float)

    def score(attribution):
        predicted, found = rank(np.asarray(subsets) @ attribution.T), rank(-np.asarray(losses))
        predicted, found = (a - a.mean(axis=0) for a in (predicted, found))
        norms = np.linalg.norm(predicted, axis=0) * np.linalg.norm(found, axis=0)
        return float(np.mean(np.sum(predicted * found, axis=0) / norms))

    scores = {"products": score(products), "trak": score(trak)}
    print(scores)
    assert min(scores.values()) > 0.15, scores
