"""Every score on a network small enough to work out with pencil and paper."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntt_eqx import scores

X = np.array([[1.0, 2.0]], np.float32)  # W x = [-1, 4], relu = [0, 4], logits = [8, 4]


def weights(tree):
    return np.asarray(tree.first.weight), np.asarray(tree.second.weight)


def check(tree, first, second):
    np.testing.assert_allclose(tree.first.weight, first, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(tree.second.weight, second, rtol=1e-6, atol=1e-7)
    assert tree.first.bias is None


def test_magnitude(two_layers):
    check(scores.Magnitude()(two_layers), [[1, 1], [2, 1]], [[1, 2], [1, 1]])


def test_logit_snip(two_layers):
    # ∂Σf²/∂f = [16, 8]; ∂/∂V = [16, 8]ᵀ [0, 4]; ∂/∂h = Vᵀ [16, 8] = [8, 40], gated [0, 40]
    check(scores.LogitSnip()(two_layers, X), [[0, 0], [80, 80]], [[0, 128], [0, 32]])


def test_snip(two_layers):
    # p = softmax([8, 4]); label 1: ∂L/∂f = [p0, p1 - 1] = [p, -p]; Vᵀ [p, -p] = [2p, p], gated
    p = 1 / (1 + math.exp(-4))
    check(
        scores.Snip()(two_layers, (X, np.array([1], np.int32))),
        [[0, 0], [2 * p, 2 * p]],
        [[0, 8 * p], [0, 4 * p]],
    )


def test_synflow(two_layers):
    # |W| 1 = [2, 3], column sums of |V| = [2, 3], R = 13
    tree = scores.SynFlow()(two_layers, X)
    check(tree, [[2, 2], [6, 3]], [[2, 6], [2, 3]])
    for layer in weights(tree):  # the strength of the paths is conserved from layer to layer
        assert layer.sum() == pytest.approx(13)


def test_path_exclusion(two_layers):
    # pattern [0, 1], x² = [1, 4]: g = [5, 5]; W² 1 = [2, 5], h = V² [2, 5] = [22, 7], R = 145
    tree = scores.PathExclusion()(two_layers, X)
    check(tree, [[10, 10], [100, 25]], [[10, 100], [10, 25]])
    for layer in weights(tree):
        assert layer.sum() == pytest.approx(145)


def one_layer(*weights):
    linear = eqx.nn.Linear(1, len(weights), use_bias=False, key=jax.random.key(0))
    return eqx.tree_at(lambda m: m.weight, linear, jnp.asarray(weights).reshape(-1, 1))


def test_grasp():
    # logits [ln 3, 0]: p = [3/4, 1/4]; label 1: g = p - e₁ = [3/4, -3/4];
    # H = diag(p) - p pᵀ = 3/16 [[1, -1], [-1, 1]], Hg = 9/32 [1, -1]
    model = one_layer(math.log(3.0), 0.0)
    batch = (np.ones((1, 1), np.float32), np.array([1], np.int32))
    got = scores.GraSP(temperature=1.0)(model, batch).weight
    # without the first weight the squared norm of the gradient falls: it is worth keeping
    np.testing.assert_allclose(got, [[math.log(3) * 9 / 32], [0]], rtol=1e-6)
    assert got[0, 0] > 0


def test_grasp_drops_first_what_holds_the_gradient_flow_back():
    # label 0: g = [-1/4, 1/4], Hg = 3/32 [-1, 1]: without the weight the gradient grows
    batch = (np.ones((1, 1), np.float32), np.array([0], np.int32))
    got = scores.GraSP(temperature=1.0)(one_layer(math.log(3.0), 0.0), batch).weight
    np.testing.assert_allclose(got, [[-math.log(3) * 3 / 32], [0]], rtol=1e-6)


def test_ntk_sap_of_one_weight():
    # (m θ x - m (θ + Δ) x)² = m² Δ² x², derivative 2 Δ² x²: in the mean 2 ε² a sample and round
    score = scores.NTKSAP(jax.random.key(3), rounds=400, epsilon=0.1)
    got = float(score(one_layer(2.0), np.zeros((50, 1), np.float32)).weight[0, 0])
    assert got == pytest.approx(2 * 0.1**2 * 50 * 400, rel=0.15)


def test_loss_gradient(two_layers):
    loss = lambda sparse, x: jnp.sum(jnp.square(jax.vmap(sparse)(x)))
    check(scores.LossGradient(loss)(two_layers, X), [[0, 0], [80, 80]], [[0, 128], [0, 32]])
    # f(t w) = t² f(w), so that at t = 1/2 the gradient by a weight is 1/8 of that at 1
    half = scores.LossGradient(loss, points=(0.5,))(two_layers, X)
    check(half, [[0, 0], [10, 10]], [[0, 16], [0, 4]])


def test_random_is_uniform(getkey):
    model = eqx.nn.Linear(200, 100, key=getkey())
    got = np.asarray(scores.Random(getkey())(model).weight)
    assert 0 <= got.min() < 1e-3 < 1 - 1e-3 < got.max() < 1
    assert got.mean() == pytest.approx(0.5, abs=0.01)
