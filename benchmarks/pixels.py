"""Which share of a mask's first layer reads pixels that hardly vary.

    python benchmarks/pixels.py runs/few-3 runs/few-channels

reads the networks of comparisons whose first layer is dense, and writes
benchmarks/results/pixels.json: for each network the share of the kept weights of that layer whose
pixel varies less than a tenth of the mean; for each data set the share of such pixels; and for each
method how the kept weights lie over the pixels, mean of its seeds, in 1e-5 of them.
"""

import argparse
import functools
import json
import pathlib

import jax
import numpy as np

import ntt_eqx as ntt
from ntt_eqx.experiment.model_file import load_model

OUT = pathlib.Path(__file__).parent / "results" / "pixels.json"
DENSITY = 0.01  # of the networks whose pixels are written down
LEAST = 0.1  # of the mean variance, below which a pixel hardly varies


@functools.cache
def idle_pixels(dataset: str) -> np.ndarray:
    """Whether each pixel hardly varies over the training images."""
    images = np.asarray(ntt.data.as_batch(ntt.data.load_dataset(dataset).train).x)
    variance = images.reshape(len(images), -1).var(axis=0)
    return variance < LEAST * variance.mean()


def reads_of(path: pathlib.Path) -> np.ndarray:
    """The share of the first layer's kept weights that reads each pixel."""
    reads = np.asarray(jax.tree.leaves(load_model(path).model.mask)[0]).sum(axis=0)
    return reads / reads.sum()


def main() -> None:
    """Read the networks and write the shares."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("runs", nargs="+", type=pathlib.Path, help="folders of comparisons")
    networks, names = [], ("dataset", "method", "mask", "density", "seed")
    found: dict[tuple[str, ...], list[np.ndarray]] = {}
    for run in parser.parse_args().runs:
        for path in sorted((run / "cells").glob("*/result.json")):
            result = json.loads(path.read_text())
            reads = reads_of(path.with_name("model.eqx"))
            share = float(reads[idle_pixels(result["dataset"])].sum())
            if result["density"] == DENSITY:
                place = result["dataset"], result["method"], result["mask"]
                found.setdefault(place, []).append(reads)
            networks.append({name: result[name] for name in names} | {"share": round(share, 4)})
    datasets = sorted({network["dataset"] for network in networks})
    pixels = {dataset: round(float(idle_pixels(dataset).mean()), 4) for dataset in datasets}
    means = []
    for (dataset, method, mask), each in found.items():
        reads = np.round(1e5 * np.mean(each, axis=0)).astype(int).tolist()
        means.append({"dataset": dataset, "method": method, "mask": mask, "reads": reads})
    everything = {"pixels": pixels, "networks": networks, "means": means}
    OUT.write_text(json.dumps(everything, separators=(",", ":")) + "\n")
    print(f"wrote the shares of {len(networks)} networks to {OUT}")


if __name__ == "__main__":
    main()
