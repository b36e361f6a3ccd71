"""`jit`, `vmap`, `grad`, `shard_map` and donation, through every implementation."""

import functools

import jax
import jax.numpy as jnp
import pytest
from helpers import oracle
from helpers.comparison import relative_error
from helpers.oracle import IMPLEMENTATIONS, Sizes
from jax.sharding import PartitionSpec as P  # noqa: N817

from ntt_eqx import kernels

DENSE, POSITIONS = Sizes(n=3, m=2, i=5, j=4), Sizes(n=2, m=3, k=1, i=3, j=5, s=2)


def call_of(sizes, implementation):
    if sizes.s is None:
        return functools.partial(kernels.masked_ntk, implementation=implementation)
    assert implementation == "reference"
    return kernels.masked_tangent_ntk


def squared(call, mask):
    return lambda *args: jnp.sum(call(*args, mask) ** 2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_jit_compiles_once_for_any_mask(implementation):
    traces = []

    @jax.jit
    def call(*args):
        traces.append(None)
        return kernels.masked_ntk(*args, implementation=implementation)

    for seed in range(2):
        args = oracle.factors(DENSE, seed=seed)
        for density in (0.1, 0.9):
            mask = oracle.random_mask(DENSE, density=density, seed=seed)
            assert relative_error(call(*args, mask), oracle.product(*args, mask)) < 1e-5
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("sizes", "implementation"),
    [
        *((DENSE, name) for name in IMPLEMENTATIONS[:1]),
        *(pytest.param(DENSE, name, marks=pytest.mark.slow) for name in IMPLEMENTATIONS[1:]),
        (POSITIONS, "reference"),
    ],
    ids=str,
)
def test_vmap_of_products_and_gradients(sizes, implementation):
    # Over the first side and the mask; the second side is shared.
    batch = 2
    stacks = [oracle.factors(sizes, seed=seed) for seed in range(batch)]
    a1, d1 = (jnp.stack([stack[index] for stack in stacks]) for index in (0, 1))
    _, _, a2, d2 = stacks[0]
    masks = jnp.stack([oracle.random_mask(sizes, seed=seed) for seed in range(batch)])
    call = call_of(sizes, implementation)

    def gradient(a1, d1, mask):
        g = jax.grad(squared(call, mask), argnums=(0, 3))(a1, d1, a2, d2)
        return call(a1, d1, a2, d2, mask), *g

    found = jax.jit(jax.vmap(gradient))(a1, d1, masks)
    for index in range(batch):
        args, mask = (a1[index], d1[index], a2, d2), masks[index]
        theta = oracle.product(*args, mask)
        expected = oracle.gradient(*args, mask, 2 * theta)
        for x, y in zip(found, (theta, expected[0], expected[3]), strict=True):
            assert relative_error(x[index], y) < 1e-5


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradient_of_one_side_alone(implementation):
    args, mask = oracle.factors(DENSE), oracle.random_mask(DENSE)
    call = call_of(DENSE, implementation)
    expected = oracle.gradient(*args, mask, 2 * oracle.product(*args, mask))
    found = jax.jit(jax.grad(squared(call, mask), argnums=2))(*args)
    assert relative_error(found, expected[2]) < 1e-5


def test_one_side_costs_half_the_gradient():
    # The side that nothing depends on is not computed: one kernel launch less for each factor.
    factors = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in DENSE.shapes]
    mask = oracle.random_mask(DENSE)
    call = call_of(DENSE, "pallas_tpu_interpret")

    def launches(argnums):
        gradient = jax.grad(squared(call, mask), argnums=argnums)
        return str(jax.make_jaxpr(gradient)(*factors)).count("pallas_call[")

    assert launches((0, 1)) == launches(0) == 3
    assert launches((0, 1, 2, 3)) == 5


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_mask_is_a_constant(implementation):
    args, metric = oracle.factors(DENSE), oracle.random_mask(DENSE, kind="float")
    call = call_of(DENSE, implementation)
    of_metric = lambda metric: jnp.sum(call(*args, metric))
    with pytest.raises(NotImplementedError, match="the mask is a constant"):
        jax.grad(of_metric)(metric)
    stopped = jax.grad(lambda metric: of_metric(jax.lax.stop_gradient(metric)))(metric)
    assert not jnp.any(stopped)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_donated_inputs(implementation):
    args, mask = oracle.factors(DENSE), oracle.random_mask(DENSE)
    expected = oracle.gradient(*args, mask, 2 * oracle.product(*args, mask))
    gradient = jax.grad(squared(call_of(DENSE, implementation), mask), argnums=(0, 1))
    found = jax.jit(gradient, donate_argnums=(0, 1))(*args)
    assert args[0].is_deleted() and args[1].is_deleted()
    for x, y in zip(found, expected[:2], strict=True):
        assert relative_error(x, y) < 1e-5


def sharded(call, mesh, check_vma):
    """The first side's samples over the mesh, the second side and the mask on every device."""
    specs = (P("batch"), P("batch"), P(), P(), P())
    return jax.shard_map(call, mesh=mesh, in_specs=specs, out_specs=P("batch"), check_vma=check_vma)


def check_sharded(devices, *, implementations=IMPLEMENTATIONS):
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((devices,), ("batch",), axis_types=auto)
    for sizes in (Sizes(n=4, i=5, j=3), Sizes(n=4, i=5, j=3, s=2)):
        args, mask = oracle.factors(sizes), oracle.random_mask(sizes)
        theta = oracle.product(*args, mask)
        expected = oracle.gradient(*args, mask, 2 * theta)
        for implementation in implementations if sizes.s is None else ("reference",):
            # JAX's interpreters of kernels do not track the axes that values vary over; GPU
            # interpret mode runs on one device.
            if devices > 1 and implementation == "pallas_gpu_interpret":
                continue
            check_vma = implementation == "reference"
            call = sharded(call_of(sizes, implementation), mesh, check_vma)
            assert relative_error(jax.jit(call)(*args, mask), theta) < 1e-5
            gradient = jax.grad(squared(call, mask), argnums=(0, 1, 2, 3))
            for x, y in zip(jax.jit(gradient)(*args), expected, strict=True):
                assert relative_error(x, y) < 1e-5


def test_shard_map_of_the_reference():
    check_sharded(1, implementations=("reference",))


@pytest.mark.slow
def test_shard_map():
    check_sharded(1)


@pytest.mark.slow
def test_shard_map_over_two_devices():
    check_sharded(2)
