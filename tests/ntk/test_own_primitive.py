"""A primitive of the user's own, linear in a weight, gets its rule and with it the fast path."""

from typing import ClassVar

import equinox as eqx
import jax
import jax.extend.core as jex_core
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.comparison import random_mask, relative_error
from helpers.refusals import refusals
from jax.interpreters import ad, batching, mlir

import ntt_eqx as ntt
from ntt_eqx._ntk import _linear

product_p = jex_core.Primitive("outside_product")  # (weight [I, J], a [J]) -> [I]


@product_p.def_impl
def _product(w, a):
    return w @ a


product_p.def_abstract_eval(lambda w, a: jax.core.ShapedArray(w.shape[:1], w.dtype))
mlir.register_lowering(product_p, mlir.lower_fun(_product, multiple_results=False))


def _jvp(primals, tangents):
    (w, a), (dw, da) = primals, [ad.instantiate_zeros(t) for t in tangents]
    return product_p.bind(w, a), dw @ a + w @ da


def _batch(args, axes):
    return jax.vmap(_product, axes)(*args), 0


ad.primitive_jvps[product_p] = _jvp
batching.primitive_batchers[product_p] = _batch


class OutsideProduct(ntt.AbstractLinearUse):
    kind: ClassVar[str] = "outside"
    operands: tuple[int, ...]
    groups: int
    features: int
    inputs: int
    positions: int

    def weight(self, w):
        return w[None]

    def activations(self, a):
        return a[None, :, None]

    def cotangents(self, d):
        return d[None, :, None]


def rule(eqn, weight):
    if weight != 0:
        return None
    features, inputs = eqn.invars[0].aval.shape
    return OutsideProduct(operands=(1,), groups=1, features=features, inputs=inputs, positions=1)


class Model(eqx.Module):
    weight: jax.Array

    def __call__(self, x):
        return jnp.tanh(product_p.bind(self.weight, jnp.sin(x)))


@pytest.fixture
def counting():
    """A rule that counts how often it is asked; none is registered before or after."""
    before = _linear._RULES.get_global()
    asked = []
    yield asked, lambda eqn, weight: asked.append(weight) or rule(eqn, weight)
    _linear._RULES.set_global(before)


def given():
    model = Model(jax.random.normal(jax.random.key(0), (3, 5)))
    return model, jax.random.normal(jax.random.key(1), (4, 5))


def test_a_rule_of_the_users_own(counting):
    asked, rule = counting
    model, x = given()
    expected = ntt.ntk(model, x, implementation="jacobian")
    assert [p.path for p in ntt.explain(model, x).parameters] == ["jacobian"]
    assert relative_error(ntt.ntk(model, x), expected) < 1e-6
    ntt.register_linear_use("outside_product", rule)
    assert [p.path for p in ntt.explain(model, x).parameters] == ["factors"]
    asked.clear()
    assert relative_error(ntt.ntk(model, x), expected) < 1e-6  # the very same call as before
    assert asked
    asked.clear()
    ntt.ntk(model, x)
    assert not asked  # compiled, with the rule in its key


def test_a_rule_counts_in_functions_that_were_compiled_before(counting):
    asked, rule = counting
    model, x = given()
    traces = []

    @eqx.filter_jit
    def step(model, x):
        traces.append(1)
        return jax.grad(lambda w: jnp.sum(ntt.ntk(Model(w), x)))(model.weight)

    expected = step(model, x)
    ntt.register_linear_use("outside_product", rule)
    assert relative_error(step(model, x), expected) < 1e-5
    assert asked and len(traces) == 2
    step(model, x)
    assert len(traces) == 2


def test_a_cell_that_runs_again_replaces_its_rule(counting):
    asked, rule = counting
    model, x = given()
    ntt.register_linear_use("outside_product", lambda eqn, weight: 1 / 0)
    ntt.register_linear_use("outside_product", rule)
    ntt.register_linear_use("outside_product", rule)
    assert [p.path for p in ntt.explain(model, x).parameters] == ["factors"]
    names = [known.primitive for known in _linear._RULES.value]
    assert len(set(names)) == len(names)
    ntt.register_linear_use("dot_general", lambda eqn, weight: None)  # one of the library's own
    dense = eqx.nn.Linear(5, 2, key=jax.random.key(0))
    assert {p.path for p in ntt.explain(dense, x).parameters} == {"jacobian"}


routed_p = jex_core.Primitive("routed_product")  # (weight [G, I, J], a [S, J], g [S]) -> [S, I]


