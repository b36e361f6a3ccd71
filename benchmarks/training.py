"""A supervised step by `ntt_eqx.train_step` beside PyTorch's and beside one by hand in JAX.

    pip install -e '.[cli]' torch
    python benchmarks/training.py --json training.json
    taskset -c 0 python benchmarks/training.py --by-hand

Each side has processes of its own, in turn, so that neither's threads wait in the other's way. Both
take the same networks, batches of 64 and Adam; PyTorch runs eagerly, and compiled with --compile
(which needs a C++ compiler). Times are medians of the fastest process of each side.

`--by-hand` compares with the same step of the same model, written with optax and `jax.jit`, dense
and with a mask of 3 %: a run by `ntt_eqx.train_steps`, whose steps but the last nobody asks for
metrics, and single calls of `equinox.filter_jit(ntt_eqx.train_step)`, all in turn in one process.
"""

import argparse
import functools
import importlib
import json
import pathlib
import statistics
import subprocess
import sys
import time
import warnings
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
    parser.add_argument("--by-hand", action="store_true", help="beside plain JAX, not PyTorch")
    parser.add_argument("--json", type=pathlib.Path, help="write the rows here")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        side, case = options.one
        print(json.dumps(measure(SIDES[side](case), options.steps)))
        return
    if options.by_hand:
        rows = [
            row for case in options.cases for row in by_hand(case, options.rounds, options.steps)
        ]
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1) + "\n")
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
    """Single calls of `ntt_eqx.train_step`."""
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


def by_hand(case: str, rounds: int, steps: int) -> list[dict[str, Any]]:
    """Rows of a step by hand and of ours: CPU time and time on the clock, medians of rounds."""
    import jax

    import ntt_eqx as ntt

    # The mask is random, and whether every class has a path does not change the time of a step.
    warnings.simplefilter("ignore", ntt.LayerCollapseWarning)
    dense = CASES[case].teacher(jax.random.key(0))
    sparse = ntt.prune(dense, ntt.scores.Random(jax.random.key(2)), 0.03)
    batch = CASES[case].samples(jax.random.key(1), BATCH), jax.numpy.arange(BATCH) % 10
    makers = {"by hand": plain, "train_steps": run, "filter_jit(train_step)": single}
    rows: list[dict[str, Any]] = []
    for name, model in (("dense", dense), ("masked", sparse)):
        sides = {side: make(model, batch) for side, make in makers.items()}
        for work in sides.values():
            work(3)  # compiles
        cpu: dict[str, list[float]] = {side: [] for side in sides}
        wall: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(rounds):
            for side, work in sides.items():
                few, many = _timed(work, 3), _timed(work, steps + 3)  # what a run costs once
                cpu[side].append((many[0] - few[0]) / steps)
                wall[side].append((many[1] - few[1]) / steps)
        least = statistics.median(cpu["by hand"])
        for side in sides:
            taken, clock = statistics.median(cpu[side]), statistics.median(wall[side])
            rows.append({"case": case, "model": name, "side": side, "cpu_s": taken})
            rows[-1].update({"wall_s": clock, "ratio": taken / least})
            shown = f"{1e3 * taken:.3f} CPU ms, {1e3 * clock:.3f} ms, {taken / least:.3f}"
            print(f"{case}, {name}, {side}: {shown} of the step by hand", flush=True)
    return rows


def _timed(work: Callable[[int], None], steps: int) -> tuple[float, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    work(steps)
    return time.process_time() - cpu, time.perf_counter() - wall


def plain(model: Any, batch: Any) -> Callable[[int], None]:
    """Steps as one writes them by hand in JAX and optax."""
    import equinox as eqx
    import jax
    import jax.numpy as jnp
    import optax

    masked = hasattr(model, "mask")
    weights, rest = eqx.partition(model.model if masked else model, eqx.is_inexact_array)
    masks = eqx.filter(model.mask, eqx.is_array) if masked else None
    optimizer = optax.adam(1e-3)

    def loss(weights: Any, masks: Any, x: Any, y: Any) -> Any:
        if masked:
            zeros = lambda m, w: w if m is None else jnp.where(m, w, 0)
            weights = jax.tree.map(zeros, masks, weights, is_leaf=lambda m: m is None)
        logits = jax.vmap(eqx.combine(weights, rest))(x)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        squares = (jnp.sum(jnp.square(w)) for w in jax.tree.leaves(weights) if w.ndim > 1)
        return jnp.mean(losses) + 1e-8 * sum(squares)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(weights: Any, opt_state: Any, masks: Any, x: Any, y: Any) -> Any:
        value, gradient = jax.value_and_grad(loss)(weights, masks, x, y)
        updates, opt_state = optimizer.update(gradient, opt_state, weights)
        return optax.apply_updates(weights, updates), opt_state, value

    weights = jax.tree.map(jnp.copy, weights)  # the steps reuse its memory
    held = [weights, optimizer.init(weights)]

    def work(steps: int) -> None:
        value = None
        for _ in range(steps):
            held[0], held[1], value = step(*held, masks, *batch)
        jax.block_until_ready(value)

    return work


def run(model: Any, batch: Any) -> Callable[[int], None]:
    """Steps of a run with one row of metrics, at its end."""
    import optax

    import ntt_eqx as ntt

    state = ntt.train_init(model, ntt.TrainConfig(), optax.adam(1e-3))

    def work(steps: int) -> None:
        ntt.train_steps(state, [batch], num_steps=steps, log_every=None)

    return work


def single(model: Any, batch: Any) -> Callable[[int], None]:
    """Single calls of a step that reuses the state's memory."""
    import equinox as eqx
    import jax
    import jax.numpy as jnp
    import optax

    import ntt_eqx as ntt

    state = ntt.train_init(model, ntt.TrainConfig(), optax.adam(1e-3))
    held = [jax.tree.map(lambda leaf: jnp.copy(leaf) if eqx.is_array(leaf) else leaf, state)]
    step = eqx.filter_jit(
        lambda batch, state: ntt.train_step(state, batch), donate="all-except-first"
    )

    def work(steps: int) -> None:
        for _ in range(steps):
            held[0], _ = step(batch, held[0])
        jax.block_until_ready(held[0].step)

    return work


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
