"""The memory of a kernel is what was allowed, by the compiler's count; blocks cost no compiling."""

import os
import subprocess
import sys
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.comparison import random_mask, relative_error
from helpers.tiers import slow

import ntt_eqx as ntt
from ntt_eqx._ntk import _operator, _pairs
from ntt_eqx._ntk._kernel import kernel_and_outputs, known_index
from ntt_eqx._ntk._spec import kernel_spec
from ntt_eqx.kernels import Device

MiB = 2**20


def compiled(model, shape, n, m, outputs, budget):
    """The compiled kernel of batches of these sizes; runs nothing."""
    spec = kernel_spec("active", outputs, max_bytes=budget)
    index = known_index(spec, model)
    arrays, static = eqx.partition((model, index), eqx.is_array)

    def run(arrays, x1, x2):
        model, index = eqx.combine(arrays, static)
        return kernel_and_outputs(spec, model, x1, x2, index=index)[0]

    x1 = jax.ShapeDtypeStruct((n, *shape), jnp.float32)
    x2 = None if m is None else jax.ShapeDtypeStruct((m, *shape), jnp.float32)
    return jax.jit(run).lower(arrays, x1, x2).compile()


def masked(density, width=96):
    model = eqx.nn.MLP(48, 6, width, 2, key=jax.random.key(0))
    if density is None:
        return model
    sparse = ntt.sparsify(model)
    return sparse.with_mask(random_mask(sparse.mask, density))


@pytest.mark.parametrize("density", [0.03, 0.5, None])
@pytest.mark.parametrize(
    ("n", "m", "outputs", "budget"),
    [
        (64, None, "full", 2 * MiB),
        (300, 129, "full", 8 * MiB),
        (512, None, "trace", 16 * MiB),
        (2048, 515, "diagonal", 32 * MiB),
    ],
)
def test_memory_is_what_was_allowed(density, n, m, outputs, budget):
    analysis = compiled(masked(density), (48,), n, m, outputs, budget).memory_analysis()
    assert 0 < analysis.temp_size_in_bytes <= 1.25 * budget


class Convolution(eqx.Module):
    conv: eqx.nn.Conv2d
    head: eqx.nn.Linear

    def __init__(self):
        a, b = jax.random.split(jax.random.key(0))
        self.conv = eqx.nn.Conv2d(3, 16, 5, key=a)
        self.head = eqx.nn.Linear(16 * 16, 6, key=b)

    def __call__(self, x):
        return self.head(eqx.nn.AvgPool2d(2, 2)(jnp.tanh(self.conv(x))).reshape(-1))


@pytest.mark.parametrize(("outputs", "budget"), [("full", 4 * MiB), ("trace", 16 * MiB)])
def test_memory_of_tangents(outputs, budget):
    """Tangents of all samples do not fit, and are made for each block."""
    analysis = compiled(Convolution(), (3, 12, 12), 300, None, outputs, budget).memory_analysis()
    assert 0 < analysis.temp_size_in_bytes <= 1.25 * budget


def test_more_blocks_take_no_longer_to_compile():
    """1,225 blocks as 3, and the program is as long."""
    model = masked(None, width=16)
    sizes, seconds = [], []
    for budget in (2**19, 2**14):
        start = time.perf_counter()
        text = compiled(model, (48,), 256, None, "trace", budget).as_text()
        seconds.append(time.perf_counter() - start)
        sizes.append(len(text))
    assert max(sizes) < 2.5 * min(sizes), sizes


@pytest.mark.parametrize("outputs", ["full", slow("diagonal"), slow("trace")])
@pytest.mark.parametrize("m", [slow(None), 11])
def test_blocks_of_every_size_give_the_same_kernel(outputs, m):
    """Factors kept or made for each block, blocks that overlap at the end, values and gradient."""
    model = eqx.nn.MLP(5, 3, 4, 1, activation=jnp.tanh, key=jax.random.key(0))
    x1 = jax.random.normal(jax.random.key(1), (9, 5))
    x2 = None if m is None else jax.random.normal(jax.random.key(2), (m, 5))

    def of(budget):
        loss = lambda model: jnp.sum(
            jnp.sin(ntt.ntk(model, x1, x2, outputs=outputs, max_bytes=budget))
        )
        value, gradient = eqx.filter_value_and_grad(loss)(model)
        return ntt.ntk(model, x1, x2, outputs=outputs, max_bytes=budget), value, gradient

    expected = of(2**26)
    for budget in (1, 1500, 6000, 40000):
        found = of(budget)
        assert relative_error(found[0], expected[0]) < 1e-6
        assert relative_error(found[1], expected[1]) < 1e-5


def test_which_blocks():
    from ntt_eqx._ntk.forms import Cost

    cost = [Cost(0, 0, 0, 100, 100, 40, 0)]
    plan = lambda budget, **options: _pairs.plan_blocks(
        cost, 100, 4, (100, 60), budget, **{"symmetric": False} | options
    )
    whole = plan(10**7)
    assert (whole.rows, whole.columns, whole.counts, whole.keeps) == (100, 60, (1, 1), True)
    some = plan(60_000)
    assert some.keeps and some.bytes <= 60_000 and max(some.counts) > 1
    few = plan(5000)
    assert not few.keeps and few.bytes <= 5000
    least = plan(1)
    assert (least.rows, least.columns, least.counts) == (1, 1, (100, 60))
    assert plan(5000, keeps=True).keeps


