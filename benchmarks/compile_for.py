r"""Compile kernels and whole steps for a chip that is not there, and count what its compiler made.

    pip install 'ntt-eqx[compile]'                                  # Python >= 3.12, no GPU needed
    python benchmarks/compile_for.py h100 lenet300100 lenet5 conv4
    python benchmarks/compile_for.py tpu-v5e conv4 --kernel active --out conv4.json
    python benchmarks/compile_for.py h100 masked_ntk:conv4_8192 --batch 256
    python benchmarks/compile_for.py h100 --model net.py:make_model --input-shape 3 32 32
    python benchmarks/compile_for.py h100 --devices 8 --sketch 8 \
        --model benchmarks/large_models.py:vit_b --input-shape 3 224 224

A case is a model of `cases.py` (its whole `ntt_step`); `masked_ntk:LAYER` with a layer of
`products.py` (the product, and the product with its gradients, by every implementation that takes
it); or a function that returns an Equinox model, called without arguments or with `key=`.

Nothing runs, so there are no values and no times. The time that is printed is a roofline: the sum
over launches of what takes longest, the launch itself, its products at the rate of the units that
compute them, or its traffic at the rate of the memory (`chips/__init__.py` has the figures). FLOPs
count products alone. `launches` is a step without a refresh of the mask, `refresh` one with it.
"""

import argparse
import dataclasses
import functools
import importlib.util
import inspect
import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nothing here takes a TPU
# A check of values calls back to the host, which takes a device; its program is left out.
os.environ.setdefault("EQX_ON_ERROR", "nan")

import equinox as eqx  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402
from cases import CASES, Case  # noqa: E402
from chips import CHIPS, Target  # noqa: E402
from chips.kernels import recorded  # noqa: E402
from chips.program import Program  # noqa: E402
from jax.sharding import use_abstract_mesh  # noqa: E402
from products import LAYERS, PRECISIONS, Product  # noqa: E402

import ntt_eqx as ntt  # noqa: E402
from ntt_eqx.kernels import masked_ntk  # noqa: E402

PRODUCT: Any = masked_ntk
PIECE_PRODUCTS = {"bfloat16": 1, "tf32": 2, "float32": 3}  # of a 0/1 mask with a split operand


def main():
    options = parse()
    target = Target(CHIPS[options.chip], options.devices, options.option)
    print(f"{options.devices} x {target.kind}, JAX {jax.__version__}; roofline, nothing was run")
    header()
    rows = []
    for case in options.cases:
        rows += (
            product_rows(target, case, options)
            if ":" in case
            else step_rows(target, case, CASES[case].model, CASES[case].input_shape, options)
        )
    if options.model:
        rows += step_rows(target, options.model, None, tuple(options.input_shape), options)
    if options.out:
        report = dict(chip=options.chip, device=target.kind, jax=jax.__version__, rows=rows)
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    sys.exit(any(row.get("error") for row in rows))


def parse():
    parser = argparse.ArgumentParser(description="Compile for a chip that is not there.")
    parser.add_argument("chip", choices=tuple(CHIPS))
    parser.add_argument("cases", nargs="*", metavar="CASE")
    parser.add_argument("--model", metavar="FILE.py:FUNCTION", help="a model of your own")
    parser.add_argument("--input-shape", type=int, nargs="+", help="of one sample of that model")
    parser.add_argument("--devices", type=int, default=1, help="under ntt.distribute()")
    parser.add_argument("--sketch", type=int, metavar="R", help="a step by R random directions")
    parser.add_argument("--batch", type=int, default=64, help="of a step; N = M of a product")
    parser.add_argument("--density", type=float, default=0.03)
    parser.add_argument("--kernel", nargs="*", choices=("active", "ambient"), default=["active"])
    parser.add_argument("--precision", nargs="*", choices=tuple(PRECISIONS), default=["float32"])
    parser.add_argument("--mask", nargs="*", choices=("whole", "gathered"), default=["whole"])
    parser.add_argument("--implementation", nargs="*", help="of a product; all by default")
    parser.add_argument(
        "--option",
        nargs="*",
        default=[],
        metavar="NAME=VALUE",
        help="of the compiler, as xla_gpu_enable_split_k_autotuning=false",
    )
    parser.add_argument("--out", type=Path, help="write all rows here, as JSON")
    options = parser.parse_args()
    options.option = dict(pair.partition("=")[::2] for pair in options.option)
    layers = {f"masked_ntk:{name}" for name, _ in LAYERS}
    unknown = [c for c in options.cases if c not in CASES and c not in layers]
    if unknown:
        parser.error(f"no case {unknown[0]!r}; choose from {sorted(CASES)} and {sorted(layers)}")
    if not options.cases and not options.model:
        parser.error("name a case, or a model by --model")
    if options.model and not options.input_shape:
        parser.error("--model needs --input-shape, the shape of one sample")
    return options


def step_rows(target, name, model, shape, options) -> list[dict[str, Any]]:
    """A whole `ntt_step`, one row a kind of kernel and precision."""
    if model is None:
        teacher = own_model(name)
    else:
        teacher = Case(model, shape).teacher(jax.random.key(0))
    rows = []
    for kernel, precision in itertools.product(options.kernel, options.precision):
        config = ntt.NTTConfig(
            density=options.density,
            kernel=kernel,
            outputs="full" if options.sketch is None else "sketch",
            sketch_size=options.sketch or 8,
            precision=precision,
        )
        with use_abstract_mesh(target.mesh.abstract_mesh):  # what a state holds follows its device
            state = ntt.ntt_init(teacher, config, optax.adam(5e-4))
        arrays, static = eqx.partition(state, eqx.is_array)

        def step(arrays, x, static=static):
            state, metrics = ntt.ntt_step(eqx.combine(arrays, static), x)
            changed = (state.student, state.opt_state, state.step, state.support)
            return eqx.filter(changed, eqx.is_array), metrics  # as `transfer` runs it

        x = jax.ShapeDtypeStruct((options.batch, *shape), jnp.float32)
        row = dict(case=name, kernel=kernel, batch=options.batch, density=options.density)
        row |= dict(devices=options.devices, sketch=options.sketch, precision=precision)
        rows.append(measured(row, f"{name} {kernel} {precision}", target, step, arrays, x))
    return rows


