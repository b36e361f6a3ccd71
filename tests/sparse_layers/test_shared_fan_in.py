"""Layers of which groups of outputs keep the same inputs: small dense products."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.comparison import relative_error
from helpers.tiers import drawn
from hypothesis import given, settings, strategies as st

import ntt_eqx as ntt
from ntt_eqx._sparse_layers._index import KeptIndex
from ntt_eqx._sparse_layers._shared_index import SharedIndex, index_of, shared_rows

pytestmark = pytest.mark.usefixtures("x64")


def shared_mask(rows, columns, height, density, seed):
    rng = np.random.default_rng(seed)
    tiles = rng.random((-(-rows // height), columns)) < density
    tiles[:, 0] |= np.arange(len(tiles)) % 2 == 0  # no two groups after one another are alike
    return np.repeat(tiles, height, axis=0)[:rows]


def assert_same(mask, batch, seed):
    """Outputs and gradients of the layer against those of the dense one under the mask."""
    key = jax.random.key(seed)
    plain = eqx.nn.Linear(mask.shape[1], mask.shape[0], key=key)
    layer, x = ntt.SparseLinear(plain, mask), jax.random.normal(key, (batch, mask.shape[1]))

    @eqx.filter_jit
    def of(model, x):
        loss = lambda pair: jnp.sum(jnp.sin(jax.vmap(pair[0])(pair[1])))
        each = jax.vmap(lambda x: jax.grad(lambda x: jnp.sum(jnp.sin(model(x))))(x))(x)
        return jax.vmap(model)(x), each, eqx.filter_grad(loss)((model, x))

    masked = eqx.tree_at(lambda m: m.weight, plain, jnp.where(mask, plain.weight, 0.0))
    got, want = of(layer, x), of(masked, x)
    assert relative_error(got[:2], want[:2]) < 1e-12
    (model, by_x), (wanted, wanted_by_x) = got[2], want[2]
    assert relative_error((model.bias, by_x), (wanted.bias, wanted_by_x)) < 1e-12
    assert relative_error(model.values, wanted.weight[mask]) < 1e-12
    np.testing.assert_array_equal(layer.mask(), mask)
    np.testing.assert_array_equal(layer.dense().weight, masked.weight)


CASES = [
    pytest.param((32, 20, 16, 0.3), id="even", marks=pytest.mark.slow),
    pytest.param((44, 20, 16, 0.3), id="a smaller last group"),
    pytest.param((9, 5, 9, 0.5), id="one group"),
    pytest.param((16, 6, 8, 1.0), id="all", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("case", CASES)
def test_shared_inputs(case):
    mask = shared_mask(*case, seed=1)
    assert isinstance(index_of(mask), SharedIndex)
    assert_same(mask, 5, 1)


@pytest.mark.slow
@settings(max_examples=drawn(8), deadline=None)
@given(
    rows=st.integers(8, 50),
    columns=st.integers(1, 30),
    height=st.sampled_from([8, 10, 16]),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    batch=st.sampled_from([1, 3, 70]),
    seed=st.integers(0, 10**6),
)
def test_drawn_shapes(rows, columns, height, density, batch, seed):
    assert_same(shared_mask(rows, columns, height, density, seed), batch, seed)


def test_when_rows_are_taken_together():
    assert shared_rows(shared_mask(48, 9, 16, 0.5, 0)) == 16
    assert shared_rows(shared_mask(48, 9, 4, 0.5, 0)) == 1  # too few rows
    assert shared_rows(np.zeros((48, 9), bool)) == 1
    uneven = np.zeros((64, 40), bool)
    uneven[:16] = uneven[16:, 0] = True  # mostly padding
    assert shared_rows(uneven) == 1 and isinstance(index_of(uneven), KeptIndex)


def test_the_pattern_gives_such_layers():
    model = eqx.nn.MLP(24, 3, 32, 1, key=jax.random.key(0))
    mask = ntt.make_mask(ntt.scores.Magnitude()(model), 0.25, pattern=ntt.ConstantFanIn(16))
    sparse = ntt.SparseModel(model, mask)
    layers = ntt.sparse_layers(sparse, lambda path, layer: True)
    assert isinstance(layers.model.layers[0].index, SharedIndex)
    x = jax.random.normal(jax.random.key(1), (4, 24))
    got, want = ntt.ntk(layers, x), ntt.ntk(sparse, x)
    assert relative_error(got, want) < 1e-12
