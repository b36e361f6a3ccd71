"""Time the kernel, the gradient of a kernel loss and whole NTT steps, against direct methods.

    python benchmarks/ntk_throughput.py --quick

Every row is timed in this one process: compiled and run once, then run and waited for several
times, each time on fresh random data, which is in no cache; medians are shown. The pass `run`, left
out by default, times steps as they follow each other in `ntt.transfer`. `speedup` is against
`ntk_vector_products`, what the code published with NTT does, for the same case, size, kernel and
pass. GFLOP/s count the operations that the method by factors needs (see `useful_flops`), whatever
the implementation: a slower one shows a lower rate, and the machine's own matrix product, timed in
the same run, is what can be reached.
"""

import argparse
import contextlib
import dataclasses
import gc
import itertools
import json
import math
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from cases import CASES, Case

import ntt_eqx as ntt
from ntt_eqx._ntk import kernel_spec, outputs_and_ntk, sketch_directions
from ntt_eqx.kernels import PRECISIONS

PASSES = ("forward", "gradient", "step")
RUN = "run"
IMPLEMENTATIONS = ("factors", "jacobian", "ntk_vector_products")
BASELINE = "ntk_vector_products"


@dataclasses.dataclass(frozen=True)
class Job:
    """One row to be timed."""

    case: str
    n: int
    density: float
    kernel: Any
    outputs: Any
    implementation: Any
    what: str
    classes: int
    sketch_size: int
    precision: str
    devices: int


def main() -> None:
    """Parse the command line, time every row, print a table and write JSON."""
    options = _options()
    # Masks are random, and whether every class has a path does not change the time of a step.
    warnings.simplefilter("ignore", ntt.LayerCollapseWarning)
    if options.quick:
        options.cases, options.n = options.cases or ["lenet300100", "lenet5"], options.n or 8
    cases, n = options.cases or list(CASES), options.n or 32
    if options.devices > 1:
        jax.config.update("jax_num_cpu_devices", options.devices)
    rates = matmul_rates()
    print(f"device: {_device()}, counted as {options.devices}; jax {jax.__version__}")
    print("matrix product of 1024, 2048 float32:")
    print(f"  {rates['1024']:.0f}, {rates['2048']:.0f} GFLOP/s\n", flush=True)
    header = (
        f"{'case':12s} {'n=m':>4s} {'kernel':8s} {'pass':9s} {'outputs':10s} "
        f"{'implementation':20s} "
        f"{'median ms':>10s} {'p10':>9s} {'p90':>9s} {'compile s':>9s} {'peak MB':>8s} "
        f"{'GFLOP/s':>8s} {'speedup':>8s}"
    )
    print(header + "\n" + "-" * len(header), flush=True)
    rows: list[dict[str, Any]] = []
    report = {
        "device": _device(),
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "equinox": eqx.__version__,
            "ntt_eqx": ntt.__version__,
        },
        "matmul_gflops_per_s": rates,
        "rows": rows,
    }
    for case in cases:
        for kernel in options.kernels:
            for what in options.passes:
                for outputs, size in _outputs(options):
                    rows += _block(options, case, n, kernel, what, outputs, size)
                    if options.json:  # a run that is stopped keeps its rows
                        Path(options.json).write_text(json.dumps(report, indent=1) + "\n")
    if options.json:
        print(f"\nwritten: {options.json}")


def _outputs(options: Any) -> list[tuple[str, int]]:
    """Each kind of outputs, a sketch once for each of its sizes (which mean nothing to others)."""
    every = options.sketch_sizes
    sizes = lambda kind: every if kind == "sketch" else every[:1]
    return [(kind, size) for kind in options.outputs for size in sizes(kind)]


def _block(
    options: Any, case: str, n: int, kernel: str, what: str, outputs: str, sketch_size: int
) -> list[dict[str, Any]]:
    """All implementations of one case, kernel and pass; speed-ups against the baseline."""
    rows = []
    for implementation in options.implementations:
        if outputs == "sketch" and implementation != "factors":
            continue
        job = Job(
            case, n, options.density, kernel, outputs, implementation, what,
            options.classes, sketch_size, options.precision, options.devices,
        )  # fmt: skip
        row = measure(job, options)
        if row is not None:
            rows.append(row)
    base = [r["median_s"] for r in rows if r["implementation"] == BASELINE]
    for row in rows:
        row["speedup"] = base[0] / row["median_s"] if base else None
        speedup = "" if row["speedup"] is None else f"{row['speedup']:.1f}x"
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}"
        print(
            f"{case:12s} {n:4d} {kernel:8s} {what:9s} {row['outputs']:10s} "
            f"{row['implementation']:20s} {row['median_s'] * 1e3:10.2f} {row['p10_s'] * 1e3:9.2f} "
            f"{row['p90_s'] * 1e3:9.2f} {row['compile_s']:9.1f} {peak:>8s} "
            f"{row['gflops_per_s']:8.1f} {speedup:>8s}",
            flush=True,
        )
    return rows


