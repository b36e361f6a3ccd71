"""Values, gradients and times of every GPU path, those first that decide most.

    python benchmarks/on_gpu.py --out on_gpu.json          # on a GPU
    python benchmarks/on_gpu.py --dry-run                  # on any machine: small, interpreted

In this order, with the report written after each row, so that a run that is cut off leaves what it
has: what the device reaches by plain products and copies; whole `ntt_step`s; the masked product by
layer and by density, whole and gathered, by pure JAX and by Pallas, with the fastest that is right
named; whether a hundred runs give the same bits; memory against `max_bytes`; the edges of the
kernels' tiles; every convolution of a step. Four programs are compiled at a time, then run one
after another, then come the next four.

Values and gradients are compared with pure JAX in float64 at the sizes that are timed, those of
steps with the host's, which takes no device time. `wall` is the median of calls that each wait for
their result, `device` the time of the device alone (by CUPTI, where JAX offers it) with its
launches and the kernels that take most of it, `row` that of a call among many which are waited for
together.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import itertools
import json
import re
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from cases import CASES
from jax.extend.core import jaxprs_in_params
from products import LAYERS, PRECISIONS, Product

import ntt_eqx as ntt
from ntt_eqx import kernels
from ntt_eqx.kernels import Precision

DENSITIES = (0.03, 0.1, 0.01, 0.3, 1.0)
# Seconds that a whole active step at batch 64, 3 %, may take on an H100.
GOALS = {"lenet300100": 1e-3, "lenet5": 3e-3, "conv4": 15e-3}
# How far loss and gradient of a whole step may be off, as a share of the largest entry (CPU: 4e-6).
STEP_ERRORS = {"float32": 2e-5, "tf32": 1e-2, "bfloat16": 1e-1}
EDGES = (
    Product("one", 1, 1, 1, k=1, density=1.0),
    Product("odd", 20, 37, 19, k=3),
    Product("edges", 67, 130, 257, k=11),
    Product("one_output", 33, 70, 100, k=1),
    Product("dense_mask", 32, 100, 300, density=1.0),
    Product("empty_mask", 32, 100, 300, density=0.0),
)

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Plan:
    """The sizes of a run: all of it, or small and interpreted."""

    dry: bool = False
    batch: int = 256
    repeats: int = 20
    cases: tuple[str, ...] = tuple(GOALS)
    layers: tuple[str, ...] = tuple(name for name, _ in LAYERS)
    densities: tuple[float, ...] = DENSITIES
    precisions: tuple[Precision, ...] = kernels.PRECISIONS

    @property
    def pallas(self) -> str:
        """The kernels' name."""
        return "pallas_gpu_interpret" if self.dry else "pallas_gpu"

    @property
    def products(self) -> list[Product]:
        """One layer each, at the first density."""
        if self.dry:
            return [Product("dense", 3, 20, 40, k=2)]
        chosen = [(name, sizes) for name, sizes in LAYERS if name in self.layers]
        return [Product(n, self.batch, **sizes, density=self.densities[0]) for n, sizes in chosen]


@dataclasses.dataclass(frozen=True)
class Job:
    """One row of a report.

    Attributes:
        row: what it is.
        prepare: compiles, beside other jobs.
        measure: runs alone; from what `prepare` returned to what was found.
    """

    row: Row
    prepare: Callable[[], Any]
    measure: Callable[[Any], Row]

    def prepared(self) -> Any:
        """What `prepare` returns, or its error: one that fails must not hide the others."""
        try:
            return self.prepare()
        except Exception as error:
            traceback.print_exc()
            return error

    def measured(self, prepared: Any) -> Row:
        """The row with what was found, or with the error."""
        try:
            if isinstance(prepared, Exception):
                raise prepared
            return self.row | self.measure(prepared)
        except Exception as error:
            if error is not prepared:
                traceback.print_exc()
            return self.row | dict(ok=False, error=f"{type(error).__name__}: {error}"[:500])


