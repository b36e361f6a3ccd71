"""Kernels by layer: each is the kernel of a metric that is 1 on this layer and 0 elsewhere."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.comparison import random_mask, relative_error
from helpers.refusals import refusals
from helpers.tiers import slow

import ntt_eqx as ntt


class Model(eqx.Module):
    """Every form: a convolution, a sequence, a dense layer, a free parameter, an unused one."""

    conv: eqx.nn.Conv2d
    along: eqx.nn.Linear
    head: eqx.nn.Linear
    scale: jax.Array
    unused: jax.Array

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.conv = eqx.nn.Conv2d(1, 3, 3, key=keys[0])
        self.along = eqx.nn.Linear(4, 5, key=keys[1])
        self.head = eqx.nn.Linear(60, 3, key=keys[2])
        self.scale, self.unused = jnp.full(60, 0.7), jnp.ones((2, 2))

    def __call__(self, x):
        h = jnp.tanh(self.conv(x)).reshape(12, 4)
        h = jnp.tanh(jax.vmap(self.along)(h)).reshape(-1)
        return self.head(h * self.scale)


def given(density):
    """A model in float64, masked or not, and two batches."""
    model = jax.tree.map(lambda w: w.astype(jnp.float64), Model(jax.random.key(0)))
    if density is not None:
        sparse = ntt.sparsify(model, where=lambda path, owner, leaf: path.endswith("weight"))
        model = sparse.with_mask(random_mask(sparse.mask, density))
    x1, x2 = (jax.random.normal(jax.random.key(n), (n, 1, 6, 6), jnp.float64) for n in (5, 4))
    return model, x1, x2


def only(model, name):
    """A metric of 1 on the parameters of one layer, and 0 elsewhere."""
    dense = eqx.filter(getattr(model, "model", model), eqx.is_inexact_array)
    on = lambda path, w: jnp.full(
        w.shape, 1.0 if jax.tree_util.keystr(path) in name.split(" + ") else 0.0
    )
    return jax.tree_util.tree_map_with_path(on, dense)


@pytest.mark.parametrize("density", [None, 0.1, slow(1.0)])
@pytest.mark.parametrize("outputs", ["full", slow("diagonal"), "trace"])
def test_each_is_the_kernel_of_its_layer_alone(density, outputs, gathers, x64):
    model, x1, x2 = given(density)
    found = ntt.ntk(model, x1, x2, outputs=outputs, by_layer=True)
    explained = ntt.explain(model, x1, x2, outputs=outputs).parameters
    assert set(found) == {p.name for p in explained if p.path != "unused"}
    assert {p.path for p in explained} >= {"jacobian", "unused"}
    for name, theta in found.items():
        expected = ntt.ntk(
            model, x1, x2, outputs=outputs, metric=only(model, name), implementation="jacobian"
        )
        assert theta.shape == expected.shape and np.any(expected)
        assert relative_error(theta, expected) < 1e-12
    assert relative_error(sum(found.values()), ntt.ntk(model, x1, x2, outputs=outputs)) < 1e-12


@pytest.mark.parametrize("max_bytes", [1, 20_000, None])
@pytest.mark.parametrize("symmetric", [False, True])
def test_in_blocks_and_with_a_metric(max_bytes, symmetric, x64):
    model, x1, x2 = given(0.5)
    x2 = None if symmetric else x2
    weights = eqx.filter(model.model, eqx.is_inexact_array)
    metric = jax.tree.map(lambda w: jnp.abs(jnp.cos(jnp.arange(w.size)).reshape(w.shape)), weights)
    found = ntt.ntk(model, x1, x2, metric=metric, max_bytes=max_bytes, by_layer=True)
    for name, theta in found.items():
        mine = jax.tree.map(jnp.multiply, metric, only(model, name))
        expected = ntt.ntk(model, x1, x2, metric=mine, implementation="jacobian")
        assert relative_error(theta, expected) < 1e-12


def test_along_directions_and_its_gradient(x64):
    model, x1, x2 = given(0.5)
    directions = tuple(jax.random.normal(jax.random.key(n), (n, 3), jnp.float64) for n in (1, 2))
    found = ntt.ntk(model, x1, x2, directions=directions, by_layer=True)
    name = ".along.weight + .along.bias"
    expected = ntt.ntk(model, x1, x2, directions=directions, metric=only(model, name))
    assert found[name].shape == (5, 4, 1, 2)
    assert relative_error(found[name], expected) < 1e-12

    def gradient(kernel):
        return eqx.filter_grad(lambda model: jnp.sum(jnp.sin(kernel(model))))(model)

    ours = gradient(lambda model: ntt.ntk(model, x1, x2, by_layer=True)[name])
    theirs = gradient(
        lambda model: ntt.ntk(model, x1, x2, metric=only(model, name), implementation="jacobian")
    )
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)


def test_a_model_whose_outputs_depend_on_no_parameter_has_no_layer():
    model = eqx.Partial(lambda w, x: x, jnp.ones(3))
    assert ntt.ntk(model, jnp.ones((2, 3)), by_layer=True) == {}


LINEAR, X = eqx.nn.Linear(3, 2, key=jax.random.key(0)), np.ones((4, 3), np.float32)
test_refusals = refusals(
    {
        "oracle": (
            lambda: ntt.ntk(LINEAR, X, by_layer=True, implementation="jacobian"),
            "ntk: by_layer goes with implementation='factors'",
        ),
        "tiles": (
            lambda: ntt.ntk_tiles(LINEAR, X, by_layer=True),
            "ntk_tiles: a tile is one kernel; by_layer=True goes with ntk alone",
        ),
        "store": (
            lambda: ntt.ntk_to_zarr("nowhere", LINEAR, X, by_layer=True),
            "ntk_to_zarr: a tile is one kernel",
        ),
    }
)
