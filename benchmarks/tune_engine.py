"""Measure on this device what the engine's choices depend on, and print it as a row of `COSTS`.

    python benchmarks/tune_engine.py

Times of one run: gathered against whole products of a dense layer at several densities, gathered
against whole tangents of a convolution with their contraction, and the factors of LeNet-5 with
blocks of several sizes. Put the row into `ntt_eqx/_ntk/_costs.py`.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cases import CASES

from ntt_eqx._ntk._costs import Costs, costs_on
from ntt_eqx._ntk._execute import factorise
from ntt_eqx._ntk._plan import make_plan
from ntt_eqx._ntk._spec import kernel_spec
from ntt_eqx.kernels import (
    gather_rows,
    gathered_shape,
    gathered_tangents,
    masked_ntk_reference,
    masked_tangent_ntk,
    target_device,
)

_DENSITIES = (0.03, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5)
_KEPT = (
    "flops_per_weight",
    "tail_bytes",
    "flops_per_sent_byte",
    "entry_products",
    "gathered_samples",
    "gathered_per_input",
)
_LAYERS = ((300, 784), (512, 3200), (1024, 1024))
_BLOCKS = tuple(2**20 * size for size in (1, 4, 16, 64, 1024))


def main() -> None:
    """Measure, show every time, and print a row for this platform."""
    print(f"device: {jax.devices()[0].device_kind}, jax {jax.__version__}")
    current = costs_on(target_device())
    found = Costs(
        gathered_density=_gathered_density(),
        gathering_flops=current.gathering_flops,
        gathered_entry=_gathered_entry(),
        flops_per_weight=current.flops_per_weight,
        block_bytes=_block_bytes(),
        tail_bytes=current.tail_bytes,
        flops_per_sent_byte=current.flops_per_sent_byte,
        entry_products=current.entry_products,
        gathered_samples=current.gathered_samples,
        gathered_per_input=current.gathered_per_input,
    )
    _gathered_shares(current)
    print(f"\n{found}\n(those that are not measured are the ones in use: {', '.join(_KEPT)})")


def _gathered_density() -> float:
    """The largest density at which gathering wins, for a 300 x 784 layer with its gradient."""
    best = 0.0
    print("\nmasked NTK of a 300 x 784 layer and its gradient, 32 x 32 samples, 10 outputs")
    for density in _DENSITIES:
        rng = np.random.default_rng(0)
        mask = rng.random((300, 784)) < density
        sides = [rng.normal(size=s).astype(np.float32) for s in ((32, 784), (32, 10, 300)) * 2]
        short = gather_rows(mask, int(mask.sum())).metric(jnp.asarray(mask), jnp.zeros(300))

        def loss(factors: Any, c: Any) -> Any:
            return jnp.sum(
                jnp.sin(masked_ntk_reference(factors[0], factors[1], factors[2], factors[3], c))
            )

        run = jax.jit(jax.value_and_grad(loss))
        arrays = [jnp.asarray(s) for s in sides]
        whole, gathered = _time(run, arrays, jnp.asarray(mask)), _time(run, arrays, short)
        print(f"  density {density:4.2f}: whole {whole:8.2f} ms, gathered {gathered:8.2f} ms")
        best = density if gathered < whole else best
    return best


def _gathered_shares(costs: Costs) -> None:
    """Show times of gathered and whole products by layer and samples, and what is chosen."""
    print("\nthe same for other layers and N x N samples; * where gathering is chosen")
    for rows, inputs in _LAYERS:
        for n in (8, 16, 32, 64):
            whole, shown = _product(rows, inputs, n, None)[0], ""
            for density in (0.01, 0.03, 0.06, 0.1):
                gathered, entries = _product(rows, inputs, n, density)
                chosen = density <= costs.gathered_density
                chosen &= costs.gather(entries, rows, inputs, n, n)
                shown += f", {gathered:.2f} at {density}{'*' if chosen else ''}"
            print(f"  {rows} x {inputs}, N = {n}: whole {whole:.2f} ms{shown}", flush=True)


def _product(rows: int, inputs: int, n: int, density: float | None) -> tuple[float, int]:
    """Milliseconds of a product with its gradient, gathered at a density, and its entries."""
    rng = np.random.default_rng(0)
    mask = rng.random((rows, inputs)) < (density or 0.05)
    shapes = ((n, inputs), (n, 10, rows)) * 2
    arrays = [jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes]
    places = gather_rows(mask, int(mask.sum()))
    short = places.metric(jnp.asarray(mask), jnp.zeros(rows))
    loss = lambda a, c: jnp.sum(jnp.sin(masked_ntk_reference(a[0], a[1], a[2], a[3], c)))
    c = jnp.asarray(mask) if density is None else short
    return _time(jax.jit(jax.value_and_grad(loss)), arrays, c), places.columns.size


def _gathered_entry() -> int:
    """Time of a gathered tangent's entry, in entries of whole tangents; both with contraction."""
    rng = np.random.default_rng(0)
    mask = rng.random((50, 500)) < 0.03
    short = gather_rows(mask, int(mask.sum())).metric(jnp.asarray(mask), jnp.zeros(50))
    a = jnp.asarray(rng.normal(size=(64, 500, 64)), jnp.float32)
    d = jnp.asarray(rng.normal(size=(64, 10, 50, 64)), jnp.float32)

    def some(a: Any, d: Any) -> Any:
        t = jax.lax.map(lambda one: gathered_tangents(one[0], one[1], short), (a, d))
        return t[:32].reshape(320, -1) @ t[32:].reshape(320, -1).T

    every = jax.jit(lambda a, d: masked_tangent_ntk(a[:32], d[:32], a[32:], d[32:]))
    whole, gathered = _time(every, a, d), _time(jax.jit(some), a, d)
    entries = math.prod(gathered_shape(int(mask.sum()), 50))
    print("\ntangents of a 50 x 500 convolution at 64 places, 32 x 32 samples, 10 outputs")
    print(f"  whole {whole:.2f} ms, {entries} entries gathered {gathered:.2f} ms")
    return max(1, round(gathered / entries / (whole / mask.size)))


def _block_bytes() -> int:
    """The block size with which the factors of LeNet-5 for 64 samples are fastest."""
    case = CASES["lenet5"]
    model, x = case.teacher(jax.random.key(0)), case.samples(jax.random.key(1), 64)
    times = {}
    print("\nfactors of LeNet-5, 64 samples")
    for size in _BLOCKS:
        other = dataclasses.replace(costs_on(target_device()), block_bytes=size)

        def run(x: Any, other: Costs = other) -> Any:
            spec = dataclasses.replace(kernel_spec("ambient"), costs=other)
            plan, operands = make_plan(spec, model, x, m=64)
            return factorise(plan, operands, x)

        times[size] = _time(jax.jit(run), x)
        print(f"  blocks of {size / 2**20:6.0f} MiB: {times[size]:8.2f} ms", flush=True)
    return min(times, key=lambda size: times[size])


def _time(run: Callable[..., Any], *arguments: Any, repeats: int = 9) -> float:
    """Median milliseconds of a call, after one that compiles."""
    jax.block_until_ready(run(*arguments))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run(*arguments))
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


if __name__ == "__main__":
    main()
