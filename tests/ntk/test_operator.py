"""The kernel as an operator: its products are those of the formed matrix."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import zoo, zoo_today
from helpers.comparison import every_array, random_mask, relative_error, some_of_every_row
from helpers.operators import product, vectors, worst_error
from helpers.programs import build, programs, tolerance
from helpers.tiers import default_only, drawn
from hypothesis import HealthCheck, Phase, given, settings, strategies as st

import ntt_eqx as ntt

EXACT = 1e-10  # float64
MODELS = {**zoo.ZOO, **zoo_today.ZOO}
QUICK = ("custom", "lora")


@pytest.mark.parametrize("name", default_only(MODELS, *QUICK))
def test_products_are_those_of_the_matrix(name, x64):
    case = MODELS[name]
    sparse = ntt.sparsify(case.build(jax.random.key(1)), every_array)
    mask = random_mask(sparse.mask, 0.6)
    if name == "weight norm":
        mask = some_of_every_row(mask)
    sparse = sparse.with_mask(mask)
    error = worst_error(sparse, case.samples(5, seed=1), case.samples(3, seed=2))
    # gradients of weights in bfloat16 are rounded to it: in each of two batches by half of this
    rounding = float(jnp.finfo(jnp.bfloat16).eps)
    assert error < (rounding if name == "half" else EXACT)


def dense_pair(dtype=None):
    model = eqx.nn.MLP(4, 3, 8, 2, key=jax.random.key(0), dtype=dtype)
    sparse = ntt.sparsify(model)
    sparse = sparse.with_mask(random_mask(sparse.mask, 0.4))
    x = np.random.default_rng(0).normal(size=(7, 4))
    return sparse, jnp.asarray(x, dtype or jnp.float32)


@pytest.mark.parametrize("batch_size", [None, 3, 20])
def test_a_batch_with_itself(batch_size):
    """In float32; it is symmetric, and its own transpose."""
    sparse, x = dense_pair()
    operator = ntt.ntk_operator(sparse, x, batch_size=batch_size)
    assert operator.transpose() is operator
    v = vectors(operator.in_structure())
    assert relative_error(operator.mv(v), product(ntt.ntk(sparse, x), v)) < 1e-5


def test_gradient_jit_and_vmap(x64):
    sparse, x = dense_pair(jnp.float64)
    params, static = eqx.partition(sparse, eqx.is_inexact_array)
    v = vectors(ntt.ntk_operator(sparse, x).in_structure())

    def energy(params, batch_size):
        operator = ntt.ntk_operator(eqx.combine(params, static), x, batch_size=batch_size)
        return jnp.sum(v * operator.mv(v))

    def formed(params):
        theta = ntt.ntk(eqx.combine(params, static), x, implementation="jacobian")
        return jnp.sum(v * product(theta, v))

    expected = jax.grad(formed)(params)
    for size in (None, 3):
        assert relative_error(jax.grad(energy)(params, size), expected) < EXACT
    operator = ntt.ntk_operator(sparse, x, batch_size=3)
    compiled = eqx.filter_jit(lambda operator, v: operator.mv(v))(operator, v)
    np.testing.assert_allclose(compiled, operator.mv(v), rtol=1e-12, atol=1e-12)
    many = jnp.stack([v, 2 * v])
    np.testing.assert_allclose(jax.vmap(operator.mv)(many)[1], 2 * compiled, rtol=1e-12, atol=1e-12)


def test_a_model_with_a_state(x64):
    class Normed(eqx.Module):
        first: eqx.nn.Linear
        norm: eqx.nn.BatchNorm
        last: eqx.nn.Linear

        def __init__(self, key):
            self.first = eqx.nn.Linear(4, 5, key=key, dtype=jnp.float64)
            self.norm = eqx.nn.BatchNorm(5, "batch", mode="ema", dtype=jnp.float64)
            self.last = eqx.nn.Linear(5, 2, key=key, dtype=jnp.float64)

        def __call__(self, x, state):
            h, state = self.norm(self.first(x), state)
            return self.last(jnp.tanh(h)), state

    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)))
    model, state = eqx.nn.make_with_state(Normed)(jax.random.key(0))
    model = ntt.warm_up(ntt.StatefulModel(model, state), x)
    operator = ntt.ntk_operator(model, x, batch_size=4)
    v = vectors(operator.in_structure())
    expected = product(ntt.ntk(model, x, implementation="jacobian"), v)
    assert relative_error(operator.mv(v), expected) < EXACT


def test_a_function_of_a_dict():
    params = {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}
    f = eqx.Partial(lambda p, x: jnp.tanh(x @ p["kernel"] + p["bias"]), params)
    operator = ntt.ntk_operator(f, jnp.ones((2, 4)))
    v = vectors(operator.in_structure())
    assert relative_error(operator.mv(v), product(ntt.ntk(f, jnp.ones((2, 4))), v)) < 1e-5


def test_what_is_refused():
    sparse, x = dense_pair()
    with pytest.raises(ValueError, match="ntk_operator: batch_size"):
        ntt.ntk_operator(sparse, x, batch_size=0)
    with pytest.raises(ValueError, match="ntk_operator: mv takes"):
        ntt.ntk_operator(sparse, x).mv(jnp.ones((7, 2)))


@pytest.mark.filterwarnings("ignore")
def test_lineax_solves(x64):
    lineax = pytest.importorskip("lineax")
    sparse, x = dense_pair(jnp.float64)
    operator = ntt.ntk_operator(sparse, x, batch_size=3)
    wrapped = operator.lineax()
    assert lineax.is_positive_semidefinite(wrapped)
    matrix = operator.as_matrix()
    assert relative_error(wrapped.as_matrix().reshape(matrix.shape), matrix) < EXACT
    other = ntt.ntk_operator(sparse, x, x[:4], batch_size=3).lineax()
    u = vectors(operator.out_structure())
    expected = product(ntt.ntk(sparse, x[:4], x), u)
    assert relative_error(other.T.mv(u), expected) < EXACT


@pytest.mark.parametrize("kernel", ["active", "ambient"])
def test_an_operator_of_some_layers(kernel, x64):
    """Each is the share of its layer, with a metric, too; together they are the whole."""
    sparse, x = dense_pair(jnp.float64)
    rng = np.random.default_rng(3)
    rates = jax.tree.map(
        lambda w: jnp.asarray(rng.uniform(0, 2, w.shape)) if eqx.is_array(w) else None, sparse.model
    )
    how = dict(kernel=kernel, metric=rates)
    shares = ntt.ntk(sparse, x, x[:4], **how, by_layer=True)
    for name, share in shares.items():
        operator = ntt.ntk_operator(sparse, x, x[:4], **how, layers=name, batch_size=3)
        v = vectors(operator.in_structure(), 2)
        assert relative_error(operator.mv(v), product(share, v)) < EXACT
        assert relative_error(operator.as_matrix(), ntt.kernel_matrix(share)) < EXACT
        stream = ntt.streamed_ntk_operator(sparse, [x[:4], x[4:]], [x[:4]], **how, layers=name)
        assert relative_error(stream.mv(v), product(share, v)) < EXACT
    own = ntt.ntk_operator(sparse, x, **how, layers=[".layers[1].weight", ".layers[1].bias"])
    name = ".layers[1].weight + .layers[1].bias"
    diagonal = ntt.ntk(sparse, x, **how, by_layer=True)[name]
    expected = jnp.einsum("nnkk->nk", diagonal)
    assert relative_error(own.diagonal(), expected) < EXACT
    some = ntt.ntk_operator(sparse, x, kernel=kernel, layers=".layers[0].bias")
    bias = eqx.filter(sparse.model, lambda w: w is sparse.model.layers[0].bias)
    only = lambda b: jax.vmap(eqx.tree_at(lambda m: m.layers[0].bias, sparse.to_dense(), b))(x)
    jacobian = jax.jacobian(only)(jax.tree.leaves(bias)[0])
    v = vectors(some.in_structure())
    assert relative_error(some.mv(v), jnp.einsum("nkp,mlp,ml->nk", jacobian, jacobian, v)) < EXACT


def test_layers_that_are_none_are_refused():
    sparse, x = dense_pair()
    with pytest.raises(ValueError, match=r"\['.head'\] are no parameters; there are \['.layers"):
        ntt.ntk_operator(sparse, x, layers=".head")
    with pytest.raises(ValueError, match="layers must be paths of parameters"):
        ntt.ntk_operator(sparse, x, layers=[])


def check_program(program, seed):
    rng = np.random.default_rng(seed)
    sparse = ntt.sparsify(build(program, seed), every_array)
    sparse = sparse.with_mask(random_mask(sparse.mask, 0.5, seed))
    x1, x2 = (program.sample.batch(n, rng, program.dtype) for n in (3, 2))
    error = worst_error(sparse, x1, x2, seed)
    assert error < tolerance(program)


quiet = settings(
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],
)


@settings(quiet, max_examples=2)
@given(program=programs(most=4), seed=st.integers(0, 99))
def test_any_program(program, seed, x64):
    check_program(program, seed)


@pytest.mark.slow
@settings(quiet, max_examples=drawn(10))
@given(program=programs(), seed=st.integers(0, 99))
def test_many_programs(program, seed, x64):
    check_program(program, seed)
