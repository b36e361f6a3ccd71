"""Random features have the kernel as their mean, and their ridge regression is that of algebra."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.comparison import random_mask, relative_error
from helpers.tiers import slow

import ntt_eqx as ntt

KEY = jax.random.key(3)
OTHER = {"active": "ambient", "ambient": "active"}


def sparse_and_samples(n=6):
    model = eqx.nn.MLP(4, 2, 8, 1, key=jax.random.key(0), dtype=jnp.float64)
    sparse = ntt.sparsify(model)
    sparse = sparse.with_mask(random_mask(sparse.mask, 0.5))
    return sparse, jnp.asarray(np.random.default_rng(0).normal(size=(n, 4)))


@pytest.mark.parametrize("kernel", ["active", "ambient"])
def test_products_have_the_kernel_as_their_mean(kernel, x64):
    sparse, x = sparse_and_samples()
    rate = lambda w: jnp.asarray(np.random.default_rng(1).uniform(0, 2, w.shape))
    rates = jax.tree.map(rate, eqx.filter(sparse.model, eqx.is_inexact_array))
    how = dict(kernel=kernel, metric=rates)
    phi = ntt.random_features(sparse, x, 4000, key=KEY, batch_size=4, **how)
    theta = ntt.kernel_matrix(ntt.ntk(sparse, x, **how))
    phi = phi.reshape(len(theta), -1)
    same = jnp.diagonal(theta)
    spread = jnp.sqrt((theta**2 + same[:, None] * same[None]) / 4000)
    off = lambda right: float(jnp.abs((phi @ phi.T - right) / spread).max())
    assert off(theta) < 5  # of 144 entries none is so far off, but in one of 10,000 draws
    for other in (how | {"metric": None}, how | {"kernel": OTHER[kernel]}):
        assert off(ntt.kernel_matrix(ntt.ntk(sparse, x, **other))) > 5


def test_the_same_key_gives_features_that_go_together(x64):
    sparse, x = sparse_and_samples()
    phi = ntt.random_features(sparse, x, 20, key=KEY)
    for start, stop in ((0, 4), (4, 6)):
        some = ntt.random_features(sparse, x[start:stop], 20, key=KEY)
        np.testing.assert_allclose(some, phi[start:stop], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kernel", ["active", slow("ambient")])
def test_ridge_is_that_of_algebra(kernel, x64):
    sparse, x = sparse_and_samples(11)
    new, y = x[7:] + 0.1, jnp.sin(3 * x[:, :2])
    batches = [(x[:5], y[:5]), (x[5:], y[5:])]
    how = dict(key=KEY, kernel=kernel)
    fitted = ntt.fit_kernel_ridge_features(sparse, batches, 30, ridge=0.1, batch_size=3, **how)
    phi, other = (
        np.asarray(ntt.random_features(sparse, z, 30, **how)).reshape(-1, 30) for z in (x, new)
    )
    dual = np.linalg.solve(phi @ phi.T + 0.1 * np.eye(22), np.asarray(y).reshape(-1))
    expected = (other @ phi.T @ dual).reshape(-1, 2)
    assert relative_error(fitted(new), expected) < 1e-10
    assert relative_error(eqx.filter_jit(fitted)(new), expected) < 1e-10


def test_many_features_are_kernel_ridge_regression(x64):
    sparse, x = sparse_and_samples(20)
    y, new = jnp.sin(2 * x[:, :2]), x[:6] + 0.2
    fitted = ntt.fit_kernel_ridge_features(sparse, (x, y), 3000, key=KEY, ridge=3.0)
    exact = ntt.fit_kernel_ridge(ntt.ntk(sparse, x), y, ridge=3.0)(ntt.ntk(sparse, new, x))
    assert relative_error(fitted(new), exact) < 0.15


def test_what_is_refused():
    model = eqx.nn.MLP(4, 2, 8, 1, key=jax.random.key(0))
    x = jnp.ones((3, 4))
    with pytest.raises(ValueError, match="random_features: num_features"):
        ntt.random_features(model, x, 0, key=KEY)
    fit = lambda batches, **how: ntt.fit_kernel_ridge_features(
        model, batches, 3, **{"key": KEY, "ridge": 0.1, **how}
    )
    with pytest.raises(ValueError, match="fit_kernel_ridge_features: ridge"):
        fit((x, jnp.ones((3, 2))), ridge=0)
    with pytest.raises(ValueError, match=r"targets must be \[3, 2\]"):
        fit((x, jnp.ones((3, 1))))
    with pytest.raises(ValueError, match="there was no batch"):
        fit([])
