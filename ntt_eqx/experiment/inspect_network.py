"""`ntt-eqx inspect`: layers, FLOPs and tangent kernel of a network from a file."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp

from ..models import make_model
from ._errors import ExperimentError
from .diagnostics import LayerCost, compare_kernels, layer_costs, summary
from .images import ImageShelf
from .model_file import LoadedModel, load_model
from .options import Inspect
from .progress import Display, make_display
from .results import MODEL, TRANSFERRED
from .sweep import check_dataset


def inspect_network(options: Inspect) -> int:
    """Show what pruning did to a network; returns the exit status."""
    path = _network_path(options.network)
    loaded = load_model(path)
    name, seed = options.dataset or loaded.header.get("dataset"), loaded.header.get("seed")
    if not isinstance(name, str) or not isinstance(seed, int):
        raise ExperimentError(f"{path}: does not name a dataset and a seed to compare with.")
    check_dataset(name)
    if options.inputs < 2:
        raise ExperimentError(f"inputs: {options.inputs} must be at least 2.")
    shape = tuple(loaded.header["arguments"]["input_shape"])
    costs = layer_costs(loaded.model, shape)
    images = ImageShelf(options.data_dir).load(name)
    images.check_network(path, loaded.header, labels=False)
    x = jnp.asarray(images.test.first(options.inputs).x)
    kernel = summary(compare_kernels(loaded.model, _dense(loaded, seed), x))
    if options.json:
        layers = [dataclasses.asdict(cost) for cost in costs]
        print(json.dumps({"network": str(path), "layers": layers, **kernel}))
        return 0
    with make_display() as display:
        display.say(f"{path}: {loaded.header['model']}, {loaded.header.get('method', '?')}")
        _show_layers(costs, display)
        display.say(
            f"tangent kernel on {len(x)} test images of {name}, against the dense initialisation "
            f"of seed {seed}: distance {kernel['kernel_distance']:.4g}, "
            f"CKA {kernel['kernel_alignment']:.4g}, trace {kernel['trace_ratio']:.4g} of the dense "
            f"one's, effective rank {kernel['effective_rank']:.4g} "
            f"(dense {kernel['dense_effective_rank']:.4g})"
        )
    return 0


def _dense(loaded: LoadedModel, seed: int) -> object:
    header = loaded.header
    arguments = header["arguments"]
    return make_model(
        header["model"],
        tuple(arguments["input_shape"]),
        arguments["num_classes"],
        key=jax.random.fold_in(jax.random.key(seed), 0),
    )


def _show_layers(costs: list[LayerCost], display: Display) -> None:
    whole = sum(cost.flops for cost in costs)
    left = sum(cost.kept_flops for cost in costs)
    body = [
        [
            cost.name,
            f"{cost.weights:,}",
            f"{cost.kept:,}",
            f"{100 * cost.kept / cost.weights:.2f}",
            f"{100 * cost.flops / whole:.1f}",
            f"{100 * cost.kept_flops / max(left, 1):.1f}",
        ]
        for cost in costs
    ]
    weights, kept = sum(c.weights for c in costs), sum(c.kept for c in costs)
    body.append(
        ["all", f"{weights:,}", f"{kept:,}", f"{100 * kept / weights:.2f}", "100.0", "100.0"]
    )
    header = ["Layer", "Weights", "Kept", "Kept (%)", "FLOPs dense (%)", "FLOPs left (%)"]
    display.table(header, body, [False, *([True] * 5)])
    display.say(f"multiply-adds a sample: {left:,} of {whole:,} ({100 * left / whole:.2f} %)")


def _network_path(path: Path) -> Path:
    if not path.is_dir():
        return path
    for name in (TRANSFERRED, MODEL):
        if (path / name).is_file():
            return path / name
    raise ExperimentError(f"{path}: no model file in this directory; expected {MODEL}.")
