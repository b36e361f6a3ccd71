"""Find the fastest tile sizes of the Pallas kernels on the device at hand.

    python benchmarks/tune_kernels.py --out tuned.json
    python benchmarks/tune_kernels.py --dry-run            # on any machine: two configs, lowered

For every shape it times each config that is valid and fits, forward and one-sided gradient (on a
GPU u, and the way back from its cotangent), prints the best, and the config that is best over all
shapes as a line for the `TUNED` table of the module.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import ntt_eqx as ntt_eqx  # which finds the kernels of its own checkout
from ntt_eqx_kernels._precision import PIECES
from ntt_eqx_kernels.masked_ntk import dense_gpu, dense_tpu

# (N, M, K, L, I, J)
SHAPES = ((32, 32, 10, 10, 300, 784), (128, 128, 10, 10, 512, 3200), (256, 256, 10, 10, 512, 8192))
GRIDS = {
    dense_gpu: dict(
        m=(1, 2),
        i=(64, 128),
        j=(64, 128),
        a1_j=(64, 128, 256),
        stages=(2, 3, 4),
        blocks=(132, 264),
    ),
    dense_tpu: dict(n=(16, 32), m=(8, 16, 32), i=(128, 256, 512), j=(256, 512, 1024)),
}


def main():
    parser = argparse.ArgumentParser(description="Tune the tile sizes of the kernels.")
    parser.add_argument("--dry-run", action="store_true", help="lower two configs, time nothing")
    parser.add_argument("--precision", choices=tuple(PIECES), default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write all timings here, as JSON")
    options = parser.parse_args()
    device = jax.devices()[0]
    if device.platform not in ("gpu", "tpu") and not options.dry_run:
        sys.exit(f"No GPU or TPU here ({device.device_kind}); --dry-run lowers two configs.")
    platforms = ("gpu", "tpu") if options.dry_run else (device.platform,)
    rows = []
    for platform in platforms:
        module = {"gpu": dense_gpu, "tpu": dense_tpu}[platform]
        rows += tune(module, SHAPES[: 1 if options.dry_run else None], platform, options)
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")


def tune(module, shapes, platform, options):
    """Time every config on every shape; returns one row for each."""
    name = module.__name__.removeprefix("ntt_eqx_kernels.")
    rows, totals = [], {}
    for shape in shapes:
        found = []
        for config in configs(module, shape, options.precision):
            row: dict[str, Any] = dict(module=name, shape=shape, config=dataclasses.asdict(config))
            if options.dry_run:
                lower(module, shape, config, options.precision, platform)
                print(f"{name} {shape} {config} lowers")
                rows.append(row)
                if len(rows) == 2:
                    return rows
                continue
            try:
                seconds = run(module, shape, config, options)
            except Exception as error:  # a config that the compiler refuses is not the best one
                row["error"] = f"{type(error).__name__}: {error}"[:500]
            else:
                row["seconds"] = seconds
                found.append((sum(seconds), config))
                totals.setdefault(base(module, config), []).append(sum(seconds))
            rows.append(row)
        if found:
            seconds, config = min(found, key=lambda pair: pair[0])
            print(f"{name} {shape}: {seconds * 1e3:.2f} ms with {config}", flush=True)
    whole = {config: sum(times) for config, times in totals.items() if len(times) == len(shapes)}
    if whole:
        best = min(whole, key=lambda config: whole[config])
        settings = ", ".join(f"{key}={value}" for key, value in best)
        print(f'{name}: TUNED["{jax.devices()[0].device_kind}"] = Config({settings})')
    return rows


def configs(module, shape, precision):
    """The valid configs of the module's grid that fit the shape and the memory."""
    axes = GRIDS[module]
    for values in itertools.product(*axes.values()):
        settings = dict(zip(axes, values, strict=True))
        try:
            if module is dense_gpu:
                config = dense_gpu.Config(**settings)
                fits = config.fits(4, 1)  # a mask is exact in one piece
            else:
                config, fits = dataclasses.replace(module.config_for("", shape), **settings), True
        except ValueError:
            continue
        if fits:
            yield config


def base(module, config):
    """The settings that were varied, as a key."""
    return tuple((axis, getattr(config, axis)) for axis in GRIDS[module])


def calls(module, shape):
    """The functions to time, and the shapes of their arguments."""
    n, m, k, l, i, j = shape  # noqa: E741
    floats = lambda *shapes: [jax.ShapeDtypeStruct(x, jnp.float32) for x in shapes]
    mask = jax.ShapeDtypeStruct((i, j), bool)
    if module is dense_gpu:
        return (
            (module.u, [*floats((n, j), (m, j)), mask]),
            (module.pulled, [*floats((n, m, i), (m, j)), mask]),
        )
    factors = floats((n, j), (n, k, i), (m, j), (m, l, i))
    return (
        (module.forward, [*factors, mask]),
        (module.backward, [*factors, mask, *floats((n, m, k, l))]),
    )


def lower(module, shape, config, precision, platform):
    """Lower product and gradient for an abstract device."""
    from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

    device = {
        "gpu": AbstractDevice("NVIDIA H100 80GB HBM3", 132, "cuda"),
        "tpu": AbstractDevice("TPU v5 lite", 1, "tpu"),
    }[platform]
    with use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        for function, inputs in calls(module, shape):
            call = jax.jit(functools.partial(function, precision=precision, config=config))
            call.trace(*inputs).lower(lowering_platforms=("cuda" if platform == "gpu" else "tpu",))


def run(module, shape, config, options):
    """Median seconds of product and one-sided gradient."""
    seconds = []
    for function, inputs in calls(module, shape):
        keys = jax.random.split(jax.random.key(0), len(inputs))
        args = [
            jax.random.bernoulli(key, 0.05, x.shape)
            if x.dtype == bool
            else jax.random.normal(key, x.shape)
            for key, x in zip(keys, inputs, strict=True)
        ]
        call = jax.jit(functools.partial(function, precision=options.precision, config=config))
        jax.block_until_ready(call(*args))
        times = []
        for _ in range(options.repeats):
            start = time.perf_counter()
            jax.block_until_ready(call(*args))
            times.append(time.perf_counter() - start)
        seconds.append(statistics.median(times))
    return seconds


if __name__ == "__main__":
    main()
