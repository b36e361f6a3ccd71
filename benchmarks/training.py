"""A supervised step by `ntt_eqx.train_step` beside PyTorch's, on the same machine in the same run.

    pip install -e '.[cli]' torch
    python benchmarks/training.py --json training.json

Each side has processes of its own, in turn, so that neither's threads wait in the other's way. Both
take the same networks, batches of 64 and Adam; PyTorch runs eagerly, and compiled with --compile
(which needs a C++ compiler). Times are medians of the fastest process of each side.
"""

import argparse
import importlib
import json
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

from cases import CASES

NAMES = ("lenet300100", "lenet5", "conv4")
BATCH = 64


def main() -> None:
    """Measure every case by every side, and print a table."""
    parser = argparse.ArgumentParser(description="Training steps beside those of PyTorch.")
    parser.add_argument("--cases", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--rounds", type=int, default=3, help="processes of each side")
    parser.add_argument("--steps", type=int, default=100, help="timed steps of a process")
    parser.add_argument("--compile", action="store_true", help="torch.compile, too")
    parser.add_argument("--json", type=pathlib.Path, help="write the rows here")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        side, case = options.one
        print(json.dumps(measure(SIDES[side](case), options.steps)))
        return
    sides = [side for side in SIDES if side != "compiled" or options.compile]
    rows = []
    for case in options.cases:
        times: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(options.rounds):
            for side in sides:
                words = [sys.executable, __file__, "--one", side, case]
                words += ["--steps", str(options.steps)]
                done = subprocess.run(words, check=True, capture_output=True, text=True)
                times[side].append(json.loads(done.stdout.splitlines()[-1]))
        best = {side: min(found) for side, found in times.items()}
        rows.append({"case": case, "batch": BATCH, "median_s": times})
        ratio = best["ntt_eqx"] / best["torch"]
        shown = ", ".join(f"{side} {1e3 * value:.2f} ms" for side, value in best.items())
        print(f"{case}: {shown}; {ratio:.2f} of PyTorch's", flush=True)
    if options.json:
        versions = {name: metadata.version(name) for name in ("jax", "torch")}
        options.json.write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n")


def measure(step: Callable[[], None], steps: int) -> float:
    """The median time of a step in seconds, after ten that warm up."""
    times = []
    for number in range(steps + 10):
        start = time.perf_counter()
        step()
        if number >= 10:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def ours(case: str) -> Callable[[], None]:
    """A step as `ntt_eqx.train` makes it."""
    import equinox as eqx
    import jax
    import jax.numpy as jnp
    import optax

    import ntt_eqx as ntt

    model = CASES[case].teacher(jax.random.key(0))
    state = ntt.train_init(model, ntt.TrainConfig(), optax.adam(1e-3))
    x = CASES[case].samples(jax.random.key(1), BATCH)
    y = jnp.arange(BATCH) % 10
    by_batch = eqx.filter_jit(
        lambda batch, state: ntt.train_step(state, batch), donate="all-except-first"
    )
    held = [state]

    def step() -> None:
        held[0], _ = by_batch((x, y), held[0])
        jax.block_until_ready(held[0].step)

    return step


def torch_side(case: str, compiled: bool = False) -> Callable[[], None]:
    """The same step by PyTorch."""
    torch: Any = importlib.import_module("torch")  # not among what this project installs
    nn = torch.nn
    layers: dict[str, list[Any]] = {
        "lenet300100": [
            nn.Flatten(),
            *(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)),
        ],
        "lenet5": [
            *(nn.Conv2d(1, 20, 5), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(20, 50, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
            *(nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10)),
        ],
        "conv4": [
            *(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(64, 128, 3), nn.ReLU(), nn.Conv2d(128, 128, 3), nn.ReLU()),
            *(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(3200, 512), nn.ReLU(), nn.Linear(512, 10)),
        ],
    }
    model = nn.Sequential(*layers[case])
    run = torch.compile(model) if compiled else model
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    x, y = torch.randn(BATCH, *CASES[case].input_shape), torch.arange(BATCH) % 10

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(run(x), y).backward()
        optimizer.step()

    return step


SIDES: dict[str, Callable[[str], Callable[[], None]]] = {
    "ntt_eqx": ours,
    "torch": torch_side,
    "compiled": lambda case: torch_side(case, compiled=True),
}

if __name__ == "__main__":
    main()