def own_model(place: str) -> Any:
    """What the function of `FILE.py:FUNCTION` returns."""
    path, _, function = place.rpartition(":")
    spec = importlib.util.spec_from_file_location("own_model", path)
    if not path or spec is None or spec.loader is None:
        sys.exit(f"--model: {place!r} is not FILE.py:FUNCTION")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    make = getattr(module, function)
    takes_key = "key" in inspect.signature(make).parameters
    return make(key=jax.random.key(0)) if takes_key else make()


def product_rows(target, name, options) -> list[dict[str, Any]]:
    """A product alone, and with the gradients of all four factors, by implementation."""
    layer_name = name.split(":")[1]
    pallas = "pallas_gpu" if target.chip.platform == "cuda" else "pallas_tpu"
    rows = []
    for mask, precision, implementation in itertools.product(
        options.mask, options.precision, options.implementation or ("reference", pallas)
    ):
        sizes = dict(LAYERS)[layer_name]
        layer = Product(layer_name, options.batch, **sizes, density=options.density, mask=mask)
        inputs = jax.eval_shape(lambda layer=layer: layer.inputs(0))
        call = functools.partial(PRODUCT, precision=precision, implementation=implementation)

        def with_gradient(*args, call=call):
            *factors, mask = args
            theta, pull_back = jax.vjp(lambda *factors: call(*factors, mask), *factors)
            return theta, pull_back(theta)

        for direction, function in (("forward", call), ("gradient", with_gradient)):
            row = dict(case=name, batch=layer.n, mask=mask, density=options.density)
            row |= dict(precision=precision, direction=direction, implementation=implementation)
            title = f"{name} {mask} {implementation} {precision} {direction}"
            row = measured(row, title, target, function, *inputs, shown=False)
            if implementation.startswith("pallas") and "error" not in row:
                gathered = mask == "gathered"  # of which the kernels make u alone, and pull it back
                flops = 2 * layer.n**2 * layer.nonzeros if gathered else layer.flops()
                flops *= 1 if direction == "forward" else 3
                row["flops"] += flops
                rate = 1e12 * target.chip.tflops / PIECE_PRODUCTS[precision]
                row["roofline_s"] += flops / rate
            show(title, row)
            rows.append(row)
    return rows


def measured(row, title, target, function, *inputs, shown=True) -> dict[str, Any]:
    """`row` with what the compiler made of `function`, or with its error."""
    start = time.perf_counter()
    try:
        with recorded() as kernels:
            compiled = target.compile(function, *inputs)
    except Exception as error:  # a case that does not compile is a result
        row["error"] = f"{type(error).__name__}: {error}"[:2000]
        print(f"{title:58} {row['error'][:120]}", flush=True)
        return row
    row["compile_s"] = round(time.perf_counter() - start, 1)
    program = Program(compiled.as_text(), target.chip)
    memory = compiled.memory_analysis()
    usual, refresh = program.counts(min), program.counts(max)
    row |= dict(
        launches=usual.launches,
        refresh_launches=refresh.launches,
        loops=[dataclasses.asdict(loop) for loop in program.loops()],
        temporary_bytes=memory.temp_size_in_bytes,
        peak_bytes=memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes,
        flops=usual.flops,
        bytes=usual.bytes,
        roofline_s=usual.seconds,
        sent=program.sent(),
        kernels=[dataclasses.asdict(kernel) for kernel in kernels],
    )
    if shown:
        show(title, row)
    return row


def header():
    print(
        f"{'case':58} {'launches':>8} {'refresh':>7} {'loops (trips x launches)':26} {'temp':>8} "
        f"{'peak':>8} {'GFLOP':>7} {'GB':>7} {'time':>9}"
    )


def show(title: str, row: dict[str, Any]) -> None:
    if "error" in row:
        return
    loops = " ".join(f"{loop['trips']}x{loop['launches']}" for loop in row["loops"][:5])
    loops += " .." if len(row["loops"]) > 5 else ""
    print(
        f"{title:58} {row['launches']:8} {row['refresh_launches']:7} {loops or '-':26} "
        f"{row['temporary_bytes'] / 2**20:6.1f}Mi {row['peak_bytes'] / 2**20:6.1f}Mi "
        f"{row['flops'] / 1e9:7.2f} {row['bytes'] / 1e9:7.2f} {row['roofline_s'] * 1e3:7.3f}ms",
        flush=True,
    )
    for name, (count, size) in row["sent"].items():
        print(f"    {name:32} {count:3} of {size / 2**20:8.1f} MiB", flush=True)
    for kernel in row["kernels"]:
        faults = " SERIALISED" * kernel["serialised"]
        faults += f" SPILLS {kernel['spilled_bytes']} bytes" * bool(kernel["spilled_bytes"])
        print(
            f"    {kernel['name']:32} {kernel['registers']:3} registers, "
            f"{kernel['shared_bytes'] / 1024:5.1f} KiB shared{faults}",
            flush=True,
        )


if __name__ == "__main__":
    main()
