"""Cost of a transfer step on each of many devices, beside one, by the compiler's own count.

    python benchmarks/on_devices.py --devices 8 --out devices.json

Nothing needs to be there but a CPU, which is told to be so many devices. For each case the step is
compiled for one and for all. `flops` (those of products, loops counted as often as they turn) and
`temp` (temporary bytes) are shares of what one device does and takes alone, a device; the
collectives are those of the compiled program, with their bytes. One step is run on both: `loss` is
how far they differ, as a share.
"""

import argparse
import dataclasses
import json
import pathlib
import re
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from cases import CASES
from chips import CHIPS
from chips.program import Program
from jax.sharding import NamedSharding, PartitionSpec

import ntt_eqx as ntt

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
ITEM_BYTES = {"f64": 8, "s64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "pred": 1}


@dataclasses.dataclass(frozen=True)
class Step:
    """A step by its model and settings."""

    name: str
    case: str
    settings: dict[str, Any]
    batch: int = 128


STEPS = (
    Step("MLP, gathered", "lenet300100", {"density": 0.03}),
    Step("MLP, whole mask", "lenet300100", {"density": 0.3}),
    Step("MLP, ambient", "lenet300100", {"density": 0.03, "kernel": "ambient"}),
    Step(
        "MLP, sketch of 2", "lenet300100", {"density": 0.03, "outputs": "sketch", "sketch_size": 2}
    ),
    Step("MLP, 2 x 33 samples", "lenet300100", {"density": 0.03}, 66),
    Step("CNN, gathered", "lenet5", {"density": 0.03}),
    Step("CNN, sketch of 2", "lenet5", {"density": 0.03, "outputs": "sketch", "sketch_size": 2}),
)


def main() -> None:
    """Measure and print a row a step."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument(
        "--steps", nargs="*", type=int, help="their numbers, from 0; all by default"
    )
    parser.add_argument("--out", type=pathlib.Path, help="write all rows here, as JSON")
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", options.devices)
    print(f"{'step':20} {'devices':>7} {'flops':>6} {'temp':>6} {'loss':>8}  collectives (KiB)")
    rows = []
    for number, step in enumerate(STEPS):
        if options.steps is None or number in options.steps:
            rows.append(row_of(step, options.devices))
            print(line_of(rows[-1]), flush=True)
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")


def row_of(step: Step, devices: int) -> dict[str, Any]:
    """The costs of one step on one device and on all."""
    one = compiled(step, jnp.asarray)
    with ntt.distribute() as mesh:
        everywhere = NamedSharding(mesh, PartitionSpec())
        many = compiled(step, lambda x: jax.device_put(x, everywhere))
    return {
        "step": step.name,
        "batch": step.batch,
        "devices": devices,
        "flops": many["flops"] / one["flops"],
        "temp": many["temp"] / one["temp"],
        "loss": abs(many["loss"] - one["loss"]) / abs(one["loss"]),
        "collectives": many["collectives"],
        "one": {name: one[name] for name in ("flops", "temp")},
    }


def compiled(step: Step, put: Callable[[Any], Any]) -> dict[str, Any]:
    """FLOPs and temporary bytes of a device, collectives, and the loss of one run."""
    case = CASES[step.case]
    teacher = case.teacher(jax.random.key(0))
    config = ntt.NTTConfig(**step.settings)
    state = ntt.ntt_init(teacher, config, optax.adam(5e-4))
    x = np.random.default_rng(1).normal(size=(step.batch, *case.input_shape))
    x = put(x.astype(np.float32))
    arrays, static = eqx.partition(state, eqx.is_array)

    @jax.jit
    def run(arrays: Any, x: Any) -> Any:
        state, metrics = ntt.ntt_step(eqx.combine(arrays, static), x)
        return eqx.filter(state, eqx.is_array), metrics

    program: Any = run.lower(arrays, x).compile()
    return {
        "flops": Program(program.as_text(), CHIPS["h100"]).counts().flops,
        "temp": program.memory_analysis().temp_size_in_bytes,
        "collectives": collectives(program.as_text()),
        "loss": float(program(arrays, x)[1].loss),
    }


def collectives(text: str) -> dict[str, list[int]]:
    """For each kind of collective of a compiled program: how many, and their bytes."""
    found: dict[str, list[int]] = {}
    for line in text.splitlines():
        match = re.search(r" = (.*?) (" + "|".join(COLLECTIVES) + r")(?:-start)?\(", line)
        if match:
            sizes = re.findall(r"(\w+)\[([\d,]*)\]", match[1])
            count = found.setdefault(match[2], [0, 0])
            count[0] += 1
            for kind, dims in sizes:
                shape = [int(d) for d in dims.split(",") if d]
                count[1] += ITEM_BYTES.get(kind, 4) * int(np.prod(shape))
    return found


def line_of(row: dict[str, Any]) -> str:
    """A row as text."""
    sums = ", ".join(
        f"{n} {kind} ({size / 1024:.0f})" for kind, (n, size) in row["collectives"].items()
    )
    shares = f"{row['flops']:6.3f} {row['temp']:6.3f} {row['loss']:8.1e}"
    return f"{row['step']:20} {row['devices']:7} {shares}  {sums}"


if __name__ == "__main__":
    main()
