"""A primitive of the user's own, linear in a weight, gets its rule and with it the fast path."""

from typing import ClassVar

import equinox as eqx
import jax
import jax.extend.core as jex_core
import jax.numpy as jnp
import pytest
from helpers.comparison import relative_error
from jax.interpreters import ad, batching, mlir

import ntt_eqx as ntt

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


def test_a_rule_of_the_users_own():
    model = Model(jax.random.normal(jax.random.key(0), (3, 5)))
    x = jax.random.normal(jax.random.key(1), (4, 5))
    expected = ntt.ntk(model, x, implementation="jacobian")
    assert [p.path for p in ntt.explain(model, x).parameters] == ["jacobian"]
    assert relative_error(ntt.ntk(model, x), expected) < 1e-6
    ntt.register_linear_use("outside_product", rule)
    assert [p.path for p in ntt.explain(model, x).parameters] == ["factors"]
    assert relative_error(ntt.ntk(model, x[:3], x[:3]), expected[:3, :3]) < 1e-6
    with pytest.raises(ValueError, match="'outside_product' has a rule already"):
        ntt.register_linear_use("outside_product", rule)
