"""A convolutional network with dense layers at its end is cut in two: still the oracle's kernel."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from comparison import relative_error

import ntt_eqx as ntt
from ntt_eqx._ntk import _factors, _parts
from ntt_eqx._ntk._layers import find_layers
from ntt_eqx._ntk._program import trace


class Crossing(eqx.Module):
    """Several values cross the cut, the sample is read behind it, and one weight on both sides."""

    conv: eqx.nn.Conv1d
    dense: eqx.nn.Linear
    head: eqx.nn.Linear
    shared: jax.Array
    turned: jax.Array

    def __init__(self, key):
        keys = jax.random.split(key, 5)
        self.conv = eqx.nn.Conv1d(2, 3, 2, key=keys[0])
        self.dense = eqx.nn.Linear(12, 5, key=keys[1])
        self.head = eqx.nn.Linear(5, 3, use_bias=False, key=keys[2])
        self.shared = jax.random.normal(keys[3], (5,))
        self.turned = jax.random.normal(keys[4], (5, 3))

    def __call__(self, x):
        turned = self.turned.T  # in front of the cut, used behind it
        y = self.conv(x) * self.shared[0]
        places = jnp.argmax(y)  # an integer that crosses
        scale = jnp.tanh(y).mean()
        h = jnp.tanh(self.dense(y.reshape(-1))) * self.shared
        return scale * self.head(h) + turned @ h + x[0, 0] * places.astype(x.dtype)


def cut_of(model, shape):
    dtype = jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))[0].dtype
    program, _ = trace(model, jax.ShapeDtypeStruct(shape, dtype))
    layers, _ = find_layers(program)
    return program, layers, _parts.split(program, layers)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_kernel_and_gradient_across_the_cut(size, monkeypatch, x64):
    """In blocks of one sample, of two (which do not divide five), and all at once."""
    monkeypatch.setattr(_factors, "block_size", lambda rows, *_: min(rows, size))
    model = Crossing(jax.random.key(0))
    model = jax.tree.map(lambda w: w.astype(jnp.float64), model)
    sparse = ntt.sparsify(model)
    mask = jax.tree.map(lambda w: jnp.arange(w.size).reshape(w.shape) % 3 > 0, sparse.mask)
    sparse = sparse.with_mask(mask)
    x1 = jax.random.normal(jax.random.key(1), (5, 2, 5), jnp.float64)
    x2 = jax.random.normal(jax.random.key(2), (5, 2, 5), jnp.float64)
    assert cut_of(model, (2, 5))[2].head
    params, rest = eqx.partition(sparse, eqx.is_inexact_array)

    def loss(params, implementation):
        theta = ntt.ntk(eqx.combine(params, rest), x1, x2, implementation=implementation)
        return jnp.sum(jnp.sin(theta))

    found = jax.value_and_grad(loss)(params, "factors")
    expected = jax.value_and_grad(loss)(params, "jacobian")
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert relative_error(ours, theirs) < 1e-10


def test_where_programs_are_cut():
    """LeNet-5 in front of its dense layers; ResNet-20, whose last layer is small, nowhere."""
    lenet = ntt.models.make_model("lenet-5", (1, 28, 28), 10, key=jax.random.key(0))
    program, layers, parts = cut_of(lenet, (1, 28, 28))
    inside = [layer.kind for layer in layers if layer.step in parts.head]
    assert inside == ["convolution", "convolution"]
    assert [layer.kind for layer in layers if layer.step not in parts.head] == ["dense"] * 2
    assert len(parts.carried) == 1 and set(parts.head).isdisjoint(
        layer.step for layer in layers if layer.kind == "dense"
    )
    resnet = ntt.models.make_model("resnet-20", (3, 8, 8), 10, key=jax.random.key(0))
    program, _, parts = cut_of(resnet, (3, 8, 8))
    assert parts.head == () and len(parts.tail) == len(program.steps)
    mlp = eqx.nn.MLP(3, 2, 4, 2, key=jax.random.key(0))
    assert cut_of(mlp, (3,))[2].head == ()
