"""Values, gradients and timings of every GPU path of the kernels, in a few minutes on one GPU.

    python benchmarks/on_gpu.py --out on_gpu.json          # on a GPU
    python benchmarks/on_gpu.py --dry-run                  # on any machine: small, interpreted

Each case runs the pure-JAX version and the Pallas kernels on the same inputs. Values and gradients
are compared with the pure-JAX version in float64 (on small batches, where that is quick); timings
are medians of calls that wait for the result, on fresh inputs, forward and forward + backward
apart, with compile time and peak memory beside them. Rates are put beside those of a plain matrix
product and a plain copy on the same device in the same run.
"""

import argparse
import dataclasses
import functools
import json
import math
import statistics
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ntt_eqx import kernels


@dataclasses.dataclass(frozen=True)
class Case:
    """One layer and one pair of batches; `s` positions for a layer applied at many.

    The mask is `"whole"`, or its non-zeros are `"gathered"`.
    """

    name: str
    n: int
    i: int
    j: int
    k: int = 10
    s: int | None = None
    density: float = 0.05
    mask: str = "whole"

    @property
    def nonzeros(self) -> int:
        """Of the mask."""
        return round(self.density * self.i * self.j)

    def flops(self) -> int:
        """Multiplications and additions, forward; for `u` of the gathered non-zeros alone."""
        n, k, i, j = self.n, self.k, self.i, self.j
        if self.s is None:
            weights = self.nonzeros if self.mask == "gathered" else i * j
            return 2 * n * n * (weights + k * i + k * k * i)
        return 2 * (2 * n * k * i * j * self.s + n * n * k * k * i * j)

    def bytes(self, itemsize: int) -> int:
        """What has to be read and written once, forward."""
        s = self.s or 1
        factors = 2 * self.n * s * (self.j + self.k * self.i) * itemsize
        return factors + self.i * self.j + 4 * (self.n * self.k) ** 2

    def inputs(self, seed: int, dtype=jnp.float32):
        """Random factors of both sides and a mask."""
        keys = jax.random.split(jax.random.key(seed), 5)
        s = () if self.s is None else (self.s,)
        shapes = 2 * ((self.n, self.j, *s), (self.n, self.k, self.i, *s))
        factors = [
            jax.random.normal(key, shape, dtype) / math.sqrt(shape[1])
            for key, shape in zip(keys[:4], shapes, strict=True)
        ]
        order = jax.random.permutation(keys[4], self.i * self.j)
        mask = (order < self.nonzeros).reshape(self.i, self.j)
        if self.mask == "whole":
            return *factors, mask
        rows = kernels.gather_rows(mask, self.nonzeros)
        return *factors, rows.metric(mask, jnp.zeros(self.i, dtype))


LAYERS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("lenet_300", dict(i=300, j=784)),
    ("lenet5_dense", dict(i=500, j=800)),
    ("conv4_3200", dict(i=512, j=3200)),
    ("conv4_8192", dict(i=512, j=8192)),
    ("conv4_conv2", dict(i=64, j=576, s=900)),
    ("conv4_conv4", dict(i=128, j=1152, s=169)),
)
ACCURACY = (
    Case("one", 1, 1, 1, k=1, density=1.0),
    Case("odd", 20, 37, 19, k=3),
    Case("edges", 67, 130, 257, k=11),
    Case("one_output", 33, 70, 100, k=1),
    Case("dense_mask", 32, 100, 300, density=1.0),
    Case("empty_mask", 32, 100, 300, density=0.0),
    Case("lenet_300", 32, 300, 784),
    Case("conv", 8, 16, 72, k=10, s=49),
)
PRECISIONS = {"float32": 1e-5, "tf32": 1e-3, "bfloat16": 1e-2}


