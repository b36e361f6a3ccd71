"""Layers that store kept weights alone beside masked and dense ones, in one process.

    python benchmarks/sparse_layers.py --json sparse_layers.json

Each row is a network at a density: milliseconds of its forward pass and of a training step by
`ntt_eqx.train_step` with Adam, dense, masked and with `sparse_layers`, taken in turn, and the bytes
of the training states (weights, masks or indices, moments). Times are medians of wall time and of
the process's CPU time, which other work on the machine disturbs less.
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
import time
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
    "lenet5": Case(published("lenet-5", IMAGE), IMAGE, (0.01, 0.03, 0.1)),
}


def main() -> None:
    """Measure every case, and print a table."""
    parser = argparse.ArgumentParser(description="Layers that store kept weights alone.")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--densities", nargs="+", type=float, help="instead of each case's own")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15, help="timed calls of each kind")
    parser.add_argument("--all", action="store_true", help="replace every layer, not by its costs")
    parser.add_argument("--json", type=pathlib.Path, help="write the rows here")
    options = parser.parse_args()
    rows = []
    for name in options.cases:
        for density in options.densities or CASES[name].densities:
            row = {"case": name, "density": density, "batch": options.batch}
            row |= measure(CASES[name], density, options.batch, options.rounds, options.all)
            rows.append(row)
            print(line(row), flush=True)
    if options.json:
        versions = {name: metadata.version(name) for name in ("jax", "jaxlib", "equinox")}
        found = {"device": jax.devices()[0].device_kind, "versions": versions, "rows": rows}
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def measure(
    case: Case, density: float, batch: int, rounds: int, replace_all: bool
) -> dict[str, Any]:
    """Times and bytes of a network: dense, masked, with layers that store kept weights alone."""
    dense = case.make(jax.random.key(0))
    copied = lambda tree: jax.tree.map(lambda a: jnp.copy(a) if eqx.is_array(a) else a, tree)
    scores = ntt.scores.Random(jax.random.key(1))(dense)
    masked = ntt.SparseModel(dense, ntt.make_mask(scores, density))
    where = (lambda path, layer: True) if replace_all else None
    sparse = ntt.sparse_layers(masked, where, batch_size=batch)
    x = jax.random.normal(jax.random.key(2), (batch, *case.shape))
    y = jnp.arange(batch) % 10
    models = dict(zip(KINDS, (dense, masked, sparse), strict=True))
    states = {
        kind: ntt.train_init(copied(model), ntt.TrainConfig(), optax.adam(1e-3))
        for kind, model in models.items()
    }
    held = {kind: sum(a.nbytes for a in arrays(state)) for kind, state in states.items()}
    forward = eqx.filter_jit(lambda model, x: jax.vmap(model)(x))
    calls = {kind: lambda m=model: forward(m, x) for kind, model in models.items()}
    step = eqx.filter_jit(
        lambda batch, state: ntt.train_step(state, batch), donate="all-except-first"
    )

    def train(kind: str) -> Any:
        states[kind], metrics = step((x, y), states[kind])
        return metrics.loss

    return {
        "replaced": sorted(n for n in sparse.densities() if n.endswith(".values")),
        "bytes": held,
        "weight_bytes": sum(a.nbytes for a in arrays(dense)),
        "forward": in_turn(calls, rounds),
        "step": in_turn({kind: lambda k=kind: train(k) for kind in KINDS}, rounds),
    }


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
    parts = [f"{row['case']} at {100 * row['density']:g} %"]
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
