"""Functions with derivative rules of their own: outputs have the gradient that the model has."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ntt_eqx as ntt
from ntt_eqx._ntk._own_rules import loses_rules

rounded = lambda x: jnp.round(4 * x) / 4


def by_vjp(again):
    @jax.custom_vjp
    def straight(x):
        return rounded(x)

    straight.defvjp(lambda x: ((straight if again else rounded)(x), None), lambda _, g: (g,))
    return straight


def by_jvp(again):
    @jax.custom_jvp
    def straight(x):
        return rounded(x)

    straight.defjvp(lambda p, t: ((straight if again else rounded)(p[0]), t[0]))
    return straight


def in_a_loop(x):
    return jax.lax.scan(lambda h, _: (by_vjp(False)(2 * h), None), x, None, 2)[0]


def in_a_branch(x):
    return jax.lax.cond(x[0] > 9, jnp.sin, by_jvp(False), x)


RULES = {
    "vjp": by_vjp(False),
    "jvp": by_jvp(False),
    "vjp that asks itself": by_vjp(True),
    "jvp that asks itself": by_jvp(True),
    "loop": in_a_loop,
    "branch": in_a_branch,
}


class Quantised(eqx.Module):
    first: eqx.nn.Linear
    second: eqx.nn.Linear
    rule: str = eqx.field(static=True)

    def __init__(self, rule, key):
        one, two = jax.random.split(key)
        self.first = eqx.nn.Linear(4, 6, key=one)
        self.second = eqx.nn.Linear(6, 3, key=two)
        self.rule = rule

    def __call__(self, x):
        return self.second(RULES[self.rule](self.first(x)))


@pytest.mark.parametrize("max_bytes", [None, 1])
@pytest.mark.parametrize("rule", RULES)
def test_outputs_have_the_gradient_of_the_model(rule, max_bytes, getkey, x64):
    model, x = Quantised(rule, getkey()), jax.random.normal(getkey(), (7, 4))

    def by_engine(model):
        _, one, two = ntt.ntk_and_outputs(model, x[:3], x[3:], max_bytes=max_bytes)
        return jnp.sum(jnp.sin(jnp.concatenate([one, two])))

    found = eqx.filter_jit(eqx.filter_value_and_grad(by_engine))(model)
    expected = eqx.filter_value_and_grad(lambda m: jnp.sum(jnp.sin(jax.vmap(m)(x))))(model)
    assert np.any(expected[1].first.weight)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", ["vjp", "jvp"])
def test_a_transfer_moves_what_a_rule_lets_through(rule, getkey):
    teacher, x = Quantised(rule, getkey()), jax.random.normal(getkey(), (8, 4))
    config = ntt.NTTConfig(density=0.5, num_steps=1, kernel_weight=0.0, l2_weight=0.0)
    state = ntt.ntt_init(teacher, config, optax.sgd(0.1))
    after, _ = eqx.filter_jit(ntt.ntt_step)(state, x)
    before, mask = state.student.model.first.weight, state.student.mask.first.weight
    assert np.any(np.asarray(after.student.model.first.weight - before)[np.asarray(mask)])


@pytest.mark.parametrize("again", [True, False])
@pytest.mark.parametrize("kind", [by_vjp, by_jvp])
def test_only_rules_with_code_of_their_own_cost_a_forward_pass(kind, again):
    assert loses_rules(jax.make_jaxpr(kind(again))(jnp.ones(3))) is not again


@pytest.mark.parametrize("name", ["relu", "silu", "gelu", "softplus", "softmax", "logsumexp"])
def test_activations_of_jax_cost_none(name):
    assert not loses_rules(jax.make_jaxpr(getattr(jax.nn, name))(jnp.ones(3)))