def main():
    parser = argparse.ArgumentParser(description="Check and time the kernels on a GPU.")
    parser.add_argument("--dry-run", action="store_true", help="small cases, interpreted")
    parser.add_argument("--out", type=Path, help="write the results here, as JSON")
    parser.add_argument("--batch", type=int, nargs="*", default=[32, 128, 256])
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()

    device = jax.devices()[0]
    if device.platform != "gpu" and not options.dry_run:
        sys.exit(f"No GPU here ({device.device_kind}); --dry-run goes through the motions.")
    pallas = "pallas_gpu_interpret" if options.dry_run else "pallas_gpu"
    report = {
        "device": device.device_kind,
        "jax": jax.__version__,
        "dry_run": options.dry_run,
        "implementations": ["reference", pallas],
    }
    print(f"{device.device_kind}, JAX {jax.__version__}, {pallas}")
    if options.dry_run:
        print("Dry run: the kernels are interpreted, and no time below says anything about a GPU.")
    cases = ACCURACY[:2] + ACCURACY[-1:] if options.dry_run else ACCURACY
    if options.dry_run:
        cases = [dataclasses.replace(case, n=min(case.n, 3), k=2) for case in cases]
    report["accuracy"] = accuracy(cases, ("reference", pallas))
    report["rates"] = rates(256 if options.dry_run else 8192, options.repeats)
    report["timings"] = timings(timing_cases(options), ("reference", pallas), options, report)
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    failed = [row for row in report["accuracy"] if not row["ok"]]
    failed += [row for row in report["timings"] if row.get("error")]
    print(f"{len(failed)} failed" if failed else "all passed")
    sys.exit(bool(failed))


def accuracy(cases, implementations):
    """Errors of products and gradients, as shares of the largest entry of the float64 ones."""
    rows = []
    print(f"\n{'case':12} {'implementation':22} {'precision':9} {'product':>8} {'gradient':>8}")
    for case in cases:
        expected = reference_float64(case)
        for implementation in implementations:
            for precision, bound in PRECISIONS.items():
                row = dict(case=case.name, implementation=implementation, precision=precision)
                try:
                    found = product_and_gradient(case, implementation, precision)(*case.inputs(0))
                    errors = [relative_error(x, y) for x, y in zip(found, expected, strict=True)]
                    row |= dict(product=errors[0], gradient=max(errors[1:]))
                    row["ok"] = max(errors) < bound
                    shown = f"{errors[0]:8.1e} {max(errors[1:]):8.1e}"
                except Exception as error:  # one path that fails must not hide the others
                    row |= dict(ok=False, error="".join(traceback.format_exception(error)))
                    shown = f"{type(error).__name__}: {error}"[:80]
                rows.append(row)
                mark = "" if row["ok"] else "  <- FAILED"
                print(f"{case.name:12} {implementation:22} {precision:9} {shown}{mark}", flush=True)
    return rows


def rates(size, repeats):
    """What a plain matrix product and a plain copy reach on this device."""
    found = {}
    for name, dtype, precision in (
        ("bfloat16", jnp.bfloat16, "bfloat16"),
        ("tf32", jnp.float32, "tensorfloat32"),
        ("float32", jnp.float32, "float32"),
    ):
        x = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype)
        with jax.default_matmul_precision(precision):
            product = jax.jit(lambda x, y: x @ y).lower(x, x).compile()
        seconds = median_seconds(product, [(x, x)], repeats)
        found[f"matmul_{name}_tflops"] = 2 * size**3 / seconds / 1e12
    x = jnp.zeros((size, size), jnp.float32)
    seconds = median_seconds(jax.jit(lambda x: x + 1).lower(x).compile(), [(x,)], repeats)
    found["copy_gbytes"] = 2 * x.nbytes / seconds / 1e9
    print("\n" + ", ".join(f"{name} {value:.1f}" for name, value in found.items()))
    return found


def timing_cases(options):
    if options.dry_run:
        return [Case("lenet_300", 3, 20, 40, k=2), Case("conv", 2, 4, 9, k=2, s=4)]
    return [Case(name, n, **layer) for name, layer in LAYERS for n in options.batch]


