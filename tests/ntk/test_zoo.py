"""Architectures of others: exact kernels and gradients, the paths they take, and 20 steps."""

import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.comparison import (
    every_array,
    random_mask,
    relative_error,
    some_of_every_row,
    weighted_sum,
)
from helpers.interpreter import interpreted
from helpers.tiers import default_only
from helpers.zoo_today import ZOO

import ntt_eqx as ntt

EXACT = 1e-10  # float64
# What takes longest: convolutions and gathers are compiled one by one.
LONG = ("mobilenet, squeeze-excitation", "u-net", "perceiver", "mamba, scan", "mlp-mixer",
        "weight norm", "transformer, rope, tied tokens", "fno, complex", "fno, pairs",
        "mamba, associative scan", "experts, vmapped", "experts, einsum", "lstm",
        "kan, chebyshev", "batch norm")  # fmt: skip

# Of these 20 steps are taken, not of all: a step is compiled, for seconds.
every_model = pytest.mark.parametrize(
    "name", default_only(ZOO, *(name for name in ZOO if name not in LONG))
)


def matrix(path, owner, leaf):
    """For `sparsify`: a mask on every matrix and larger, but not on the ones of a norm, which no
    magnitude ranks."""
    return sum(size > 1 for size in leaf.shape) > 1 and not isinstance(owner, eqx.nn.LayerNorm)


def errors(name):
    """Of the kernel and of its gradient by all parameters, as shares of the largest entry."""
    case = ZOO[name]
    sparse = ntt.sparsify(case.build(jax.random.key(1)), every_array)
    mask = random_mask(sparse.mask, 0.6)
    if name == "weight norm":
        mask = some_of_every_row(mask)
    x1, x2 = case.samples(3, seed=1), case.samples(2, seed=2)
    params, static = eqx.partition(sparse, eqx.is_inexact_array)

    def loss(params, mask, x1, x2, implementation):
        model = eqx.combine(params, static).with_mask(mask)
        theta = ntt.ntk(model, x1, x2, implementation=implementation)
        return weighted_sum(theta), theta

    both = jax.value_and_grad(loss, has_aux=True)

    @interpreted
    def run(*given):
        _, other = loss(*given, "ntk_vector_products")
        return both(*given, None), both(*given, "jacobian"), other

    ((_, theta), slope), ((_, exact), exact_slope), other = run(params, mask, x1, x2)
    kernel = max(relative_error(theta, exact), relative_error(theta, other))
    return kernel, relative_error(slope, exact_slope)


@every_model
def test_kernel_and_gradient(name, x64):
    kernel, gradient = errors(name)
    assert kernel < EXACT and gradient < EXACT


@pytest.mark.parametrize(
    "name",
    [
        "batch norm",
        pytest.param("mobilenet, squeeze-excitation", marks=pytest.mark.slow),
        pytest.param("u-net", marks=pytest.mark.slow),
    ],
)
def test_convolutions_in_the_forms_for_a_gpu(name, x64, on_a_gpu):
    kernel, gradient = errors(name)
    assert kernel < EXACT and gradient < EXACT


@pytest.mark.parametrize("name", ZOO)
def test_what_takes_the_slow_path_is_told(name):
    case = ZOO[name]
    ones = lambda a: jnp.ones(a.shape, a.dtype) if isinstance(a, jax.ShapeDtypeStruct) else a
    model = jax.tree.map(ones, eqx.filter_eval_shape(case.build, jax.random.key(1)))
    explained = ntt.explain(model, case.samples(2))
    assert tuple(p.name for p in explained.slow) == case.jacobian
    assert not any(p.path == "unused" for p in explained.parameters)


@pytest.mark.slow
def test_complex_weights_are_pairs_of_reals(x64):
    x = ZOO["fno, complex"].samples(3)

    def value_and_slope(name):
        params, static = eqx.partition(ZOO[name].build(jax.random.key(1)), eqx.is_inexact_array)

        @interpreted
        def run(params, x):
            def loss(params):
                theta = ntt.ntk(eqx.combine(params, static), x)
                return weighted_sum(theta), theta

            return jax.value_and_grad(loss, has_aux=True)(params)

        (_, theta), slope = run(params, x)
        return theta, slope

    theta, slope = value_and_slope("fno, complex")
    paired, paired_slope = value_and_slope("fno, pairs")
    spectral = slope.spectral  # JAX's convention: the conjugate
    slope = eqx.tree_at(lambda s: s.spectral, slope, (spectral.real, -spectral.imag))
    assert relative_error(theta, paired) < EXACT
    assert relative_error(slope, paired_slope) < EXACT


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_twenty_steps(name):
    case, traced, losses, begun = ZOO[name], [], [], 0.0
    config = ntt.NTTConfig(density=case.density, mask_every=5, num_steps=30)
    model = case.build(jax.random.key(1))
    state = ntt.ntt_init(model, config, optax.adam(1e-2), where=matrix)
    kept = lambda state: [int(np.sum(m)) for m in jax.tree.leaves(state.student.mask)]
    expected = [round(case.density * m.size) for m in jax.tree.leaves(state.student.mask)]

    arrays, rest = eqx.partition(state, eqx.is_array)

    @jax.jit
    def step(arrays, x):
        traced.append(name)
        state, metrics = ntt.ntt_step(eqx.combine(arrays, rest), x)
        return eqx.filter(state, eqx.is_array), metrics.loss

    for n in range(20):
        begun = time.perf_counter() if n == 1 else begun
        arrays, loss = step(arrays, case.samples(4, seed=n))
        losses.append(loss)
        assert kept(arrays) == expected
    print(f"{name}: {(time.perf_counter() - begun) / 19 * 1e3:.1f} ms a step")
    assert len(traced) == 1 and np.isfinite(losses).all()
    finite = lambda a: bool(np.isfinite(a).all())
    assert all(map(finite, jax.tree.leaves(eqx.filter(arrays.student, eqx.is_inexact_array))))
