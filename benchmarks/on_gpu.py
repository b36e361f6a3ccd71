"""Values, gradients and times of every GPU path, those first that decide most.

    python benchmarks/on_gpu.py --out on_gpu.json          # on a GPU
    python benchmarks/on_gpu.py --dry-run                  # on any machine: small, interpreted

In this order, with the report written after each part, so that a run that is cut off leaves what it
has: what the device reaches by plain products and copies; whole `ntt_step`s and `ntk`s; the masked
product by layer and by density, whole and gathered, by pure JAX and by Pallas, with the fastest
that is right named; whether a hundred runs give the same bits; memory against
`max_bytes`; the edges of the kernels' tiles.

Values and gradients are compared with pure JAX in float64 at the sizes that are timed. `wall` is
the median of calls that each wait for their result, `device` the time of the device alone (by
CUPTI, where JAX offers it), `row` that of a call among many which are waited for together.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from cases import CASES
from products import LAYERS, PRECISIONS, Product

import ntt_eqx as ntt
from ntt_eqx import kernels
from ntt_eqx.kernels import Precision

DENSITIES = (0.03, 0.1, 0.01, 0.3, 1.0)
# Seconds that a whole active step at batch 64, 3 %, may take on an H100.
GOALS = {"lenet300100": 1e-3, "lenet5": 3e-3, "conv4": 15e-3}
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
    """What a run does: the whole, or small and interpreted."""

    dry: bool
    batch: int
    repeats: int

    @property
    def pallas(self) -> str:
        """The kernels' name."""
        return "pallas_gpu_interpret" if self.dry else "pallas_gpu"

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """Of the products."""
        return ("float32",) if self.dry else kernels.PRECISIONS

    @property
    def layers(self) -> list[Product]:
        """Those of the paper's networks, at 3 %."""
        if self.dry:
            return [Product("dense", 3, 20, 40, k=2)]
        return [Product(name, self.batch, **sizes, density=0.03) for name, sizes in LAYERS]


def main() -> None:
    parser = argparse.ArgumentParser(description="Check and time everything on a GPU.")
    parser.add_argument("--dry-run", action="store_true", help="small cases, interpreted")
    parser.add_argument("--out", type=Path, help="write the results here, as JSON")
    parser.add_argument("--batch", type=int, default=256, help="N = M of a product")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--parts", nargs="*", choices=tuple(PARTS), default=list(PARTS))
    options = parser.parse_args()
    device = jax.devices()[0]
    if device.platform != "gpu" and not options.dry_run:
        sys.exit(f"No GPU here ({device.device_kind}); --dry-run goes through the motions.")
    plan = Plan(options.dry_run, options.batch, 2 if options.dry_run else options.repeats)
    print(f"{device.device_kind}, JAX {jax.__version__}, {plan.pallas}")
    if plan.dry:
        print("Dry run: the kernels are interpreted, and no time below says anything about a GPU.")
    report: dict[str, Any] = dict(device=device.device_kind, jax=jax.__version__, dry_run=plan.dry)
    for name in options.parts:
        start, rows = time.perf_counter(), []
        report[name] = rows
        print(f"\n== {name}")
        for row in PARTS[name](plan):
            rows.append(row)
            print(told(row), flush=True)
        report[f"{name}_s"] = time.perf_counter() - start
        if options.out:
            options.out.write_text(json.dumps(report, indent=1) + "\n")
    failed = [row for name in options.parts for row in report[name] if not row.get("ok", True)]
    print(f"\n{len(failed)} failed" if failed else "\nall passed")
    for row in failed:
        print("  " + told(row))
    sys.exit(bool(failed))


def told(row: Row) -> str:
    """A row in one line."""
    short = lambda v: f"{v:.3g}" if isinstance(v, float) else str(v)
    return "  ".join(f"{k}={short(v)}" for k, v in row.items() if v is not None)[:300]


def attempted(row: Row, measure: Callable[[], Row]) -> Row:
    """`row` with what was measured, or with its error: one that fails must not hide the others."""
    try:
        return row | measure()
    except Exception as error:
        traceback.print_exc()
        return row | dict(ok=False, error=f"{type(error).__name__}: {error}"[:500])


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
    return dict(wall_s=statistics.median(seconds), row_s=row, device_s=on_device(function, batches))