def timings(cases, implementations, options, report):
    """Seconds, rates and memory of every implementation, and the ratio to pure JAX."""
    rows = []
    print(
        f"\n{'case':14} {'N=M':>4} {'precision':9} {'implementation':20} {'forward':>9} "
        f"{'+gradient':>9} {'TFLOP/s':>8} {'GB/s':>7} {'of plain':>8} {'temp':>8} {'speed-up':>8}"
    )
    precisions = ("float32",) if options.dry_run else tuple(PRECISIONS)
    for case in cases:
        for precision in precisions:
            baseline = None
            for implementation in implementations:
                row = dict(dataclasses.asdict(case), precision=precision)
                row["implementation"] = implementation
                try:
                    row |= measure(case, implementation, precision, options.repeats)
                except Exception as error:  # out of memory, for one: that is a result
                    row["error"] = f"{type(error).__name__}: {error}"[:2000]
                    print(
                        f"{case.name:14} {case.n:4} {precision:9} {implementation:20} "
                        f"{row['error'][:70]}",
                        flush=True,
                    )
                    rows.append(row)
                    continue
                baseline = baseline or row
                row["speed_up_forward"] = baseline["forward_s"] / row["forward_s"]
                row["speed_up_gradient"] = baseline["gradient_s"] / row["gradient_s"]
                plain = report["rates"][f"matmul_{precision}_tflops"]
                row["share_of_matmul"] = row["tflops"] / plain
                rows.append(row)
                print(
                    f"{case.name:14} {case.n:4} {precision:9} {implementation:20} "
                    f"{row['forward_s'] * 1e3:7.2f}ms {row['gradient_s'] * 1e3:7.2f}ms "
                    f"{row['tflops']:8.2f} {row['gbytes']:7.1f} {row['share_of_matmul']:8.1%} "
                    f"{row['temporary_bytes'] / 2**20:6.0f}Mi "
                    f"{row['speed_up_forward']:4.2f}/{row['speed_up_gradient']:4.2f}",
                    flush=True,
                )
    return rows


def measure(case, implementation, precision, repeats):
    call = functools.partial(operation(case), precision=precision, implementation=implementation)
    batches = [case.inputs(seed) for seed in range(3)]
    start = time.perf_counter()
    forward = jax.jit(call).lower(*batches[0]).compile()
    compiled = time.perf_counter()
    gradient = product_and_gradient(case, implementation, precision).lower(*batches[0]).compile()
    both_compiled = time.perf_counter()
    forward_s = median_seconds(forward, batches, repeats)
    analysis = forward.memory_analysis()
    return dict(
        compile_forward_s=compiled - start,
        compile_gradient_s=both_compiled - compiled,
        forward_s=forward_s,
        gradient_s=median_seconds(gradient, batches, repeats),
        tflops=case.flops() / forward_s / 1e12,
        gbytes=case.bytes(4) / forward_s / 1e9,
        temporary_bytes=getattr(analysis, "temp_size_in_bytes", 0),
        gradient_temporary_bytes=getattr(gradient.memory_analysis(), "temp_size_in_bytes", 0),
        peak_bytes_in_use=(jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
    )


def median_seconds(function, batches, repeats):
    for inputs in batches:  # warm up
        jax.block_until_ready(function(*inputs))
    seconds = []
    for repeat in range(repeats):
        inputs = batches[repeat % len(batches)]
        start = time.perf_counter()
        jax.block_until_ready(function(*inputs))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def product_and_gradient(case, implementation, precision=None):
    call = functools.partial(operation(case), precision=precision, implementation=implementation)

    @jax.jit
    def function(*args):
        *factors, mask = args
        theta, pull_back = jax.vjp(lambda *factors: call(*factors, mask), *factors)
        return theta, *pull_back(
            jnp.cos(jnp.arange(theta.size)).reshape(theta.shape).astype(theta.dtype)
        )

    return function


def reference_float64(case):
    *factors, mask = case.inputs(0)
    with jax.enable_x64(True):
        wide = [factor.astype(jnp.float64) for factor in factors]
        found = product_and_gradient(case, "reference")(*wide, mask)
        return jax.device_get(found)


def relative_error(found, expected):
    found = jax.device_get(found)
    largest = abs(expected).max()
    return float(abs(found - expected).max() / largest) if largest else float(abs(found).max())


def operation(case):
    return kernels.masked_ntk if case.s is None else kernels.masked_tangent_ntk


if __name__ == "__main__":
    main()