@routed_p.def_impl
def _routed(w, a, g):
    return jnp.einsum("sij,sj->si", w[g], a)


routed_p.def_abstract_eval(lambda w, a, g: jax.core.ShapedArray((a.shape[0], w.shape[1]), w.dtype))
mlir.register_lowering(routed_p, mlir.lower_fun(_routed, multiple_results=False))


def _routed_jvp(primals, tangents):
    (w, a, g), (dw, da) = primals, [ad.instantiate_zeros(t) for t in tangents[:2]]
    return routed_p.bind(w, a, g), _routed(dw, a, g) + _routed(w, da, g)


ad.primitive_jvps[routed_p] = _routed_jvp
batching.primitive_batchers[routed_p] = lambda args, axes: (jax.vmap(_routed, axes)(*args), 0)


class RoutedProduct(ntt.AbstractLinearUse):
    """A mixture of experts: which weight a position gets is an operand, too."""

    kind: ClassVar[str] = "routed"
    operands: tuple[int, ...]
    groups: int
    features: int
    inputs: int
    positions: int

    def weight(self, w):
        return w

    def activations(self, a, g):
        mine = jax.nn.one_hot(g, self.groups, dtype=a.dtype)
        return jnp.einsum("sg,sj->gjs", mine, a)

    def cotangents(self, d):
        return jnp.broadcast_to(d.T[None], (self.groups, self.features, self.positions))


def routed_rule(eqn, weight):
    if weight != 0:
        return None
    groups, features, inputs = eqn.invars[0].aval.shape
    sizes = dict(groups=groups, features=features, inputs=inputs)
    return RoutedProduct(operands=(1, 2), **sizes, positions=eqn.invars[1].aval.shape[0])


class Experts(eqx.Module):
    weight: jax.Array

    def __call__(self, x):
        x = x.reshape(4, 5)
        return jnp.tanh(routed_p.bind(self.weight, jnp.sin(x), jnp.argmax(x[:, :3], axis=1)))


@pytest.mark.parametrize("density", [None, 0.3])
def test_a_primitive_with_two_operands(density, counting, x64):
    """Both the samples' activations and the experts that they choose come into the layer."""
    weight = jax.random.normal(jax.random.key(0), (3, 2, 5), jnp.float64)
    x1, x2 = (jax.random.normal(jax.random.key(n), (n, 20), jnp.float64) for n in (4, 3))
    model = Experts(weight)
    if density is not None:
        sparse = ntt.sparsify(model)
        model = sparse.with_mask(random_mask(sparse.mask, density))
    ntt.register_linear_use("routed_product", routed_rule)
    assert {p.path for p in ntt.explain(model, x1).parameters} <= {"tangents", "gathered tangents"}
    for oracle in ("jacobian", "ntk_vector_products"):
        expected = ntt.ntk(model, x1, x2, implementation=oracle)
        assert np.any(expected) and relative_error(ntt.ntk(model, x1, x2), expected) < 1e-12

    def slope(implementation):
        total = lambda m: jnp.sum(jnp.sin(ntt.ntk(m, x1, x2, implementation=implementation)))
        return jax.tree.leaves(eqx.filter_grad(total)(model))

    for ours, theirs in zip(slope("factors"), slope("jacobian"), strict=True):
        assert relative_error(ours, theirs) < 1e-10


class Relative(eqx.Module):
    table: jax.Array
    head: eqx.nn.Linear

    def __call__(self, places):
        return self.head(jnp.tanh(self.table[places[0], places[1]]))


def test_a_table_with_two_places(x64):
    """`dynamic_slice` takes one operand for each axis; places outside are clipped."""
    head = eqx.nn.Linear(5, 2, dtype=jnp.float64, key=jax.random.key(1))
    model = Relative(jax.random.normal(jax.random.key(0), (3, 4, 5), jnp.float64), head)
    x = jnp.array([[0, 0], [1, 2], [-1, 3], [7, 9], [2, -4], [-9, 1]], jnp.int32)
    assert {p.path for p in ntt.explain(model, x).parameters} == {"factors"}
    expected = ntt.ntk(model, x, implementation="jacobian")
    assert relative_error(ntt.ntk(model, x), expected) < 1e-12


test_refusals = refusals(
    {
        "no name": (
            lambda: ntt.register_linear_use(product_p, rule),
            "register_linear_use: primitive must be a name .*got Primitive",
        ),
        "no rule": (
            lambda: ntt.register_linear_use("outside_product", None),
            "register_linear_use: rule must be a function .*got NoneType",
        ),
    }
)