def test_the_budget_is_a_share_of_the_memory_even_where_nobody_knows_it(monkeypatch):
    cpu, gpu = Device("cpu", "cpu"), Device("gpu", "some other")
    for absent, gibibytes in (("NVIDIA H100 80GB HBM3", 80), ("TPU v5", 95), ("TPU v5 lite", 16)):
        assert _pairs.default_budget(Device("gpu", absent)) == gibibytes * 2**30 // 4
    assert 0 < _pairs.default_budget(cpu) <= 2**28

    def refuse(name):
        raise OSError(name)

    monkeypatch.setattr(_pairs.os, "sysconf", refuse)
    assert _pairs.default_budget(cpu) == 2**28

    class Accelerator:
        device_kind = gpu.kind
        memory_stats = staticmethod(lambda: {"bytes_limit": 80 * 2**30})

    monkeypatch.setattr(_pairs.jax, "local_devices", lambda: [Accelerator])
    assert _pairs.default_budget(gpu) == 20 * 2**30
    monkeypatch.setattr(Accelerator, "memory_stats", staticmethod(lambda: None))
    assert _pairs.default_budget(gpu) == 2 * 2**30


@pytest.mark.parametrize("outputs", ["full", "diagonal", "trace"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_tiles_on_the_host(outputs, symmetric):
    model = eqx.nn.MLP(5, 3, 4, 1, key=jax.random.key(0))
    x1 = np.asarray(jax.random.normal(jax.random.key(1), (7, 5)))
    x2 = None if symmetric else np.asarray(jax.random.normal(jax.random.key(2), (5, 5)))
    expected = np.asarray(ntt.ntk(model, jnp.asarray(x1), None if symmetric else jnp.asarray(x2)))
    if outputs != "full":
        expected = np.einsum("nmkk->nmk", expected)
    if outputs == "trace":
        expected = expected.mean(-1)
    found, times = np.full(expected.shape, np.nan), np.zeros(expected.shape[:2])
    for rows, columns, tile in ntt.ntk_tiles(model, x1, x2, tile=(3, 2), outputs=outputs):
        assert isinstance(tile, np.ndarray)
        found[rows, columns] = tile
        times[rows, columns] += 1
    assert (times == 1).all()
    assert relative_error(found, expected) < 1e-6


def test_tiles_that_cannot_be():
    model, x = eqx.nn.Linear(2, 2, key=jax.random.key(0)), np.ones((2, 2), np.float32)
    with pytest.raises(ValueError, match="ntk_tiles: tile must be two positive integers"):
        ntt.ntk_tiles(model, x, tile=(0, 2))
    with pytest.raises(ValueError, match="ntk_tiles: with directions"):
        ntt.ntk_tiles(model, x, directions=(jnp.ones((1, 2)), jnp.ones((1, 2))))


PEAK = """
import sys
import jax
import jax.numpy as jnp
import numpy as np
import ntt_eqx as ntt

samples, outputs, budget, gathered = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
model = ntt.sparsify(ntt.models.LeNet300100(key=jax.random.key(0)))
mask = ntt.prune(model, ntt.scores.Magnitude(), ntt.Sparsity(0.03)).mask
kernel = lambda x, m: ntt.ntk(model.with_mask(m), x, outputs=outputs, max_bytes=budget)
known = (lambda x, m: kernel(x, mask)) if gathered == "gathered" else kernel
x = jnp.asarray(np.random.default_rng(0).normal(size=(samples, 1, 28, 28)), jnp.float32)
compiled = jax.jit(known).lower(x, mask).compile()
status = lambda name: next(
    int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name)
)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak begins here
before = status("VmRSS")
found = compiled(x, mask).block_until_ready()
print(status("VmHWM") - before - found.nbytes)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux")
@pytest.mark.parametrize("case", ["256 full 32 gathered", "512 trace 64 whole"])
def test_the_process_takes_what_was_allowed(case):
    samples, outputs, budget, mask = case.split()
    command = [sys.executable, "-c", PEAK, samples, outputs, str(int(budget) * MiB), mask]
    took = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert 0 < took <= 1.25 * int(budget) * MiB


@pytest.mark.parametrize("vectors", [1, 8, 64])
@pytest.mark.parametrize("name", ["dense", "convolutions"])
def test_memory_of_an_operators_block_of_vectors(name, vectors, monkeypatch):
    """A quarter of the budget for samples, the budget for the tangents of vectors."""
    budget = (8 if name == "dense" else 32) * MiB
    monkeypatch.setattr(_operator, "default_budget", lambda device: budget)
    if name == "dense":
        model, x = masked(0.5, 128), jnp.zeros((3000, 48))
    else:
        model, x = (
            ntt.models.LeNet5((1, 20, 20), 6, key=jax.random.key(0)),
            jnp.zeros((256, 1, 20, 20)),
        )
    operator = ntt.ntk_operator(model, x)
    v = jax.ShapeDtypeStruct((len(x), 6, vectors), jnp.float32)
    found = jax.jit(lambda v: operator.mv(v)).lower(v).compile().memory_analysis()
    held = 3 * len(x) * 6 * vectors * 4  # the block, its turned copy, and the result
    assert found.temp_size_in_bytes <= 1.25 * budget + held
