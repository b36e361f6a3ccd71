"""Measure each export format: bytes, gzip, milliseconds of 1 and 64 samples, exactness.

    taskset -c 0 python benchmarks/export_formats.py

Times of the formats take turns with those of the dense network in onnxruntime, in one process and
on one core; the ratios are to it.
"""

import argparse
import gzip
import json
import tempfile
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from make_speed import formats_table

import ntt_eqx as ntt
from ntt_eqx.export._format import BATCHES, AbstractFormat, timed
from ntt_eqx.export._numpy import SPARSE_BELOW, Numpy
from ntt_eqx.export._onnx import Onnx
from ntt_eqx.export._stablehlo import StableHLO


class Flat(eqx.Module):
    """A perceptron of images."""

    mlp: eqx.nn.MLP

    def __call__(self, x):
        return self.mlp(x.reshape(-1))


def wide(key):
    return Flat(eqx.nn.MLP(784, 10, 4096, 2, key=key))


def scattered(model, density):
    return ntt.SparseModel(model, ntt.make_mask(ntt.scores.Magnitude()(model), density))


def filters(model, density):
    mask = ntt.make_mask(
        ntt.scores.Magnitude()(model), ntt.Sparsity(density, pattern=ntt.Channels())
    )
    return ntt.SparseModel(model, mask)


CASES = {
    "LeNet-300-100, 3 %": (ntt.models.LeNet300100, (1, 28, 28), scattered, 0.03),
    "784-4096-4096-10, 3 %": (wide, (1, 28, 28), scattered, 0.03),
    "LeNet-5, a quarter of the filters": (ntt.models.LeNet5, (1, 28, 28), filters, 0.25),
    "Conv-4, a quarter of the filters": (ntt.models.Conv4, (3, 32, 32), filters, 0.25),
}
FORMATS: dict[str, AbstractFormat] = {
    "onnx": Onnx(),
    "onnx, 8 bits": Onnx(quantise="dynamic"),
    "stablehlo": StableHLO(("cpu",)),
    "numpy": Numpy(SPARSE_BELOW),
}


def measure(title):
    """One row a format; the last one is the file of the masked network itself."""
    build, shape, prune, density = CASES[title]
    sparse = prune(build(key=jax.random.key(0)), density)
    x = jax.random.normal(jax.random.key(1), (64, *shape))
    plain = eqx.nn.inference_mode(sparse.to_dense())
    outputs = jax.jit(jax.vmap(plain))(x)
    found = ntt.compact(sparse, x[:8])
    small = eqx.nn.inference_mode(found.model.to_dense())
    contents = {"onnx, dense": Onnx().encode("benchmark", plain, x)}
    forms = {"onnx, dense": FORMATS["onnx"], **FORMATS}
    for name, form in FORMATS.items():
        contents[name] = form.encode("benchmark", small, x)
    runs = {name: forms[name].load("benchmark", content) for name, content in contents.items()}
    times = dict(zip(runs, timed(list(runs.values()), np.asarray(x)), strict=True))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        ntt.export.save_safetensors(path, sparse)
        contents["safetensors, masked"] = path.read_bytes()

    def row(name):
        size = {"bytes": len(contents[name]), "gzip": len(gzip.compress(contents[name]))}
        if name not in runs:
            return {"format": name, **size}
        difference = float(jnp.abs(runs[name](np.asarray(x)) - outputs).max())
        ms = {str(n): times[name][n] for n in BATCHES}
        return {"format": name, **size, "ms": ms, "difference": difference}

    return {
        "case": title,
        "parameters": found.parameters,
        "compacted": found.compact_parameters,
        "rows": [row(name) for name in contents],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="part of a network's name")
    parser.add_argument("--json", metavar="FILE", help="write all rows")
    options = parser.parse_args()
    cases = []
    for title in CASES:
        if options.only is None or options.only in title:
            cases.append(measure(title))
            print(f"\n{formats_table(cases[-1])}", flush=True)
    if options.json:
        Path(options.json).write_text(
            json.dumps({"jax": jax.__version__, "cases": cases}, indent=1)
        )


if __name__ == "__main__":
    main()
