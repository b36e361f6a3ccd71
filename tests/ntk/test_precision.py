"""One precision for a whole kernel: the passes through the model and the products of factors."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import interpreter
from helpers.comparison import random_mask, relative_error, weighted_sum
from helpers.tiers import slow
from jax.lax import Precision

import ntt_eqx as ntt

# What JAX calls them, the bits that a GPU or a TPU leaves of a number, and the errors documented.
NAMES = {
    "float32": (Precision.HIGHEST, 23, 1e-6),
    "tf32": (Precision.HIGH, 10, 1e-3),
    "bfloat16": (Precision.DEFAULT, 7, 1e-2),
}
BITS = {name: bits for name, bits, _ in NAMES.values()}


class Recurrent(eqx.Module):
    """A cell over the rows of its input, and a head."""

    cell: eqx.nn.GRUCell
    head: eqx.nn.Linear

    def __call__(self, x):
        last, _ = jax.lax.scan(lambda h, row: (self.cell(row, h), None), jnp.zeros(6), x)
        return self.head(last)


def make(kind):
    """A sparse model, and samples for it."""
    keys = jax.random.split(jax.random.key(3), 4)
    if kind == "dense":
        shape, model = (20,), eqx.nn.MLP(20, 3, 16, 2, key=keys[0])
    elif kind == "convolution":
        layers = [
            eqx.nn.Conv2d(2, 4, 3, key=keys[0]),
            eqx.nn.Lambda(jax.nn.tanh),
            eqx.nn.Lambda(jnp.ravel),
            eqx.nn.Linear(64, 3, key=keys[1]),
        ]
        shape, model = (2, 6, 6), eqx.nn.Sequential(layers)
    else:
        cell, head = eqx.nn.GRUCell(4, 6, key=keys[0]), eqx.nn.Linear(6, 3, key=keys[1])
        shape, model = (5, 4), Recurrent(cell, head)
    sparse = ntt.sparsify(model)
    x = jax.random.normal(keys[2], (6, *shape))
    return sparse.with_mask(random_mask(sparse.mask, 0.3)), x


def value_and_gradient(model, x, **options):
    """Of a weighted sum of the kernel's entries, as a function of the parameters."""
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def total(params):
        theta = ntt.ntk(eqx.combine(params, static), x[:3], x[3:], **options)
        return weighted_sum(theta), theta

    return jax.value_and_grad(total, has_aux=True), params


def products(jaxpr):
    """All matrix products and convolutions of a jaxpr, whatever calls them."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            yield eqn
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda p: hasattr(p, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from products(inner)


@pytest.mark.parametrize("precision", NAMES)
@pytest.mark.parametrize("kind", ("dense", "convolution", slow("loop")))
@pytest.mark.parametrize(
    "options",
    (
        {"kernel": "active"},
        {"kernel": "ambient"},
        {"outputs": "diagonal"},
        {"implementation": "jacobian"},
    ),
    ids=lambda options: next(iter(options.values())),
)
def test_every_product_has_the_precision_asked_for(kind, precision, options):
    model, x = make(kind)
    function, params = value_and_gradient(model, x, precision=precision, **options)
    with jax.default_matmul_precision("tensorfloat32"):  # of what is around the kernel
        closed = jax.make_jaxpr(function)(params)
    found = [eqn.params["precision"] for eqn in products(closed.jaxpr)]
    assert len(found) > 6
    assert set(found) == {(NAMES[precision][0],) * 2}


def rounded(eqn, a, b):
    """The product as a GPU or a TPU takes it: of operands cut to so many bits, summed exactly."""
    # Those of bfloat16 are 8 with the first, of tf32 11.
    bits = BITS[(eqn.params["precision"] or (Precision.DEFAULT,))[0]]
    cut = lambda x: np.asarray(jax.lax.reduce_precision(jnp.asarray(x), 8, bits))
    return interpreter.dot_general(eqn, cut(a), cut(b))


@pytest.mark.parametrize("precision", NAMES)
@pytest.mark.parametrize("kind", ("dense", "convolution", slow("loop")))
def test_errors_are_those_documented(kind, precision, monkeypatch):
    model, x = make(kind)
    with jax.enable_x64(True):
        wide = lambda tree: jax.tree.map(
            lambda a: a.astype(jnp.float64) if eqx.is_inexact_array(a) else a, tree
        )
        function, params = value_and_gradient(wide(model), wide(x), implementation="jacobian")
        expected = function(params)
    function, params = value_and_gradient(model, x, precision=precision)
    monkeypatch.setitem(interpreter.WITH_SETTINGS, "dot_general", rounded)
    (_, theta), gradient = interpreter.interpreted(function)(params)
    limit = NAMES[precision][2]
    for found, right in ((theta, expected[0][1]), (gradient, expected[1])):
        assert relative_error(found, right) < limit
    if precision != "float32":  # the rounding is there
        assert relative_error(theta, expected[0][1]) > limit / 30


@pytest.mark.parametrize("precision", NAMES)
def test_a_transfer_has_one_precision(precision, getkey):
    teacher = eqx.nn.MLP(20, 3, 16, 2, key=getkey())
    config = ntt.NTTConfig(density=0.2, precision=precision)
    state = ntt.ntt_init(teacher, config, optax.sgd(0.1))
    arrays, static = eqx.partition(state, eqx.is_array)
    step = lambda arrays, x: eqx.filter(ntt.ntt_step(eqx.combine(arrays, static), x), eqx.is_array)
    closed = jax.make_jaxpr(step)(arrays, jnp.ones((8, 20)))
    found = {eqn.params["precision"] for eqn in products(closed.jaxpr)}
    assert found == {(NAMES[precision][0],) * 2}
