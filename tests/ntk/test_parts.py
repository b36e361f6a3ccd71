"""A convolutional network with dense layers at its end is cut in two: still the oracle's kernel."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from helpers.comparison import relative_error

import ntt_eqx as ntt
from ntt_eqx._ntk import _execute
from ntt_eqx._ntk._plan import make_plan
from ntt_eqx._ntk._spec import kernel_spec


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


def parts_of(model, shape):
    """The parts of a model's program by name, and the kinds of the layers in each."""
    dtype = jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))[0].dtype
    plan, _ = make_plan(kernel_spec(), model, jax.ShapeDtypeStruct((2, *shape), dtype), m=2)
    kinds = {p.name: [plan.layers[n].layer.kind for n in p.layers] for p in plan.parts}
    return {part.name: part for part in plan.parts}, kinds


@pytest.mark.parametrize("size", [1, 2, 5])
def test_kernel_and_gradient_across_the_cut(size, monkeypatch, x64):
    """In blocks of one sample, of two (which do not divide five), and all at once."""
    monkeypatch.setattr(_execute, "block_size", lambda rows, *_: min(rows, size))
    model = Crossing(jax.random.key(0))
    model = jax.tree.map(lambda w: w.astype(jnp.float64), model)
    sparse = ntt.sparsify(model, lambda path, owner, leaf: leaf.ndim > 1)
    mask = jax.tree.map(lambda w: jnp.arange(w.size).reshape(w.shape) % 3 > 0, sparse.mask)
    sparse = sparse.with_mask(mask)
    x1 = jax.random.normal(jax.random.key(1), (5, 2, 5), jnp.float64)
    x2 = jax.random.normal(jax.random.key(2), (5, 2, 5), jnp.float64)
    assert "head" in parts_of(model, (2, 5))[0]
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
    parts, kinds = parts_of(lenet, (1, 28, 28))
    assert kinds == {"once": [], "head": ["convolution"] * 2, "tail": ["dense"] * 2}
    assert len(parts["head"].writes) == 1 == len(parts["tail"].carried)
    resnet = ntt.models.make_model("resnet-20", (3, 8, 8), 10, key=jax.random.key(0))
    assert set(parts_of(resnet, (3, 8, 8))[0]) == {"once", "tail"}
    mlp = eqx.nn.MLP(3, 2, 4, 2, key=jax.random.key(0))
    assert set(parts_of(mlp, (3,))[0]) == {"once", "tail"}


@pytest.mark.parametrize("model", ["crossing", "lenet-5"])
def test_every_step_has_one_part_and_what_crosses_is_read_and_written(model):
    if model == "crossing":
        parts, _ = parts_of(Crossing(jax.random.key(0)), (2, 5))
    else:
        lenet = ntt.models.make_model("lenet-5", (1, 28, 28), 10, key=jax.random.key(0))
        parts, _ = parts_of(lenet, (1, 28, 28))
    steps = [step for part in parts.values() for step in part.steps]
    assert len(set(steps)) == len(steps)
    once, head, tail = (parts[name] for name in ("once", "head", "tail"))
    assert set(tail.shared) & set(once.writes) <= set(once.writes)
    assert set(head.writes) == set(tail.carried) & set(head.writes)
    assert set(tail.pulled) & set(head.writes) == set(head.pushed)
    assert not set(head.writes) & set(tail.shared) and not set(once.writes) & set(tail.carried)


class Convolutions(eqx.Module):
    """Two convolutions, one after the other or one beside a way around it."""

    first: eqx.nn.Conv2d
    second: eqx.nn.Conv2d
    residual: bool = eqx.field(static=True)

    def __init__(self, residual, key):
        one, two = jax.random.split(key)
        self.first = eqx.nn.Conv2d(1, 2, 3, padding=1, key=one)
        self.second = eqx.nn.Conv2d(2, 2, 3, padding=1, key=two)
        self.residual = residual

    def __call__(self, x):
        h = jax.nn.relu(self.first(x))
        return jnp.mean(self.second(h) + (h if self.residual else 0.0), axis=(1, 2))


@pytest.mark.slow
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="what XLA on CPU needs")
def test_what_residual_networks_read_twice_is_kept_in_memory(x64):
    x = jax.random.normal(jax.random.key(1), (2, 1, 4, 4))
    for residual in (False, True):
        model = Convolutions(residual, jax.random.key(0))
        program = str(jax.make_jaxpr(lambda x, model=model: ntt.ntk(model, x))(x))
        assert ("cond[" in program) == residual
        exact = ntt.ntk(model, x, implementation="jacobian")
        assert relative_error(ntt.ntk(model, x), exact) < 1e-13
        norm = lambda model, how: jnp.sum(ntt.ntk(model, x, implementation=how) ** 2)
        slopes = [jax.tree.leaves(eqx.filter_grad(norm)(model, h)) for h in ("factors", "jacobian")]
        for found, expected in zip(*slopes, strict=True):
            assert relative_error(found, expected) < 1e-12