def main() -> None:
    plan = Plan()
    parser = argparse.ArgumentParser(description="Check and time everything on a GPU.")
    parser.add_argument("--dry-run", action="store_true", help="small cases, interpreted")
    parser.add_argument("--out", type=Path, help="write the results here, as JSON")
    parser.add_argument("--batch", type=int, default=plan.batch, help="N = M of a product")
    parser.add_argument("--repeats", type=int, default=plan.repeats)
    parser.add_argument("--parts", nargs="*", choices=tuple(PARTS), default=list(PARTS))
    parser.add_argument("--cases", nargs="*", choices=tuple(CASES), default=plan.cases)
    parser.add_argument("--layers", nargs="*", choices=plan.layers, default=plan.layers)
    parser.add_argument("--densities", nargs="*", type=float, default=plan.densities)
    parser.add_argument("--precisions", nargs="*", choices=plan.precisions, default=plan.precisions)
    options = parser.parse_args()
    device = jax.devices()[0]
    if device.platform != "gpu" and not options.dry_run:
        sys.exit(f"No GPU here ({device.device_kind}); --dry-run goes through the motions.")
    if options.dry_run:
        plan = Plan(True, repeats=2, cases=("lenet300100",), precisions=("float32",))
        plan = dataclasses.replace(plan, densities=DENSITIES[:1])
    else:
        chosen = (options.cases, options.layers, options.densities, options.precisions)
        plan = Plan(False, options.batch, options.repeats, *map(tuple, chosen))
    print(f"{device.device_kind}, JAX {jax.__version__}, {plan.pallas}")
    if plan.dry:
        print("Dry run: the kernels are interpreted, and no time below says anything about a GPU.")
    report: dict[str, Any] = dict(device=device.device_kind, jax=jax.__version__, dry_run=plan.dry)
    for name in options.parts:
        start, rows = time.perf_counter(), []
        report[name] = rows
        print(f"\n== {name}")
        for row in results(list(PARTS[name](plan))):
            rows.append(row)
            print(told(row), flush=True)
            write(report, options.out)
        if name == "products":
            rows += list(fastest(rows))
        report[f"{name}_s"] = time.perf_counter() - start
        write(report, options.out)
    failed = [row for name in options.parts for row in report[name] if not row.get("ok", True)]
    print(f"\n{len(failed)} failed" if failed else "\nall passed")
    for row in failed:
        print("  " + told(row))
    sys.exit(bool(failed))


def results(jobs: list[Job]) -> Iterator[Row]:
    """What all jobs found; JAX's settings are each thread's own.

    Four compile at a time: more would wait for each other, since the compiler times tiles on the
    device. Nothing compiles while something is timed.
    """
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for first in range(0, len(jobs), 4):
            some = jobs[first : first + 4]
            for job, prepared in zip(some, list(pool.map(Job.prepared, some)), strict=True):
                yield job.measured(prepared)


def write(report: dict[str, Any], out: Path | None) -> None:
    """The report as it is by now."""
    if out:
        out.write_text(json.dumps(report, indent=1) + "\n")


def told(row: Row) -> str:
    """A row in one line."""
    short = lambda v: f"{v:.3g}" if isinstance(v, float) else str(v)
    return "  ".join(f"{k}={short(v)}" for k, v in row.items() if v is not None)[:600]


def times(plan: Plan, function: Callable[..., Any], *batches: tuple[Any, ...]) -> Row:
    """Seconds of a compiled function; see the head of this file."""
    for arguments in batches:  # warm up
        jax.block_until_ready(function(*arguments))
    seconds = []
    for _, arguments in zip(range(plan.repeats), itertools.cycle(batches), strict=False):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        seconds.append(time.perf_counter() - start)
    start = time.perf_counter()
    jax.block_until_ready([function(*batches[0]) for _ in range(plan.repeats)])
    row = (time.perf_counter() - start) / plan.repeats
    return dict(wall_s=statistics.median(seconds), row_s=row, **on_device(function, batches[0]))