def on_device(function: Callable[..., Any], batches: tuple[tuple[Any, ...], ...]) -> float | None:
    """The time of the device alone, or nothing where JAX cannot tell."""
    if jax.devices()[0].platform != "gpu":
        return None
    try:
        from jax.experimental.mosaic.gpu import profiler

        _, milliseconds = profiler.measure(function)(*batches[0])
        return milliseconds / 1e3 if milliseconds else None
    except Exception as error:  # an experimental module, which may not be there
        print(f"  no device time: {type(error).__name__}: {error}"[:200])
        return None


def error_of(found: Any, expected: Any) -> float:
    """The largest difference of some arrays, as a share of the largest entry of each."""
    worst = 0.0
    for mine, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        mine, right = np.asarray(mine, np.float64), np.asarray(right, np.float64)
        largest = np.abs(right).max(initial=0.0) or 1.0
        difference = np.abs(mine - right).max(initial=0.0) / largest
        worst = max(worst, float(difference) if np.isfinite(difference) else np.inf)
    return worst


def rates(plan: Plan) -> Iterator[Row]:
    """What a plain matrix product and a plain copy reach on this device."""
    size = 256 if plan.dry else 8192
    for name, dtype, precision in (
        ("bfloat16", jnp.bfloat16, "bfloat16"),
        ("tf32", jnp.float32, "tensorfloat32"),
        ("float32", jnp.float32, "float32"),
    ):
        x = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype)
        with jax.default_matmul_precision(precision):
            product = jax.jit(lambda x, y: x @ y).lower(x, x).compile()
        seconds = times(plan, product, (x, x))["wall_s"]
        yield dict(what=f"matmul {name}", tflops=2 * size**3 / seconds / 1e12)
    x = jnp.zeros((size, size), jnp.float32)
    seconds = times(plan, jax.jit(lambda x: x + 1).lower(x).compile(), (x,))["wall_s"]
    yield dict(what="copy", gbytes=2 * x.nbytes / seconds / 1e9)


def steps(plan: Plan) -> Iterator[Row]:
    """Whole steps at batch 64, 3 %, and the kernel of their student, beside float64."""
    cases = {"lenet300100": GOALS["lenet300100"]} if plan.dry else GOALS
    for case, goal in cases.items():
        for precision in plan.precisions:
            row = dict(case=case, kernel="active", precision=precision, goal_s=goal)
            yield attempted(row, functools.partial(_step, plan, case, "active", precision))
        row = dict(case=case, kernel="ambient", precision="float32")
        yield attempted(row, functools.partial(_step, plan, case, "ambient", "float32"))


