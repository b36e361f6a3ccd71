"""Values and gradients of the products, through every implementation, against the oracle."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import oracle
from helpers.comparison import relative_error
from helpers.oracle import IMPLEMENTATIONS, KERNELS, TOLERANCE, Sizes
from helpers.tiers import drawn
from hypothesis import HealthCheck, given, settings, strategies as st
from jax.experimental.pallas import tpu as pltpu
from jax.test_util import check_grads

from ntt_eqx import kernels
from ntt_eqx_kernels._mosaic_gpu import InterpretGPUParams
from ntt_eqx_kernels.masked_ntk import composed, dense_gpu, dense_tpu, outputs_gpu

DENSE = (
    Sizes(n=1, m=1, k=1, l=1, i=1, j=1),
    Sizes(n=3, m=1, k=1, l=3, i=17, j=19),
    Sizes(n=20, m=5, k=2, l=3, i=37, j=19),
    Sizes(n=2, m=6, k=3, l=1, i=17, j=37),
)
# Over the edge of a tile: 64 samples, 64 or 128 features, 16 outputs.
DENSE_EDGES = (
    Sizes(n=66, m=2, k=1, l=2, i=19, j=17),
    Sizes(n=20, m=37, k=2, l=2, i=19, j=19),
    Sizes(n=1, m=2, k=17, l=18, i=70, j=257),
    Sizes(n=2, m=3, k=1, l=17, i=129, j=19),
)
POSITIONS = (
    Sizes(n=1, m=1, k=1, l=1, i=1, j=1, s=1),
    Sizes(n=5, m=3, k=2, l=3, i=7, j=19, s=4),
    Sizes(n=3, m=20, k=1, l=2, i=17, j=3, s=1),
)
POSITIONS_EDGES = (
    Sizes(n=20, m=37, k=4, l=4, i=19, j=17, s=3),
    Sizes(n=43, m=2, k=7, l=3, i=20, j=37, s=17),
)


def operation_of(sizes, implementation):
    """The product for factors of these sizes; at many positions there is one in JAX alone."""
    if sizes.s is None:
        return functools.partial(kernels.masked_ntk, implementation=implementation)
    assert implementation == "reference"
    return kernels.masked_tangent_ntk


def each(dense, positions):
    """For a test: each size with each implementation that there is for it."""
    cases = [(sizes, name) for name in IMPLEMENTATIONS for sizes in dense]
    cases += [(sizes, "reference") for sizes in positions]
    return pytest.mark.parametrize(("sizes", "implementation"), cases, ids=str)


def uncancelled(oracle_of, expected, *arguments):
    """How much larger results are where no terms cancel: what errors of bfloat16 are shares of."""
    largest = oracle_of(*(np.abs(np.asarray(x, np.float64)) for x in arguments))
    share = lambda x, y: np.max(x, initial=0) / max(np.max(np.abs(y), initial=0), 1e-300)
    return [max(1.0, share(x, y)) for x, y in zip(largest, expected, strict=True)]


def check_values(sizes, implementation, precision, mask, dtype=jnp.float32, seed=0, cancels=False):
    args = oracle.factors(sizes, seed=seed, dtype=dtype)
    call = functools.partial(operation_of(sizes, implementation), precision=precision)
    with kernels.record_choices() as choices:
        theta = jax.jit(call)(*args, mask)
    if sizes.s is None:
        assert [choice.implementation for choice in choices] == [implementation]
    assert theta.dtype == jnp.float32
    bound = TOLERANCE[precision or str(jnp.dtype(dtype))]
    expected = oracle.product(*args, mask)
    if cancels:
        bound *= uncancelled(lambda *x: [oracle.product(*x)], [expected], *args, mask)[0]
    assert relative_error(theta, expected) < bound


def check_gradient(
    sizes, implementation, precision, mask, dtype=jnp.float32, seed=0, cancels=False
):
    args = oracle.factors(sizes, seed=seed, dtype=dtype)
    shape = (sizes.n, sizes.m, sizes.k, sizes.l)
    g = jnp.asarray(np.random.default_rng(seed).normal(0.2, 1.0, shape), jnp.float32)
    call = functools.partial(operation_of(sizes, implementation), mask=mask, precision=precision)
    found = jax.jit(lambda *args: jax.vjp(call, *args)[1](g))(*args)
    expected = oracle.gradient(*args, mask, g)
    factors = uncancelled(oracle.gradient, expected, *args, mask, g) if cancels else [1] * 4
    names = ("a1", "d1", "a2", "d2")
    for name, x, y, arg, factor in zip(names, found, expected, args, factors, strict=True):
        assert x.dtype == arg.dtype, name
        assert relative_error(x.astype(jnp.float32), y) < factor * TOLERANCE[precision], name


@each(DENSE, POSITIONS)
def test_values(sizes, implementation):
    check_values(sizes, implementation, "float32", oracle.random_mask(sizes))


@pytest.mark.slow
@each(DENSE_EDGES, POSITIONS_EDGES)
def test_values_over_the_edges_of_tiles(sizes, implementation):
    check_values(sizes, implementation, "float32", oracle.random_mask(sizes))


@each(DENSE[:2], POSITIONS[:2])
def test_gradient(sizes, implementation):
    check_gradient(sizes, implementation, "float32", oracle.random_mask(sizes))


@pytest.mark.slow
@each(DENSE[2:] + DENSE_EDGES, POSITIONS_EDGES)
def test_gradient_over_the_edges_of_tiles(sizes, implementation):
    check_gradient(sizes, implementation, "float32", oracle.random_mask(sizes))


@pytest.mark.parametrize("precision", TOLERANCE)
@each(DENSE[1:2], POSITIONS[1:2])
def test_errors_are_as_documented(sizes, implementation, precision):
    mask = oracle.random_mask(sizes, kind="float")
    check_values(sizes, implementation, precision, mask, seed=3)
    if precision == "bfloat16":  # test_gradient is for float32, the drawn cases for all
        check_gradient(sizes, implementation, precision, mask, seed=4)


@pytest.mark.parametrize("implementation", KERNELS)
def test_lower_precision_is_less_exact(implementation):
    # Guards against a precision argument that does nothing.
    sizes = Sizes(n=4, m=4, i=30, j=40)
    args, mask = oracle.factors(sizes), oracle.random_mask(sizes)
    call = functools.partial(kernels.masked_ntk, *args, mask, implementation=implementation)
    expected = oracle.product(*args, mask)
    error = {p: relative_error(call(precision=p), expected) for p in ("float32", "bfloat16")}
    assert error["float32"] < 1e-6 < 1e-4 < error["bfloat16"]


@each(DENSE[1:2], POSITIONS[1:2])
def test_bfloat16_inputs(sizes, implementation):
    mask = oracle.random_mask(sizes)
    check_values(sizes, implementation, None, mask, jnp.bfloat16)
    check_gradient(sizes, implementation, "bfloat16", mask, jnp.bfloat16)


@each(DENSE[1:2], POSITIONS[1:2])
def test_degenerate_masks(sizes, implementation):
    args = oracle.factors(sizes)
    call = jax.jit(operation_of(sizes, implementation))
    shape = (sizes.i, sizes.j)
    empty_row = jnp.ones(shape, bool).at[1].set(False)
    empty_column = jnp.ones(shape, bool).at[:, 2].set(False)
    one_entry = jnp.zeros(shape, bool).at[-1, -1].set(True)
    for mask in (jnp.ones(shape, bool), empty_row, empty_column, one_entry):
        assert relative_error(call(*args, mask), oracle.product(*args, mask)) < 1e-5
    assert not jnp.any(call(*args, jnp.zeros(shape, bool)))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("empty", ("n", "m", "k", "i", "j"))
def test_no_samples_outputs_or_features(implementation, empty):
    sizes = Sizes(**{empty: 0})
    args, mask = oracle.factors(sizes), oracle.random_mask(sizes)
    theta = kernels.masked_ntk(*args, mask, implementation=implementation)
    assert theta.shape == (sizes.n, sizes.m, sizes.k, sizes.l)
    assert not jnp.any(theta)


def test_no_mask_is_a_mask_of_ones():
    for sizes in (DENSE[2], POSITIONS[1]):
        args = oracle.factors(sizes)
        theta = operation_of(sizes, "reference")(*args)
        assert relative_error(theta, oracle.product(*args, None)) < 1e-5


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("sizes", (Sizes(), Sizes(s=2)), ids=("dense", "positions"))
def test_float64_in_the_reference(sizes):
    args, mask = oracle.factors(sizes, dtype=jnp.float64), oracle.random_mask(sizes)
    call = functools.partial(operation_of(sizes, "reference"), mask=mask)
    assert call(*args).dtype == jnp.float64
    assert relative_error(call(*args), oracle.product(*args, mask)) < 1e-13
    check_grads(lambda *args: call(*map(jnp.asarray, args)), args, order=1, modes=["rev"])


ODD = st.sampled_from((1, 2, 3, 5, 17))


@st.composite
def cases(draw, implementation):
    most = 20 if implementation == "reference" else 6
    batch = st.sampled_from([size for size in (1, 2, 3, 5, 17, 20) if size <= most])
    outputs = st.sampled_from((1, 2, 3) if most == 6 else (1, 2, 3, 10))
    positions = implementation == "reference" and draw(st.booleans())
    sizes = Sizes(
        n=draw(batch),
        m=draw(batch),
        k=draw(outputs),
        l=draw(outputs),
        i=draw(st.sampled_from((1, 3, 17, 37))),
        j=draw(st.sampled_from((1, 3, 17, 19, 70))),
        s=draw(ODD) if positions else None,
    )
    seed = draw(st.integers(0, 2**16))
    kind = draw(st.sampled_from(("bool", "float")))
    mask = oracle.random_mask(sizes, density=draw(st.floats(0, 1)), seed=seed, kind=kind)
    mask = np.array(mask)
    if draw(st.booleans()):
        mask[draw(st.integers(0, sizes.i - 1))] = 0
    if draw(st.booleans()):
        mask[:, draw(st.integers(0, sizes.j - 1))] = 0
    dtype = draw(st.sampled_from((jnp.float32, jnp.bfloat16)))
    precision = draw(st.sampled_from(tuple(TOLERANCE)))
    return sizes, seed, jnp.asarray(mask), dtype, precision


def any_case(implementation, examples):
    def decorate(test):
        test = given(cases(implementation))(test)
        return settings(
            max_examples=examples,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )(test)

    return decorate


def check_case(implementation, case):
    sizes, seed, mask, dtype, precision = case
    # The kernels' bfloat16, and theirs alone, rounds by more than 1e-2 of what a few terms leave
    # when they cancel.
    cancels = lambda precision: implementation != "reference" and precision == "bfloat16"
    check_values(sizes, implementation, precision, mask, dtype, seed, cancels(precision))
    # Gradients of bfloat16 factors are rounded to bfloat16.
    precision = "bfloat16" if dtype == jnp.bfloat16 else precision
    check_gradient(sizes, implementation, precision, mask, dtype, seed, cancels(precision))


@any_case("reference", 12)
def test_any_case_in_the_reference(case):
    check_case("reference", case)


@pytest.mark.parametrize("implementation", KERNELS)
@any_case(KERNELS[0], 2)
def test_any_case_in_the_kernels(implementation, case):
    check_case(implementation, case)


@pytest.mark.slow
@any_case("reference", drawn(50))
def test_many_cases_in_the_reference(case):
    check_case("reference", case)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", KERNELS)
@any_case(KERNELS[0], drawn(8))
def test_many_cases_in_the_kernels(implementation, case):
    check_case(implementation, case)


def simulated(module, config):
    return dict(precision="float32", config=config, interpret=pltpu.InterpretParams())


@pytest.mark.parametrize(
    "sizes",
    (
        Sizes(n=20, m=5, k=9, l=3, i=37, j=19),
        pytest.param(Sizes(n=3, m=2, k=9, l=17, i=130, j=129), marks=pytest.mark.slow),
    ),
)
def test_tpu_kernel_in_the_simulator_of_tpu_memory(sizes):
    args, mask = oracle.factors(sizes), oracle.random_mask(sizes)
    shape = (sizes.n, sizes.m, sizes.k, sizes.l, sizes.i, sizes.j)
    config = dense_tpu.config_for("", shape)
    config = dense_tpu.Config(k=min(config.k, 8), l=min(config.l, 8), i=128, j=128)
    options = simulated(dense_tpu, config)
    theta = jax.jit(functools.partial(dense_tpu.forward, **options))(*args, mask)
    assert relative_error(theta, oracle.product(*args, mask)) < 1e-5
    g = jnp.asarray(np.random.default_rng(2).normal(size=theta.shape), jnp.float32)
    a1_bar, d1_bar = jax.jit(functools.partial(dense_tpu.backward, **options))(*args, mask, g)
    expected = oracle.gradient(*args, mask, g)
    assert relative_error(a1_bar, expected[0]) < 1e-5
    assert relative_error(d1_bar, expected[1]) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("blocks", (1, 2, 100))
def test_gpu_sums_over_samples_in_parts(blocks, monkeypatch):
    # One block over all samples m; several, of which the last has fewer; one for each sample.
    interpret = None if "pallas_gpu" in KERNELS else InterpretGPUParams(detect_races=True)
    sizes = Sizes(n=3, m=5, k=2, l=2, i=70, j=20)
    (a1, d1, a2, d2), mask = oracle.factors(sizes), oracle.random_mask(sizes)
    rng = np.random.default_rng(2)
    g = jnp.asarray(rng.normal(size=(3, 5, 2, 2)), jnp.float32)
    u_bar = jnp.asarray(rng.normal(size=(3, 5, 70)), jnp.float32)
    options = dict(precision="float32", interpret=interpret)
    config = dense_gpu.Config(m=2, blocks=blocks)
    a1_bar = dense_gpu.pulled(u_bar, a2, mask, config=config, **options)
    assert relative_error(a1_bar, np.einsum("nmi,mj,ij->nj", u_bar, a2, mask)) < 1e-5
    monkeypatch.setattr(outputs_gpu, "BLOCKS", blocks)
    u = dense_gpu.u(a1, a2, mask, config=config, **options)
    d1_bar, d2_bar, found = outputs_gpu.cotangents(g, u, d1, d2, sides=(True, True), **options)
    expected = oracle.gradient(a1, d1, a2, d2, mask, g)
    assert relative_error(d1_bar, expected[1]) < 1e-5
    assert relative_error(d2_bar, expected[3]) < 1e-5
    assert relative_error(found, np.einsum("nmkl,nki,mli->nmi", g, d1, d2)) < 1e-5


@pytest.mark.parametrize("fits", (True, False))
def test_the_gradient_keeps_u_where_there_is_memory(fits, monkeypatch):
    sizes = Sizes(n=3, m=2, k=2, l=2, i=5, j=7)
    args, mask = oracle.factors(sizes), oracle.random_mask(sizes)
    monkeypatch.setattr(composed, "block_bytes", lambda: 4 * 3 * 2 * 5 - (not fits))
    name = "pallas_gpu" if "pallas_gpu" in KERNELS else "pallas_gpu_interpret"
    call = functools.partial(kernels.masked_ntk, implementation=name)
    gradient = jax.grad(lambda *args: jnp.sum(call(*args, mask) ** 2), argnums=(0, 1, 2, 3))
    names = re.findall(r"name=(masked_ntk_u)\b", str(jax.make_jaxpr(gradient)(*args)))
    assert len(names) == (1 if fits else 2)