def measure(job: Job, options: Any) -> dict[str, Any] | None:
    """Time one row; `None`, and a line that says so, where it would take longer than allowed."""
    if job.implementation != "factors" and job.n > 2:
        small = dataclasses.replace(job, n=2)
        guess = _time(small, 1, 0.0)["median_s"] * (job.n / 2) ** 2
        if guess > options.limit:
            print(
                f"{job.case:12s} {job.n:4d} {job.kernel:8s} {job.what:9s} {job.outputs:10s} "
                f"{job.implementation:20s} left out: about {guess:.0f} s a run, "
                f"--limit is {options.limit:.0f} s"
            )
            return None
    return _time(job, options.repeats, options.seconds)


def _time(job: Job, repeats: int, seconds: float) -> dict[str, Any]:
    case = dataclasses.replace(CASES[job.case], num_classes=job.classes)
    with ntt.distribute() if job.devices > 1 else contextlib.nullcontext():
        timed = _in_a_run if job.what == RUN else _alone
        times, compile_s, peak = timed(job, case, repeats, seconds)
    cuts = statistics.quantiles(times, n=10) if len(times) > 1 else [times[0]] * 9
    median = statistics.median(times)
    return {
        "case": job.case,
        "n": job.n,
        "m": job.n,
        "outputs": f"sketch:{job.sketch_size}" if job.outputs == "sketch" else job.outputs,
        "num_outputs": job.classes,
        "density": job.density,
        "kernel": job.kernel,
        "implementation": job.implementation,
        "pass": job.what,
        "precision": job.precision,
        "devices": job.devices,
        "repeats": len(times),
        "median_s": median,
        "p10_s": max(cuts[0], min(times)),
        "p90_s": min(cuts[-1], max(times)),
        "compile_s": compile_s,
        "peak_bytes": peak,
        "gflops_per_s": useful_flops(job, case) / median / 1e9,
    }


def _alone(job: Job, case: Case, repeats: int, seconds: float) -> tuple[list[float], float, int]:
    """Seconds of each run of a program by itself, those of compiling it, and the bytes it takes."""
    run, arguments = _program(job, case)
    start = time.perf_counter()
    compiled = jax.jit(run).lower(*arguments(0)).compile()
    compile_s = time.perf_counter() - start
    jax.block_until_ready(compiled(*arguments(1)))
    times: list[float] = []
    while len(times) < repeats and (len(times) < 3 or sum(times) < seconds):
        fresh = jax.block_until_ready(arguments(2 + len(times)))
        gc.collect()
        start = time.perf_counter()
        jax.block_until_ready(compiled(*fresh))
        times.append(time.perf_counter() - start)
        if sum(times) > seconds and times[0] > 10:
            break
    return times, compile_s, _peak_bytes(compiled)


def _in_a_run(
    job: Job, case: Case, repeats: int, seconds: float
) -> tuple[list[float], float, None]:
    """Seconds of a step of a transfer, by so many that take 0.2, and those until the first ends."""
    ends: list[float] = []
    together = 1  # steps between two looks at the clock

    def on_step(progress: ntt.Progress[ntt.NTTState]) -> None:
        if progress.step % together == 0:
            jax.block_until_ready(progress.state.step)
            ends.append(time.perf_counter())

    def go_on(state: ntt.NTTState, steps: int) -> tuple[ntt.NTTState, list[float]]:
        ends[:] = [time.perf_counter()]
        state, _ = ntt.transfer(
            state, itertools.cycle(batches), num_steps=steps, log_every=None, on_step=on_step
        )
        return state, [end - start for start, end in itertools.pairwise(ends)]

    batches = [case.samples(jax.random.key(100 + seed), 2 * job.n) for seed in range(3)]
    state, (compile_s, *_, last) = go_on(_state(job, case), 3)
    together = max(1, round(0.2 / last))
    begin = math.ceil(3 / together) * together
    count = max(3, min(repeats, int(seconds / (together * last))))
    _, (_, *times) = go_on(state, begin + count * together)
    return [duration / together for duration in times], compile_s, None


def _state(job: Job, case: Case) -> ntt.NTTState:
    """Where a transfer begins, with the job's settings."""
    config = ntt.NTTConfig(
        density=job.density,
        num_steps=10_000,
        kernel=job.kernel,
        outputs=job.outputs,
        sketch_size=job.sketch_size,
        precision=job.precision,  # pyright: ignore[reportArgumentType]
        implementation=job.implementation,
    )
    return ntt.ntt_init(case.teacher(jax.random.key(0)), config, optax.adam(5e-4))


