"""The kernel of layers that store kept weights alone: by their entries, not by Jacobians."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.comparison import relative_error, weighted_sum
from helpers.tiers import drawn
from hypothesis import given, settings, strategies as st

import ntt_eqx as ntt

pytestmark = pytest.mark.usefixtures("x64")

everything = lambda path, layer: True


class Sequence(eqx.Module):
    """A dense layer at several positions and a grouped convolution, then dense layers."""

    each: eqx.nn.Linear
    conv: eqx.nn.Conv1d
    hidden: eqx.nn.Linear
    last: eqx.nn.Linear

    def __init__(self, width, key):
        keys = jax.random.split(key, 4)
        self.each = eqx.nn.Linear(4, 6, key=keys[0])
        self.conv = eqx.nn.Conv1d(6, 4, 2, groups=2, key=keys[1])
        self.hidden = eqx.nn.Linear(8, width, use_bias=False, key=keys[2])
        self.last = eqx.nn.Linear(width, 2, key=keys[3])

    def __call__(self, x):
        x = jnp.tanh(jax.vmap(self.each)(x)).T
        x = jnp.sin(self.conv(x)).ravel()
        return self.last(jnp.tanh(self.hidden(x)))


def masked(width, density, seed):
    rng = np.random.default_rng(seed)
    sparse = ntt.sparsify(Sequence(width, jax.random.key(seed)))

    def draw(m):
        mask = rng.random(m.shape) < density
        mask[rng.integers(len(mask))] = density > 0.5  # a full row or an empty one
        return jnp.asarray(mask)

    return sparse.with_mask(jax.tree.map(draw, sparse.mask))


def samples(n, seed):
    return jax.random.normal(jax.random.key(seed), (n, 3, 4))


def by_weights(gradient, sparse):
    """The gradient of the masked form at kept weights and biases, in the order of the model."""
    none = lambda leaf: leaf is None
    pairs = zip(jax.tree.leaves(gradient.model, is_leaf=none), sparse.masks, strict=True)
    return [g if m is None else g[np.asarray(m)] for g, m in pairs if g is not None]


def assert_kernel(width, density, n, outputs, seed):
    sparse = masked(width, density, seed)
    layers, x = ntt.sparse_layers(sparse, everything), samples(n + 2, seed)
    got = ntt.ntk(layers, x[:n], x[n:], outputs=outputs)
    want = ntt.ntk(sparse, x[:n], x[n:], outputs=outputs, implementation="jacobian")
    assert relative_error(got, want) < 1e-12


@pytest.mark.parametrize(
    "width, density, n, outputs",
    [(40, 0.3, 3, "full"), (1, 0.0, 1, "diagonal")],
)
def test_the_kernel_is_that_of_explicit_jacobians(width, density, n, outputs):
    assert_kernel(width, density, n, outputs, 3)


@pytest.mark.slow
@settings(max_examples=drawn(6), deadline=None)
@given(
    width=st.sampled_from([1, 5, 40]),
    density=st.sampled_from([0.0, 0.1, 0.4, 1.0]),
    n=st.sampled_from([1, 3]),
    outputs=st.sampled_from(["full", "diagonal", "trace"]),
    seed=st.integers(0, 10**6),
)
def test_drawn_kernels(width, density, n, outputs, seed):
    assert_kernel(width, density, n, outputs, seed)


def test_gradients_metrics_and_terms():
    sparse, x = masked(40, 0.3, 2), samples(5, 1)
    layers = ntt.sparse_layers(sparse, everything)
    loss = lambda model: weighted_sum(ntt.ntk(model, x[:2], x[2:]))
    got = jax.tree.leaves(eqx.filter_jit(eqx.filter_grad(loss))(layers).model)
    oracle = lambda model: weighted_sum(ntt.ntk(model, x[:2], x[2:], implementation="jacobian"))
    want = by_weights(eqx.filter_jit(eqx.filter_grad(oracle))(sparse), sparse)
    assert relative_error(got, want) < 1e-11

    square = lambda model: jax.tree.map(
        lambda p: 1.0 + p * p if eqx.is_inexact_array(p) else p, model
    )
    got = ntt.ntk(layers, x, metric=square(layers.model))
    want = ntt.ntk(sparse, x, metric=square(sparse.model), implementation="jacobian")
    assert relative_error(got, want) < 1e-12

    terms, whole = (ntt.ntk(model, x, by_layer=True) for model in (layers, sparse))
    assert [name.replace("values", "weight") for name in terms] == list(whole)
    assert relative_error(list(terms.values()), list(whole.values())) < 1e-12


def test_which_form_each_layer_takes():
    explanation = ntt.explain(ntt.sparse_layers(masked(40, 0.3, 2), everything), samples(3, 0))
    paths = {p.name.split(".")[1]: p.path for p in explanation.parameters}
    assert paths == {
        "each": "gathered tangents",
        "conv": "gathered tangents",
        "hidden": "gathered factors",
        "last": "gathered factors",
    }
    assert all(p.prunable for p in explanation.parameters)


class Repeated(eqx.Module):
    """A layer whose places a loop iterates over: no constants of the program."""

    layers: ntt.SparseLinear

    def __call__(self, x):
        arrays, rest = eqx.partition(self.layers, eqx.is_array)
        step = lambda x, arrays: (jnp.tanh(eqx.combine(arrays, rest)(x)), None)
        return jax.lax.scan(step, x, arrays)[0]


def test_places_that_differ_between_iterations():
    plain = [eqx.nn.Linear(3, 3, key=jax.random.key(n)) for n in range(2)]
    mask = np.eye(3, dtype=bool)
    stacked = jax.tree.map(
        lambda *leaves: jnp.stack(leaves) if eqx.is_array(leaves[0]) else leaves[0],
        *(ntt.SparseLinear(layer, mask) for layer in plain),
    )
    model, x = Repeated(stacked), samples(3, 5)[:, 0, :3]
    assert {p.path for p in ntt.explain(model, x).parameters} == {"jacobian"}
    want = ntt.ntk(model, x, implementation="jacobian")
    assert relative_error(ntt.ntk(model, x), want) < 1e-12
