"""Layers that store kept weights alone beside masked and dense ones, in one process.

    python benchmarks/sparse_layers.py --json sparse_layers.json
    python benchmarks/sparse_layers.py --cases 4096 --patterns scattered fan-in:16 2:4 channels
    python benchmarks/sparse_layers.py --cases 1568 --transfers

Each row is a network at a density: milliseconds of its forward pass and of a training step of
`ntt_eqx.train_steps` with Adam, dense, masked and with `sparse_layers`, in turn, and the bytes
of the training states (weights, masks or indices, moments). Times are medians of wall time and of
the process's CPU time, which other work on the machine disturbs less. `--transfers` takes steps of
a transfer (Adam, a sketch of four directions) instead: masked, as `ntt_init` makes the state
(large layers on their kept weights, refreshes allowed), and by `on_kept_weights` (one mask), beside
a dense training step.
"""

import argparse
import dataclasses
import itertools
import json
import pathlib
import statistics
import time
import unittest.mock
from collections.abc import Callable
from importlib import metadata
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import ntt_eqx as ntt

KINDS = ("dense", "masked", "sparse")


class Perceptron(eqx.Module):
    """A multi-layer perceptron with ReLU, of layers of these sizes."""

    layers: list[eqx.nn.Linear]

    def __init__(self, sizes: tuple[int, ...], key: jax.Array):
        """Draw the layers."""
        keys = jax.random.split(key, len(sizes) - 1)
        pairs = zip(sizes[:-1], sizes[1:], keys, strict=True)
        self.layers = [eqx.nn.Linear(a, b, key=k) for a, b, k in pairs]

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of one sample."""
        x = jnp.ravel(x)
        for layer in self.layers[:-1]:
            x = jax.nn.relu(layer(x))
        return self.layers[-1](x)


@dataclasses.dataclass(frozen=True)
class Case:
    """A network, the shape of its samples, and the densities at which it is timed."""

    make: Callable[[jax.Array], Any]
    shape: tuple[int, ...]
    densities: tuple[float, ...]


def published(name: str, shape: tuple[int, ...]) -> Callable[[jax.Array], Any]:
    """A model of the library."""
    return lambda key: ntt.models.make_model(name, shape, 10, key=key)


def perceptron(*sizes: int) -> Callable[[jax.Array], Any]:
    """A `Perceptron`."""
    return lambda key: Perceptron(sizes, key)


IMAGE = (1, 28, 28)
CASES = {
    "lenet300100": Case(published("lenet-300-100", IMAGE), IMAGE, (0.01, 0.03, 0.1)),
    "1024": Case(perceptron(784, 1024, 1024, 10), IMAGE, (0.01, 0.03, 0.1)),
    "4096": Case(perceptron(784, 4096, 4096, 10), IMAGE, (0.01, 0.03, 0.1)),
    "1568": Case(published("mlp-1568", IMAGE), IMAGE, (0.01, 0.03)),
    "lenet5": Case(published("lenet-5", IMAGE), IMAGE, (0.01, 0.03, 0.1)),
}
PATTERNS: dict[str, Any] = {
    "scattered": None,
    "2:4": ntt.NM(2, 4),
    "1:8": ntt.NM(1, 8),
    "fan-in": ntt.ConstantFanIn(),
    "fan-in:16": ntt.ConstantFanIn(16),
    "fan-in:32": ntt.ConstantFanIn(32),
    "channels": ntt.Channels(),
}


def main() -> None:
    """Measure every case, and print a table."""
    parser = argparse.ArgumentParser(description="Layers that store kept weights alone.")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--densities", nargs="+", type=float, help="instead of each case's own")
    parser.add_argument("--patterns", nargs="+", choices=list(PATTERNS), default=["scattered"])
    parser.add_argument("--transfers", action="store_true", help="steps of transfers instead")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15, help="timed calls of each kind")
    parser.add_argument("--all", action="store_true", help="replace every layer, not by its costs")
    parser.add_argument("--json", type=pathlib.Path, help="write the rows here")
    options = parser.parse_args()
    rows = []
    for name, pattern in itertools.product(options.cases, options.patterns):
        densities = options.densities or CASES[name].densities
        if isinstance(PATTERNS[pattern], ntt.NM):
            densities = [PATTERNS[pattern].n / PATTERNS[pattern].m]
        for density in densities:
            row = {"case": name, "density": density, "batch": options.batch, "pattern": pattern}
            if options.transfers:
                row |= transfers(CASES[name], density, options.batch, options.rounds)
                print(line_of_transfer(row), flush=True)
            else:
                masked = pruned(CASES[name], density, PATTERNS[pattern])
                row |= measure(CASES[name], masked, options.batch, options.rounds, options.all)
                print(line(row), flush=True)
            rows.append(row)
    if options.json:
        versions = {name: metadata.version(name) for name in ("jax", "jaxlib", "equinox")}
        found = {"device": jax.devices()[0].device_kind, "versions": versions, "rows": rows}
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def pruned(case: Case, density: float, pattern: Any) -> ntt.SparseModel:
    """The network under a random mask."""
    dense = case.make(jax.random.key(0))
    scores = ntt.scores.Random(jax.random.key(1))(dense)
    return ntt.SparseModel(dense, ntt.make_mask(scores, density, pattern=pattern))


def measure(
    case: Case, masked: ntt.SparseModel, batch: int, rounds: int, replace_all: bool
) -> dict[str, Any]:
    """Times and bytes of a network: dense, masked, with layers that store kept weights alone."""
    dense = masked.model
    where = (lambda path, layer: True) if replace_all else None
    sparse = ntt.sparse_layers(masked, where, batch_size=batch)
    x = jax.random.normal(jax.random.key(2), (batch, *case.shape))
    y = jnp.arange(batch) % 10
    models = dict(zip(KINDS, (dense, masked, sparse), strict=True))
    states = {
        kind: ntt.train_init(model, ntt.TrainConfig(), optax.adam(1e-3))
        for kind, model in models.items()
    }
    held = {kind: sum(a.nbytes for a in arrays(state)) for kind, state in states.items()}
    forward = eqx.filter_jit(lambda model, x: jax.vmap(model)(x))
    calls = {kind: lambda m=model: forward(m, x) for kind, model in models.items()}

    def train(kind: str, steps: int) -> Any:
        return ntt.train_steps(states[kind], [(x, y)], num_steps=steps, log_every=None)[0].step

    steps = steps_of_a_run(lambda steps: train("dense", steps))
    return {
        "replaced": sorted(n for n in sparse.densities() if n.endswith(".values")),
        "bytes": held,
        "weight_bytes": sum(a.nbytes for a in arrays(dense)),
        "forward": in_turn(calls, rounds),
        "step": {
            kind: {name: seconds / steps for name, seconds in spent.items()}
            for kind, spent in in_turn(
                {k: lambda k=k: train(k, steps) for k in KINDS}, rounds
            ).items()
        },
    }


def steps_of_a_run(run: Callable[[int], Any], seconds: float = 0.4) -> int:
    """Steps of a run of some `seconds`, so that what it costs once is no part of a step."""
    spent = {}
    for steps in (2, 12, 2, 12):  # the first two compile
        start = time.process_time()
        jax.block_until_ready(run(steps))
        spent[steps] = time.process_time() - start
    return int(min(300, max(5, seconds * 10 / (spent[12] - spent[2] + 1e-6))))


def transfers(case: Case, density: float, batch: int, rounds: int) -> dict[str, Any]:
    """Times of a step of a transfer, and of a dense training step beside it."""
    dense = case.make(jax.random.key(0))
    method = lambda refresh: ntt.NeuralTangentTransfer(
        sparsity=density,
        loss=ntt.KernelMatching(probe=ntt.Sketch(4)),
        refresh=refresh,
        optimizer=optax.adam(5e-4),
        num_steps=1000,
    )
    every = ntt.MagnitudeRefresh(100)
    # By default the library chooses by costs; without them every layer stays masked.
    with unittest.mock.patch("ntt_eqx._transfer._state.pays_in_a_transfer", lambda mask: False):
        states = {"masked": ntt.ntt_init(dense, method(every))}
    states["refreshed"] = ntt.ntt_init(dense, method(every))
    states["one mask"] = ntt.ntt_init(dense, method(ntt.NoRefresh())).on_kept_weights()
    x = jax.random.normal(jax.random.key(2), (batch, *case.shape))
    step, train = eqx.filter_jit(ntt.ntt_step), eqx.filter_jit(ntt.train_step)
    trained = ntt.train_init(dense, ntt.TrainConfig(), optax.adam(1e-3))
    calls: dict[str, Callable[[], Any]] = {
        k: lambda s=s: jax.tree.leaves(step(s, x)) for k, s in states.items()
    }
    calls["dense training"] = lambda: jax.tree.leaves(train(trained, (x, jnp.arange(batch) % 10)))
    return {"transfer": in_turn(calls, rounds)}


def line_of_transfer(row: dict[str, Any]) -> str:
    """A row of a transfer in words."""
    times = row["transfer"]
    shown = ", ".join(
        f"{kind} {1e3 * spent['wall_s']:.1f} ({1e3 * spent['cpu_s']:.1f})"
        for kind, spent in times.items()
    )
    gains = [times["masked"]["cpu_s"] / times[k]["cpu_s"] for k in ("refreshed", "one mask")]
    name = f"{row['case']} at {100 * row['density']:g} %"
    return f"{name}: {shown} ms (CPU), {gains[0]:.2f} and {gains[1]:.2f} times"


def arrays(tree: Any) -> list[Any]:
    """All arrays of a tree."""
    return jax.tree.leaves(eqx.filter(tree, eqx.is_array))


def in_turn(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, float]]:
    """Medians of seconds of each call, one round of all after the other; three rounds warm up."""
    times: dict[str, list[tuple[float, float]]] = {kind: [] for kind in calls}
    for number in range(rounds + 3):
        for kind, call in calls.items():
            start, cpu = time.perf_counter(), time.process_time()
            jax.block_until_ready(call())
            if number >= 3:
                spent = (time.perf_counter() - start, time.process_time() - cpu)
                times[kind].append(spent)
    median = lambda values: statistics.median(values)
    return {
        kind: {"wall_s": median(w for w, _ in spent), "cpu_s": median(c for _, c in spent)}
        for kind, spent in times.items()
    }


def line(row: dict[str, Any]) -> str:
    """A row in words."""
    parts = [f"{row['case']} {row['pattern']} at {100 * row['density']:g} %"]
    for what in ("forward", "step"):
        shown = ", ".join(
            f"{kind} {1e3 * row[what][kind]['wall_s']:.2f} ({1e3 * row[what][kind]['cpu_s']:.2f})"
            for kind in KINDS
        )
        gains = [row[what][k]["cpu_s"] / row[what]["sparse"]["cpu_s"] for k in KINDS[:2]]
        parts.append(f"{what} {shown} ms (CPU), {gains[0]:.2f} and {gains[1]:.2f} times")
    share = row["bytes"]["sparse"] / row["weight_bytes"]
    return "; ".join([*parts, f"state {share:.2f} of the dense weights"])


if __name__ == "__main__":
    main()
