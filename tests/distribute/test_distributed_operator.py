"""Products of the operator over eight devices are those of one."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.devices import close, mesh_of, model_and_samples
from helpers.tiers import slow
from jax.sharding import AxisType

import ntt_eqx as ntt

pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.parametrize("name, n, m", [("mlp", 13, 7), slow("mlp", 16, 1), slow("cnn", 9, 16)])
def test_uneven_batches(name, n, m):
    model, x1, x2 = model_and_samples(name, n, m, density=0.3)

    def products():
        operator = ntt.ntk_operator(model, x1, x2, batch_size=2)
        v = np.random.default_rng(0).normal(size=(*operator.in_structure().shape, 2))
        return (
            operator.mv(v),
            ntt.ntk_operator(model, x2).mv(v),
            ntt.ntk_operator(model, x2).diagonal(),
        )

    one = products()
    with ntt.distribute():
        many = products()
    jax.tree.map(close, many, one)


@pytest.mark.slow
def test_gradient():
    model, x = model_and_samples("mlp", 9, density=0.3)
    params, rest = eqx.partition(model, eqx.is_inexact_array)
    v = np.random.default_rng(0).normal(size=(9, 4))

    def loss(params):
        operator = ntt.ntk_operator(eqx.combine(params, rest), x)
        return jnp.sum(jnp.sin(operator.mv(v)))

    one = jax.grad(loss)(params)
    with ntt.distribute():
        many = jax.grad(loss)(params)
    jax.tree.map(close, many, one)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_mesh_in_use(kind):
    model, x = model_and_samples("mlp", 10, density=0.3)
    operator = ntt.ntk_operator(model, x)
    v = jnp.asarray(np.random.default_rng(0).normal(size=operator.in_structure().shape))
    one, top = operator.mv(v), ntt.top_eigenpairs(operator, 3)
    mesh = mesh_of((4, 2), ("a", "b"), kind)
    with jax.set_mesh(mesh), ntt.distribute(mesh):
        operator = ntt.ntk_operator(model, x)
        close(operator.mv(v), one)
        close(eqx.filter_jit(lambda operator, v: operator.mv(v))(operator, v), one)
        close(ntt.top_eigenpairs(operator, 3).values, top.values)