def _program(job: Job, case: Case) -> tuple[Callable[..., Any], Callable[[int], Any]]:
    """A function to compile, and fresh arguments for it by seed."""
    state = _state(job, case)
    samples = lambda seed: case.samples(jax.random.key(100 + seed), 2 * job.n)
    dynamic, static = eqx.partition(state, eqx.is_array)
    params, rest = eqx.partition(state.student, eqx.is_inexact_array)

    outputs, directions = ("full" if job.outputs == "sketch" else job.outputs), None
    shape = {"full": (job.classes, job.classes), "diagonal": (job.classes,), "trace": ()}
    if job.outputs == "sketch":
        directions = sketch_directions(jax.random.key(1), job.sketch_size, job.classes)
        shape["sketch"] = (job.sketch_size, job.sketch_size)

    def kernel(params, x, support):
        # the support is an argument, as in a step: gathering the mask's non-zeros is timed, too
        student = eqx.combine(params, rest)
        spec = kernel_spec(job.kernel, outputs, job.precision, job.implementation)  # pyright: ignore
        return outputs_and_ntk(spec, student, x, index=support, directions=directions)[1]

    if job.what == "forward":
        return kernel, lambda seed: (params, samples(seed), state.support)
    if job.what == "gradient":
        entries = (job.n, job.n, *shape[job.outputs])
        target = lambda seed: jax.random.normal(jax.random.key(seed), entries)

        def loss(params, x, support, target):
            return jnp.mean(jnp.square(kernel(params, x, support) - target))

        gradient = jax.value_and_grad(loss)
        return gradient, lambda seed: (params, samples(seed), state.support, target(seed))

    def step(dynamic, x):
        state, metrics = ntt.ntt_step(eqx.combine(dynamic, static), x)
        return eqx.filter(state, eqx.is_array), metrics

    return step, lambda seed: (dynamic, samples(seed))


def useful_flops(job: Job, case: Case) -> float:
    """Floating-point operations of a pass by factors, matrix products alone.

    The model forwards and, for every output, backwards to each layer's output, for all samples; and
    the contraction as `ntt.explain` counts it. A gradient is counted as three times its function,
    a step as the student's gradient and the teacher's kernel.
    """
    if job.outputs == "sketch":  # what R outputs would need
        case = dataclasses.replace(case, num_classes=job.sketch_size)
        job = dataclasses.replace(job, outputs="full")
    teacher = case.teacher(jax.random.key(0))
    student = ntt.ntt_init(teacher, ntt.NTTConfig(density=job.density), optax.sgd(1.0)).student
    x = case.samples(jax.random.key(1), job.n)

    def forward(model: Any, kernel: Any) -> float:
        costs = ntt.explain(model, x, x, kernel=kernel, outputs=job.outputs)
        weights = [(p.layer_flops, p.flops) for p in costs.parameters]
        layers = [layer for layer, _ in weights]
        factors = 2 * job.n * (sum(layers) + costs.num_outputs * sum(layers[1:]))
        return factors + sum(flops for _, flops in weights)

    active = forward(student, job.kernel)
    if job.what == "forward":
        return active
    return 3 * active + (forward(teacher, "ambient") if job.what in ("step", RUN) else 0.0)


def matmul_rates() -> dict[str, float]:
    """GFLOP/s of a float32 matrix product of n x n by n x n, the best of several runs."""
    rates = {}
    for n in (1024, 2048):
        a = jax.random.normal(jax.random.key(0), (n, n))
        product = jax.jit(lambda a: a @ a)
        jax.block_until_ready(product(a))
        times = []
        for _ in range(9):
            start = time.perf_counter()
            jax.block_until_ready(product(a))
            times.append(time.perf_counter() - start)
        rates[str(n)] = 2 * n**3 / min(times) / 1e9
    return rates


def _peak_bytes(compiled: Any) -> int:
    """Bytes that the compiled program needs at once: arguments, results and temporaries."""
    memory = compiled.memory_analysis()
    names = ("argument_size_in_bytes", "output_size_in_bytes", "temp_size_in_bytes")
    return sum(getattr(memory, name, 0) for name in names)


def _device() -> str:
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    try:
        import os

        return f"{platform.machine()} CPU, {len(os.sched_getaffinity(0))} cores"
    except AttributeError:
        return f"{platform.machine()} CPU"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--cases", nargs="+", choices=list(CASES), help="default: all")
    add("--passes", nargs="+", choices=(*PASSES, RUN), default=list(PASSES))
    add("--kernels", nargs="+", choices=("active", "ambient"), default=["active", "ambient"])
    add("--implementations", nargs="+", choices=IMPLEMENTATIONS, default=list(IMPLEMENTATIONS))
    kinds = ("full", "diagonal", "trace", "sketch")
    add("--outputs", nargs="+", choices=kinds, default=["full"])
    add("--sketch-sizes", nargs="+", type=int, default=[8], help="directions R (default: 8)")
    add("--classes", type=int, default=10, help="outputs K of the model (default: 10)")
    add("--precision", choices=PRECISIONS, default="float32", help="default: float32")
    add("--density", type=float, default=0.03, help="share of weights kept (default: 0.03)")
    add("-n", type=int, help="samples a side, n = m (default: 32; with --quick: 8)")
    add(
        "--devices",
        type=int,
        default=1,
        help="devices that the CPU counts as, all at work (default: 1)",
    )
    add("--repeats", type=int, default=21, help="runs a row at most (default: 21)")
    add("--seconds", type=float, default=5.0, help="seconds of runs a row (default: 5)")
    add("--limit", type=float, default=120.0, help="leave out rows with longer runs, in seconds")
    add("--quick", action="store_true", help="the two LeNets, 8 samples a side: minutes in all")
    add("--json", metavar="FILE", help="write all rows")
    return parser.parse_args()


if __name__ == "__main__":
    main()