def _step(plan: Plan, case: str, kernel: Literal["active", "ambient"], precision: Precision) -> Row:
    few = 4 if plan.dry else 16
    teacher = CASES[case].teacher(jax.random.key(0))
    config = ntt.NTTConfig(density=0.03, kernel=kernel, precision=precision)
    state = ntt.ntt_init(teacher, config, optax.adam(5e-4))
    x = CASES[case].samples(jax.random.key(1), 4 if plan.dry else 64)
    step = eqx.filter_jit(ntt.ntt_step)
    found = times(plan, step, (state, x))
    call = lambda model, x: ntt.ntk(model, x, x[: few // 2], kernel=kernel, precision=precision)
    evaluate = eqx.filter_jit(lambda state, x: ntt.ntt_evaluate(state, x).loss)
    mine = call(state.student, x[:few]), evaluate(state, x[:few])
    with jax.enable_x64(True):
        wide = jax.tree.map(
            lambda a: a.astype(jnp.float64) if eqx.is_inexact_array(a) else a, (state, x[:few])
        )
        error = error_of(mine, (call(wide[0].student, wide[1]), evaluate(*wide)))
    memory = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return found | dict(error=error, ok=error < 10 * PRECISIONS[precision], peak_bytes=memory)


def products(plan: Plan) -> Iterator[Row]:
    """The masked product by layer, density and implementation; the fastest that is right wins."""
    densities = DENSITIES[:1] if plan.dry else DENSITIES
    for density, layer in itertools.product(densities, plan.layers):
        layer = dataclasses.replace(layer, density=density)
        expected = _expected(layer)
        for precision in plan.precisions if density == densities[0] else ("float32",):
            rows = []
            for mask, implementation in itertools.product(
                ("whole", "gathered"), ("reference", plan.pallas)
            ):
                rows.append(_product(plan, layer, expected, precision, mask, implementation))
                yield rows[-1]
            right = [row for row in rows if row["ok"]]
            what = dict(case=layer.name, density=density, precision=precision)
            for name in ("forward_s", "gradient_s"):
                if right:
                    best = min(right, key=lambda row, name=name: row[name])
                    by = f"{best['implementation']}, {best['mask']}"
                    plain = [r[name] for r in right if r["implementation"] == "reference"]
                    what |= {name.replace("_s", ""): by}
                    if plain:
                        what |= {f"{name[:-2]}_times_xla": min(plain) / best[name]}
            yield what


def edges(plan: Plan) -> Iterator[Row]:
    """Sizes around the kernels' tiles."""
    layers = [dataclasses.replace(e, n=3, k=2) for e in EDGES[:1]] if plan.dry else EDGES
    for layer in layers:
        expected = _expected(layer)
        for mask in ("whole", "gathered"):
            for precision in plan.precisions:
                yield _product(plan, layer, expected, precision, mask, plan.pallas)


def _product(
    plan: Plan, layer: Product, expected: Any, precision: Precision, mask: str, implementation: str
) -> Row:
    layer = dataclasses.replace(layer, mask=mask)
    row: Row = dict(case=layer.name, n=layer.n, density=layer.density, precision=precision)
    row |= dict(mask=mask, implementation=implementation)

    def measure() -> Row:
        call = functools.partial(
            kernels.masked_ntk, precision=precision, implementation=implementation
        )
        batches = [layer.inputs(seed) for seed in range(2 if plan.dry else 3)]
        forward = jax.jit(call).lower(*batches[0]).compile()
        both = _with_gradient(call).lower(*batches[0]).compile()
        error = error_of(both(*batches[0]), expected)
        ahead, back = times(plan, forward, *batches), times(plan, both, *batches)
        return dict(
            forward_s=ahead["device_s"] or ahead["row_s"],
            gradient_s=back["device_s"] or back["row_s"],
            forward_wall_s=ahead["wall_s"],
            gradient_wall_s=back["wall_s"],
            tflops=layer.flops() / ahead["row_s"] / 1e12,
            temporary_bytes=getattr(both.memory_analysis(), "temp_size_in_bytes", 0),
            error=error,
            ok=error < PRECISIONS[precision],
        )

    return attempted(row, measure)


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


def repeats(plan: Plan) -> Iterator[Row]:
    """Whether runs on the same inputs give the same bits."""
    (layer, *_), count = plan.layers, 3 if plan.dry else 100
    for mask, implementation in itertools.product(
        ("whole", "gathered"), ("reference", plan.pallas)
    ):
        layer = dataclasses.replace(layer, mask=mask)
        call = functools.partial(kernels.masked_ntk, implementation=implementation)
        row = dict(case=layer.name, mask=mask, implementation=implementation, runs=count)

        def measure(call=call, layer=layer) -> Row:
            run, inputs = _with_gradient(call), layer.inputs(0)
            first = jax.device_get(run(*inputs))
            same = [
                all(map(np.array_equal, first, jax.device_get(run(*inputs)))) for _ in range(count)
            ]
            return dict(same=sum(same), ok=all(same))

        yield attempted(row, measure)


def memory(plan: Plan) -> Iterator[Row]:
    """What a kernel takes beside inputs and result, against `max_bytes`."""
    case, count, budgets = CASES["lenet300100"], 1024, (2**26, 2**28, 2**30)
    if plan.dry:
        count, budgets = 8, (2**24,)
    model = ntt.sparsify(case.teacher(jax.random.key(0)))
    model = model.with_mask(ntt.make_mask(ntt.scores.Magnitude()(model), 0.03))
    x = case.samples(jax.random.key(1), count)
    for budget in budgets:

        def measure(budget=budget) -> Row:
            call = functools.partial(ntt.ntk, outputs="trace", max_bytes=budget)
            compiled = eqx.filter_jit(call).lower(model, x).compile().compiled
            taken = compiled.memory_analysis().temp_size_in_bytes
            return dict(temporary_bytes=taken, share=taken / budget, ok=taken <= 1.25 * budget)

        yield attempted(dict(samples=count, max_bytes=budget), measure)


PARTS: dict[str, Callable[[Plan], Iterator[Row]]] = {
    "rates": rates,
    "steps": steps,
    "products": products,
    "repeats": repeats,
    "memory": memory,
    "edges": edges,
}


if __name__ == "__main__":
    main()
