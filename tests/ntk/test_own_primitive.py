"""A primitive of the user's own, linear in a weight, gets its rule and with it the fast path."""

from typing import ClassVar

import equinox as eqx
import jax
import jax.extend.core as jex_core
import jax.numpy as jnp
import pytest
from helpers.comparison import relative_error
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
    operand: int
    groups: int
    features: int
    inputs: int
    positions: int

    def weight(self, w):
        return w[None]

    def activations(self, operand):
        return operand[None, :, None]

    def cotangents(self, d):
        return d[None, :, None]


def rule(eqn, weight):
    if weight != 0:
        return None
    features, inputs = eqn.invars[0].aval.shape
    return OutsideProduct(operand=1, groups=1, features=features, inputs=inputs, positions=1)


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
