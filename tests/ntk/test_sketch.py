"""Random output directions: unbiased, better with more of them, exact with all."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.comparison import relative_error

import ntt_eqx as ntt

K = 6
KEYS = 4000


def estimates(r, difference, keys=KEYS):
    """`mean_rs (V D W^T)_rs^2` for many independent sketches of R directions."""

    def one(key):
        v, w = ntt.sketch_directions(key, r, K)
        return jnp.mean((v @ difference @ w.T) ** 2)

    return np.asarray(jax.vmap(one)(jax.random.split(jax.random.key(r), keys)), np.float64)


def test_squared_distance_is_unbiased_and_its_variance_falls():
    difference = jnp.asarray(np.random.default_rng(0).normal(size=(K, K)), jnp.float32)
    truth = float(jnp.mean(difference**2))
    variances = []
    for r in (1, 3, 5):
        found = estimates(r, difference)
        assert abs(found.mean() - truth) < 4 * found.std() / np.sqrt(KEYS)
        variances.append(found.var())
    assert variances[0] > 4 * variances[1] > 16 * variances[2]


def test_a_kernel_of_rank_one_is_unbiased_too():
    """The hardest case: one output differs, and a direction may miss it."""
    difference = jnp.zeros((K, K)).at[1, 4].set(6.0)
    found = estimates(2, difference)
    assert abs(found.mean() - 1.0) < 4 * found.std() / np.sqrt(KEYS)


def test_all_directions_are_exact():
    difference = jnp.asarray(np.random.default_rng(1).normal(size=(K, K)), jnp.float32)
    found = estimates(K, difference, keys=20)
    np.testing.assert_allclose(found, float(jnp.mean(difference**2)), rtol=1e-5)


def test_rows_are_orthonormal_and_sides_differ():
    v, w = ntt.sketch_directions(jax.random.key(0), 4, K)
    assert v.shape == w.shape == (4, K) and v.dtype == w.dtype == jnp.float32
    for side in (v, w):
        np.testing.assert_allclose(side @ side.T, np.eye(4), atol=1e-6)
    assert not np.allclose(v, w)


def test_directions_of_a_kernel():
    """`ntk(directions=(V, W))` is V Theta W^T, other counts on both sides, in blocks as well."""
    keys = jax.random.split(jax.random.key(0), 5)
    model = ntt.sparsify(eqx.nn.MLP(3, K, 4, 1, activation=jnp.tanh, key=keys[0]))
    x1, x2 = jax.random.normal(keys[1], (3, 3)), jax.random.normal(keys[2], (2, 3))
    v, w = jax.random.normal(keys[3], (2, K)), jax.random.normal(keys[4], (3, K))
    for second in (x2, None):
        theta = ntt.ntk(model, x1, second, implementation="jacobian")
        expected = jnp.einsum("rk,nmkl,sl->nmrs", v, theta, w)
        for max_bytes in (None, 64):
            found = ntt.ntk(model, x1, second, directions=(v, w), max_bytes=max_bytes)
            assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize(("r", "k"), [(0, 3), (4, 3), (-1, 3), (1, 0)])
def test_impossible_counts(r, k):
    with pytest.raises(ValueError, match=rf"1 <= R <= K, got R = {r}, K = {k}"):
        ntt.sketch_directions(jax.random.key(0), r, k)