def on_device(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Row:
    """Time of the device alone, launches, and what takes longest; nothing if JAX cannot tell."""
    if jax.devices()[0].platform != "gpu":
        return {}
    try:
        from jax._src.lib import mosaic_gpu  # the public profiler takes no function of Equinox

        cupti: Any = vars(mosaic_gpu)["_mosaic_gpu_ext"]
        jax.block_until_ready(function(*arguments))
        cupti._cupti_init()
        try:
            jax.block_until_ready(function(*arguments))
        finally:
            launches = cupti._cupti_get_timings(True)
        totals: dict[str, list[float]] = {}
        for name, milliseconds in launches or ():
            totals.setdefault(name, []).append(milliseconds)
        longest = sorted(totals.items(), key=lambda item: -sum(item[1]))[:12]
        return dict(
            device_s=sum(map(sum, totals.values())) / 1e3,
            launches=len(launches or ()),
            longest=[f"{name[:60]} {len(ms)}x {sum(ms):.4f} ms" for name, ms in longest],
        )
    except Exception as error:  # a private module, which may not be there
        print(f"  no device time: {type(error).__name__}: {error}"[:200])
        return {}


def error_of(found: Any, expected: Any) -> float:
    """The largest difference of some arrays, as a share of the largest entry of each."""
    worst = 0.0
    for mine, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        mine, right = np.asarray(mine, np.float64), np.asarray(right, np.float64)
        largest = np.abs(right).max(initial=0.0) or 1.0
        difference = np.abs(mine - right).max(initial=0.0) / largest
        worst = max(worst, float(difference) if np.isfinite(difference) else np.inf)
    return worst


def rates(plan: Plan) -> Iterator[Job]:
    """The speed of a plain matrix product and of a plain copy on this device."""
    size = 256 if plan.dry else 8192
    random = lambda dtype: jax.random.normal(jax.random.key(0), (size, size)).astype(dtype)
    for name, dtype, precision in (
        ("bfloat16", jnp.bfloat16, "bfloat16"),
        ("tf32", jnp.float32, "tensorfloat32"),
        ("float32", jnp.float32, "float32"),
    ):

        def product(dtype=dtype, precision=precision) -> Any:
            with jax.default_matmul_precision(precision):
                return jax.jit(lambda x, y: x @ y).lower(*2 * [random(dtype)]).compile()

        def rate(compiled: Any, dtype=dtype) -> Row:
            x = random(dtype)
            seconds = times(plan, compiled, (x, x))["wall_s"]
            return dict(tflops=2 * size**3 / seconds / 1e12)

        yield Job(dict(what=f"matmul {name}"), product, rate)

    def bandwidth(compiled: Any) -> Row:
        x = random(jnp.float32)
        return dict(gbytes=2 * x.nbytes / times(plan, compiled, (x,))["wall_s"] / 1e9)

    copy = lambda: jax.jit(lambda x: x + 1).lower(random(jnp.float32)).compile()
    yield Job(dict(what="copy"), copy, bandwidth)


def steps(plan: Plan) -> Iterator[Job]:
    """Whole steps at batch 64, 3 %, beside the host's."""
    for case, (kernel, sketch) in itertools.product(
        plan.cases, (("active", None), ("ambient", None), ("active", 2))
    ):
        for precision in plan.precisions if (kernel, sketch) == ("active", None) else ("float32",):
            row: Row = dict(case=case, kernel=kernel, sketch=sketch, precision=precision)
            if case in GOALS and (kernel, sketch, precision) == ("active", None, "float32"):
                row["goal_s"] = GOALS[case]
            what = (64 if not plan.dry else 4, case, kernel, sketch)
            prepare = functools.partial(_compiled_step, what, precision)
            yield Job(row, prepare, functools.partial(_timed_step, plan, precision))


Step = tuple[int, str, Any, int | None]  # samples, case, kernel, sketch_size
_ON_THE_HOST = threading.Lock()


def _arguments(what: Step, precision: Precision) -> tuple[ntt.NTTState, Any]:
    """State and batch of a step, made on the host: a device would round some of it otherwise."""
    samples, case, kernel, sketch = what
    config = ntt.NTTConfig(density=0.03, kernel=kernel, precision=precision)
    if sketch is not None:
        config = dataclasses.replace(config, outputs="sketch", sketch_size=sketch)
    with jax.default_device(jax.devices("cpu")[0]):
        teacher = CASES[case].teacher(jax.random.key(0))
        state = ntt.ntt_init(teacher, config, optax.adam(5e-4))
        return state, CASES[case].samples(jax.random.key(1), samples)


def _compiled_step(what: Step, precision: Precision) -> Any:
    arrays, static = eqx.partition(_arguments(what, precision), eqx.is_array)
    arguments = eqx.combine(jax.device_put(arrays, jax.devices()[0]), static)
    step = eqx.filter_jit(ntt.ntt_step).lower(*arguments).compile()
    with _ON_THE_HOST:
        return step, arguments, _expected_step(what)


@functools.cache
def _expected_step(what: Step) -> Any:
    """The same by the host in float64; in float32 along directions, which are other ones there."""
    (state, x), (*_, sketch) = _arguments(what, "float32"), what
    with jax.default_device(jax.devices("cpu")[0]), jax.enable_x64(sketch is None):
        if sketch is None:
            widened = lambda a: a.astype(jnp.float64) if eqx.is_inexact_array(a) else a
            state, x = jax.tree.map(widened, state), widened(x)
        return _loss_and_gradient(*eqx.filter_jit(ntt.ntt_step)(state, x))


def _loss_and_gradient(state: ntt.NTTState, metrics: ntt.NTTMetrics) -> Any:
    """Of a first step, whose gradient Adam's first moment is a tenth of."""
    moment = optax.tree_utils.tree_get(state.opt_state, "mu")
    found = (metrics.loss, metrics.kernel_distance, metrics.target_distance)
    return jax.device_get((found, jax.tree.leaves(moment)))


def _timed_step(plan: Plan, precision: Precision, prepared: Any) -> Row:
    step, arguments, expected = prepared
    error = error_of(_loss_and_gradient(*step(*arguments)), expected)
    found = times(plan, step, arguments)
    first, *others = (jax.device_get(jax.tree.leaves(step(*arguments))) for _ in range(5))
    found["same_bits"] = all(
        x.tobytes() == y.tobytes() for other in others for x, y in zip(first, other, strict=True)
    )
    memory = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return found | dict(error=error, ok=error < STEP_ERRORS[precision], peak_bytes=memory)


def products(plan: Plan) -> Iterator[Job]:
    """The masked product by layer, density and implementation."""
    for density, layer in itertools.product(plan.densities, plan.products):
        layer = dataclasses.replace(layer, density=density)
        expected = functools.cache(functools.partial(_expected, layer))
        for precision in plan.precisions if density == plan.densities[0] else ("float32",):
            for mask, name in itertools.product(("whole", "gathered"), ("reference", plan.pallas)):
                yield _product(plan, layer, expected, precision, mask, name)


def fastest(rows: list[Row]) -> Iterator[Row]:
    """The fastest correct choice for each layer, density and precision."""
    key = lambda row: (row["case"], row["density"], row["precision"])
    for what, group in itertools.groupby(rows, key):
        right = [row for row in group if row["ok"]]
        best: Row = dict(zip(("case", "density", "precision"), what, strict=True))
        plain = [row for row in right if row["implementation"] == "reference"]
        for name in ("forward", "gradient") if plain else ():
            first = min(right, key=lambda row, name=name: row[f"{name}_s"])
            best[name] = f"{first['implementation']}, {first['mask']}"
            best[f"{name}_times_xla"] = min(r[f"{name}_s"] for r in plain) / first[f"{name}_s"]
        print(told(best), flush=True)
        yield best


def edges(plan: Plan) -> Iterator[Job]:
    """Sizes around the kernels' tiles."""
    layers = [dataclasses.replace(e, n=3, k=2) for e in EDGES[:1]] if plan.dry else EDGES
    for layer in layers:
        expected = functools.cache(functools.partial(_expected, layer))
        for mask in ("whole", "gathered"):
            for precision in plan.precisions:
                yield _product(plan, layer, expected, precision, mask, plan.pallas)


def _product(
    plan: Plan,
    layer: Product,
    expected: Callable[[], Any],
    precision: Precision,
    mask: str,
    implementation: str,
) -> Job:
    layer = dataclasses.replace(layer, mask=mask)
    row: Row = dict(case=layer.name, n=layer.n, density=layer.density, precision=precision)
    row |= dict(mask=mask, implementation=implementation)

    def prepare() -> Any:
        call = functools.partial(
            kernels.masked_ntk, precision=precision, implementation=implementation
        )
        batch = layer.inputs(0)
        return jax.jit(call).lower(*batch).compile(), _with_gradient(call).lower(*batch).compile()

    def measure(prepared: Any) -> Row:
        forward, both = prepared
        batches = [layer.inputs(seed) for seed in range(2 if plan.dry else 3)]
        error = error_of(both(*batches[0]), expected())
        ahead, back = times(plan, forward, *batches), times(plan, both, *batches)
        seconds = ahead.get("device_s") or ahead["row_s"]
        return dict(
            forward_s=seconds,
            gradient_s=back.get("device_s") or back["row_s"],
            forward_row_s=ahead["row_s"],
            gradient_row_s=back["row_s"],
            forward_wall_s=ahead["wall_s"],
            gradient_wall_s=back["wall_s"],
            tflops=layer.flops() / seconds / 1e12,
            temporary_bytes=getattr(both.memory_analysis(), "temp_size_in_bytes", 0),
            error=error,
            ok=error < PRECISIONS[precision],
            launches=back.get("launches"),
            longest=back.get("longest"),
        )

    return Job(row, prepare, measure)


def _expected(layer: Product) -> Any:
    """The product and its gradients by pure JAX in float64, from the same factors."""
    *factors, mask = dataclasses.replace(layer, mask="whole").inputs(0)
    with jax.enable_x64(True):
        wide = [factor.astype(jnp.float64) for factor in factors]
        call = functools.partial(kernels.masked_ntk, implementation="reference")
        return jax.device_get(_with_gradient(call)(*wide, mask))


def _with_gradient(call: Callable[..., Any]) -> Any:
    @jax.jit
    def function(*arguments: Any) -> Any:
        *factors, mask = arguments
        theta, pull_back = jax.vjp(lambda *factors: call(*factors, mask), *factors)
        weights = jnp.cos(jnp.arange(theta.size)).reshape(theta.shape)
        return theta, *pull_back(weights.astype(theta.dtype))

    return function


def repeats(plan: Plan) -> Iterator[Job]:
    """Whether runs on the same inputs give the same bits."""
    (layer, *_), count = plan.products, 3 if plan.dry else 100
    for mask, implementation in itertools.product(
        ("whole", "gathered"), ("reference", plan.pallas)
    ):
        layer = dataclasses.replace(layer, mask=mask)
        call = functools.partial(kernels.masked_ntk, implementation=implementation)

        def prepare(call=call, layer=layer) -> Any:
            return _with_gradient(call).lower(*layer.inputs(0)).compile()

        def measure(run: Any, layer=layer) -> Row:
            inputs = layer.inputs(0)
            first = jax.device_get(run(*inputs))
            same = [
                all(map(np.array_equal, first, jax.device_get(run(*inputs)))) for _ in range(count)
            ]
            return dict(same=sum(same), ok=all(same))

        row = dict(case=layer.name, mask=mask, implementation=implementation, runs=count)
        yield Job(row, prepare, measure)


def memory(plan: Plan) -> Iterator[Job]:
    """Memory of a kernel beside inputs and result, against `max_bytes`."""
    case, count, budgets = CASES["lenet300100"], 1024, (2**26, 2**28, 2**30)
    if plan.dry:
        count, budgets = 8, (2**24,)
    model = ntt.sparsify(case.teacher(jax.random.key(0)))
    model = model.with_mask(ntt.make_mask(ntt.scores.Magnitude()(model), 0.03))
    x = case.samples(jax.random.key(1), count)
    for budget in budgets:

        def prepare(budget=budget) -> int:
            call = functools.partial(ntt.ntk, outputs="trace", max_bytes=budget)
            compiled = eqx.filter_jit(call).lower(model, x).compile().compiled
            return compiled.memory_analysis().temp_size_in_bytes

        def measure(taken: int, budget=budget) -> Row:
            return dict(temporary_bytes=taken, share=taken / budget, ok=taken <= 1.25 * budget)

        yield Job(dict(samples=count, max_bytes=budget), prepare, measure)


def convolutions(plan: Plan) -> Iterator[Job]:
    """Every convolution of an active step, alone, beside float64."""
    for case in ("lenet5",) if plan.dry else plan.cases:
        teacher = CASES[case].teacher(jax.random.key(0))
        x = CASES[case].samples(jax.random.key(1), 4 if plan.dry else 64)
        if plan.dry:  # on a CPU a step has none
            program = eqx.filter_make_jaxpr(eqx.filter_vmap(teacher))(x)[0]
        else:
            state = ntt.ntt_init(teacher, ntt.NTTConfig(density=0.03), optax.adam(5e-4))
            program = eqx.filter_make_jaxpr(ntt.ntt_step)(state, x)[0]
        kinds: dict[str, list[Any]] = {}
        for eqn in _equations(program.jaxpr):
            if eqn.primitive.name == "conv_general_dilated":
                kinds.setdefault(f"{[v.aval for v in eqn.invars]} {eqn.params}", []).append(eqn)
        for eqn, *again in kinds.values():
            sizes = [v.aval.shape for v in eqn.invars]
            row: Row = dict(case=case, image=sizes[0], kernel=sizes[1], times=1 + len(again))
            inputs = [jax.random.normal(jax.random.key(n), size) for n, size in enumerate(sizes)]
            prepare = jax.jit(functools.partial(eqn.primitive.bind, **eqn.params)).lower(*inputs)
            measure = functools.partial(_measured_convolution, plan, eqn, inputs)
            yield Job(row, prepare.compile, measure)


def _equations(jaxpr: Any) -> Iterator[Any]:
    """The equations of a program, and those inside of them."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inside in jaxprs_in_params(eqn.params):
            yield from _equations(inside)


def _measured_convolution(plan: Plan, eqn: Any, inputs: list[Any], compiled: Any) -> Row:
    with jax.enable_x64(True):
        params = eqn.params | dict(preferred_element_type=jnp.float64)
        wide = jax.jit(functools.partial(eqn.primitive.bind, **params))
        error = error_of(compiled(*inputs), wide(*(a.astype(jnp.float64) for a in inputs)))
    text = compiled.as_text()
    calls = re.findall(r'custom_call_target="__cudnn\$(\w+)"', text)
    algorithms = re.findall(r'"algo_id":"(\d+)"', text)
    found = dict(call=" ".join(calls), algorithm=" ".join(algorithms), error=error)
    return found | times(plan, compiled, tuple(inputs)) | dict(ok=error < PRECISIONS["float32"])


PARTS: dict[str, Callable[[Plan], Iterator[Job]]] = {
    "rates": rates,
    "steps": steps,
    "products": products,
    "repeats": repeats,
    "memory": memory,
    "edges": edges,
    "convolutions": convolutions,
}


if __name__ == "__main__":
    main()
