"""Products of the operator over eight devices are those of one, over four those of the kernel."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.comparison import every_array, random_mask
from helpers.devices import close, mesh_of, model_and_samples
from helpers.operators import worst_error
from helpers.programs import build, programs
from helpers.tiers import drawn, slow
from hypothesis import HealthCheck, given, settings, strategies as st
from jax.sharding import AxisType

import ntt_eqx as ntt

EXACT = 1e-9

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


quiet = settings(
    derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)
sizes = st.tuples(st.sampled_from((3, 1, 9)), st.sampled_from((2, 5, 8)))


def check_program(program, sizes, seed):
    """A drawn program over four devices, beside the kernel from Jacobians on one."""
    rng = np.random.default_rng(seed)
    sparse = ntt.sparsify(build(program, seed), every_array)
    sparse = sparse.with_mask(random_mask(sparse.mask, 0.5, seed))
    x1, x2 = (program.sample.batch(n, rng, program.dtype) for n in sizes)
    mesh = mesh_of((4,), ("a",)) if seed % 2 else mesh_of((2, 2), ("a", "b"))

    def on_four(function):
        def call(*arguments):
            with ntt.distribute(mesh):
                return jax.jit(function)(*arguments)

        return call

    assert worst_error(sparse, x1, x2, seed, evaluator=on_four) < EXACT


@settings(quiet, max_examples=1)
@given(program=programs(most=3), sizes=sizes, seed=st.integers(0, 99))
def test_any_program(program, sizes, seed):
    check_program(program, sizes, seed)


@pytest.mark.slow
@settings(quiet, max_examples=drawn(6))
@given(program=programs(), sizes=sizes, seed=st.integers(0, 99))
def test_many_programs(program, sizes, seed):
    check_program(program, sizes, seed)
