"""Kernels compared on cases worked by hand; FLOPs of dense and convolutional layers."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.refusals import linear, refusals

import ntt_eqx as ntt
from ntt_eqx import compare_kernels, layer_costs, make_mask, scores, sparsify
from ntt_eqx._kernel_methods._diagnostics import _alignment, effective_rank


def test_the_kernel_of_a_masked_linear_layer():
    # f(x) = Wx + b: Theta[n,m,k,l] = [k = l] (sum_j m_kj x_nj x_mj + 1)
    dense = eqx.nn.Linear(3, 2, key=jax.random.key(0))
    sparse = sparsify(dense)
    mask = jnp.array([[True, False, False], [True, True, False]])
    sparse = sparse.with_mask(eqx.tree_at(lambda m: m.weight, sparse.mask, mask))
    x = jax.random.normal(jax.random.key(1), (4, 3))
    found = compare_kernels(sparse, dense, x)
    a, m = np.asarray(x, np.float64), np.asarray(mask, float)
    theta = np.zeros((4, 4, 2, 2))
    whole = np.zeros_like(theta)
    for k in range(2):
        theta[:, :, k, k] = (a * m[k]) @ a.T + 1
        whole[:, :, k, k] = a @ a.T + 1
    np.testing.assert_allclose(
        found.numbers["kernel_distance"], np.mean((theta - whole) ** 2), rtol=1e-5
    )
    blocks = [np.linalg.eigvalsh(theta[:, :, k, k]) for k in range(2)]
    wanted = np.sort(np.concatenate(blocks))[::-1]
    np.testing.assert_allclose(found.spectrum, wanted, rtol=1e-4, atol=1e-5)
    ratio = np.einsum("nnkk", theta) / np.einsum("nnkk", whole)
    np.testing.assert_allclose(found.numbers["trace_ratio"], ratio, rtol=1e-5)
    centre = np.eye(4) - 1 / 4
    one, two = (centre @ t.sum((2, 3)) @ centre for t in (theta, whole))
    wanted = np.sum(one * two) / np.linalg.norm(one) / np.linalg.norm(two)
    np.testing.assert_allclose(found.numbers["kernel_alignment"], wanted, rtol=1e-5)


def test_a_network_is_aligned_with_itself():
    dense = eqx.nn.MLP(16, 3, 8, 1, key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (5, 16))
    found = compare_kernels(sparsify(dense), dense, x).numbers
    assert found["kernel_distance"] == pytest.approx(0, abs=1e-8)
    assert found["kernel_alignment"] == pytest.approx(1)
    assert found["trace_ratio"] == pytest.approx(1)


def test_alignment_does_not_see_scale_or_shift():
    rng = np.random.default_rng(0)
    k = rng.normal(size=(6, 8))
    k = k @ k.T
    assert _alignment(k, 3 * k + 5) == pytest.approx(1)
    assert _alignment(k, np.ones((6, 6))) == 0


def testeffective_rank():
    assert effective_rank(np.ones(7)) == pytest.approx(7)
    assert effective_rank(np.array([5.0, 0.0])) == pytest.approx(1)
    assert effective_rank(np.zeros(3)) <= 1


def test_what_scale_and_rank_do():
    """Of f(x) = c w x there is one direction; its alignment does not see c, its trace does."""
    one = eqx.nn.Linear(1, 1, use_bias=False, key=jax.random.key(0))
    x = jnp.array([[1.0], [2.0], [-1.0], [0.5]])
    thrice = eqx.nn.Sequential([one, eqx.nn.Lambda(lambda y: 3 * y)])
    found = compare_kernels(sparsify(one), thrice, x)
    assert found.kernel_alignment == pytest.approx(1)
    assert found.trace_ratio == pytest.approx(1 / 9)
    assert found.effective_rank == pytest.approx(1, abs=1e-3)
    np.testing.assert_allclose(found.spectrum[0], float(jnp.sum(x**2)), rtol=1e-6)


class Pictures(eqx.Module):
    conv: eqx.nn.Conv2d
    grouped: eqx.nn.Conv2d
    head: eqx.nn.Linear

    def __init__(self, key):
        self.conv = eqx.nn.Conv2d(1, 6, 5, key=key)
        self.grouped = eqx.nn.Conv2d(6, 4, 3, stride=2, groups=2, key=key)
        self.head = eqx.nn.Linear(4, 3, key=key)

    def __call__(self, x):
        return self.head(self.grouped(self.conv(x)).mean((1, 2)))


def test_flops_count_every_position_of_a_convolution():
    # 12 x 12 -> 8 x 8 positions for 150 weights -> 3 x 3 for 4 * 3 * 9 -> one for 12
    sparse = sparsify(Pictures(jax.random.key(0)))
    costs = layer_costs(sparse, (1, 12, 12))
    assert [cost.name for cost in costs] == ["conv.weight", "grouped.weight", "head.weight"]
    assert [cost.weights for cost in costs] == [150, 108, 12]
    assert [cost.flops for cost in costs] == [150 * 64, 108 * 9, 12]
    pruned = sparse.with_mask(make_mask(scores.Random(jax.random.key(1))(sparse), 0.1))
    for cost in layer_costs(pruned, (1, 12, 12)):
        assert cost.kept == round(0.1 * cost.weights)
        assert cost.kept_flops * cost.weights == cost.flops * cost.kept


def test_counts_are_those_of_masks():
    """Float32 has no density for each of them."""
    layer = eqx.nn.Linear(4097, 4099, use_bias=False, key=jax.random.key(0))
    sparse = sparsify(layer)
    (cost,) = layer_costs(sparse.with_mask(jax.tree.map(one_less, sparse.mask)), (4097,))
    assert (cost.weights, cost.kept, cost.kept_flops) == (16793603, 16793602, 16793602)


def one_less(mask):
    return mask.at[0, 0].set(False)


def test_layers_of_kept_weights_cost_what_they_stand_for():
    sparse = sparsify(Pictures(jax.random.key(0)))
    masked = sparse.with_mask(make_mask(scores.Random(jax.random.key(1))(sparse), 0.3))
    kept = ntt.sparse_layers(masked, lambda path, layer: True)
    assert layer_costs(kept, (1, 12, 12)) == layer_costs(masked, (1, 12, 12))


def broken(value):
    return eqx.tree_at(lambda m: m.bias, linear(), jnp.asarray([0.0, value]))


X = jnp.ones((2, 3))
test_refusals = refusals(
    {
        "NaN in the inputs": (
            lambda: ntt.compare_kernels(ntt.sparsify(linear()), linear(), X.at[0, 0].set(jnp.nan)),
            "^compare_kernels: x has NaN",
        ),
        "NaN in the sparse network": (
            lambda: ntt.compare_kernels(ntt.sparsify(broken(jnp.nan)), linear(), X),
            r"^compare_kernels: sparse\..*bias has NaN",
        ),
        "infinity in the dense one": (
            lambda: ntt.compare_kernels(ntt.sparsify(linear()), broken(jnp.inf), X),
            r"^compare_kernels: dense\.bias has NaN or infinite",
        ),
        "an overflow": (
            lambda: ntt.compare_kernels(ntt.sparsify(linear()), linear(), 1e30 * X),
            "^compare_kernels: the kernel of the sparse network has NaN or infinite",
        ),
        "outputs": (
            lambda: ntt.compare_kernels(ntt.sparsify(linear()), linear(outputs=4), X),
            "^compare_kernels: both networks must have as many outputs, got 2 .* 4 of the dense",
        ),
        "no inputs": (
            lambda: ntt.compare_kernels(ntt.sparsify(linear()), linear(), None),
            "^compare_kernels: x must be an array, got NoneType",
        ),
    }
)
