"""`ntt-eqx inspect`."""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
from tyro.conf import Positional

from ... import LayerCost, compare_kernels, layer_costs
from .._errors import ExperimentError
from ..cells import random_key
from ..images import StandardisedSplit
from ..methods import method
from ..own import build_model
from ..progress import Display
from ..results import MODEL, TRANSFERRED, model_path
from ..running import with_statistics
from .evaluate import images_of, load_own


@dataclasses.dataclass(frozen=True)
class Inspect:
    """Show what pruning did to a network from a file: layers, FLOPs, tangent kernel.

    The kernel is compared with that of the dense network that the file's seed stands for, at its
    initialisation.
    """

    # model file, or directory of a run; its network before training where there is one
    network: Positional[Path]
    dataset: str | None = None  # images for the kernel; left out, those that the file names
    model: str | None = None  # the network's code, if it is your own: package.module:Object
    inputs: int = 32  # number of test images for the kernel
    data_dir: Path | None = None  # folder with datasets
    json: bool = False  # print one JSON object instead of text

    def run(self) -> int:
        """Show what pruning did; returns the exit status."""
        path = model_path(self.network, (TRANSFERRED, MODEL))
        loaded = load_own(path, self.model)
        header, seed = loaded.header, loaded.header.get("seed")
        if not isinstance(seed, int):
            raise ExperimentError(f"{path}: does not name a seed to compare with.")
        if self.inputs < 2:
            raise ExperimentError(f"inputs: {self.inputs} must be at least 2.")
        images = images_of(path, loaded, self.dataset, self.data_dir, labels=False)
        shape, classes = images.input_shape, header["arguments"]["num_classes"]
        dense = build_model(header["model"], shape, classes, key=random_key(seed, 0))
        dense = with_statistics(dense, images, seed)
        costs = layer_costs(loaded.model, shape)
        x = jnp.asarray(StandardisedSplit(images, images.test).first(self.inputs).x)
        kernel = compare_kernels(loaded.model, dense, x).numbers
        if self.json:
            layers = [dataclasses.asdict(cost) for cost in costs]
            print(json.dumps({"network": str(path), "layers": layers, **kernel}))
            return 0
        with Display() as display:
            label = method(header.get("method") or "?").label
            display.say(f"{path}: {header['model']}, {label}")
            _show_layers(costs, display)
            display.say(
                f"tangent kernel on {len(x)} test images of {images.name}, against the dense "
                f"initialisation of seed {seed}: distance {kernel['kernel_distance']:.4g}, "
                f"CKA {kernel['kernel_alignment']:.4g}, trace {kernel['trace_ratio']:.4g} of the "
                f"dense one's, effective rank {kernel['effective_rank']:.4g} "
                f"(dense {kernel['dense_effective_rank']:.4g})"
            )
        return 0


def _show_layers(costs: list[LayerCost], display: Display) -> None:
    total = lambda name: sum(getattr(cost, name) for cost in costs)
    numbers = [f.name for f in dataclasses.fields(LayerCost) if f.name != "name"]
    everything = LayerCost("all", **{name: total(name) for name in numbers})
    whole = max(everything.flops, 1)
    body = []
    for cost in (*costs, everything):
        shares = cost.kept / max(cost.weights, 1), cost.flops / whole, cost.kept_flops / whole
        counts = [f"{cost.weights:,}", f"{cost.kept:,}"]
        body.append([cost.name, *counts, *(f"{100 * share:.2f}" for share in shares)])
    header = ["Layer", "Weights", "Kept", "Kept (%)", "FLOPs (%)", "FLOPs left (% of dense)"]
    display.table((header, body, [False, *([True] * 5)]))
    left = everything.kept_flops
    display.say(f"multiply-adds a sample: {left:,} of {whole:,} ({100 * left / whole:.2f} %)")
