"""Run directories with made-up results, for tables, figures and everything that reads them."""

import json
import math
import zlib

import numpy as np

from ntt_eqx.experiment.manifest import RunFolder, create

SIZES = {"hidden1.weight": 235_200, "hidden2.weight": 30_000, "output.weight": 1_000}
OFFSET = {"ntt": 1.5, "ntt-ambient": 1.2, "random": -3.0, "magnitude": -1.0, "snip": 0.5}


def held(directory, kind="network"):
    """A run folder that nobody else can claim, for tests of what is written into it."""
    create(directory, kind)
    return RunFolder(directory, lambda: None)


def write_run(directory, **files):
    """A run's folder with these files, by name with `_` for the dot; a dictionary becomes JSON."""
    text = lambda value: value if isinstance(value, str) else json.dumps(value)
    encode = lambda value: value if isinstance(value, bytes) else text(value).encode()
    held(directory).write({n.replace("_", "."): encode(value) for n, value in files.items()})


def fabricate(
    out,
    methods=("ntt", "random", "snip", "dense"),
    densities=(0.01, 0.03, 0.1),
    seeds=(0, 1, 2),
    scopes=("layer",),
    **fields,
):
    """Write one finished cell for each combination; returns their directories."""
    directories = []
    for method in methods:
        dense = method == "dense"
        for density in (1.0,) if dense else densities:
            for scope in (None,) if dense else scopes:
                for seed in seeds:
                    directory = out / "cells" / f"{method}-{scope}-{density}-{seed}"
                    write_cell(directory, method, scope, density, seed, fields)
                    directories.append(directory)
    return directories


def write_cell(directory, method, scope, density, seed, fields):
    rng = np.random.default_rng(zlib.crc32(f"{method}{scope}{density}{seed}".encode()))
    place = {
        "dataset": "fashion-mnist",
        "model": "lenet-300-100",
        "method": method,
        "scope": scope,
        "density": density,
        "seed": seed,
        **{k: v for k, v in fields.items() if k in ("dataset", "model")},
    }
    config = {"format": 1, **place}
    accuracy = 0.9 + 0.02 * math.log10(density) + 0.01 * OFFSET.get(method, 0.0)
    accuracy += 0.004 * rng.normal() - (0.03 if scope == "global" and density < 0.02 else 0.0)
    shares = {name: density for name in SIZES}
    if scope == "global":
        shares = {"hidden1.weight": 0.8 * density, "hidden2.weight": 2.5 * density}
        shares["output.weight"] = min(1.0, 9 * density)
    result = {
        **place,
        "test_accuracy": accuracy,
        "train_accuracy": accuracy + 0.03,
        "seconds": 100.0 + rng.random(),
        "kernel_distance": 3e4 * density if method.startswith("ntt") else None,
        "target_distance": 0.01 if method.startswith("ntt") else None,
        "densities": {name: min(share, 1.0) for name, share in shares.items()},
        "settings_id": "0" * 8,
        "fingerprint": f"{method}{scope}{density}{seed}",
        **fields,
    }
    rows = []
    if method.startswith("ntt"):
        for step in range(0, 5001, 250):
            value = {"kernel_distance": 3e4 * math.exp(-step / 1500) + 900}
            value["target_distance"] = 1.2 * math.exp(-step / 900) + 0.01
            rows.append({"phase": "transfer", "step": step, "validation": value})
    for step in range(0, 20_001, 1_000):
        seen = accuracy - 0.2 * math.exp(-step / 2500) + 0.002 * rng.normal()
        rows.append({"phase": "train", "step": step, "test": {"accuracy": seen}})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_run(directory, config_json=config, result_json=result, metrics_jsonl=text)
