"""Measure each export format: bytes, gzip, milliseconds of 1 and 64 samples, exactness.

    taskset -c 0 python benchmarks/export_formats.py

Times of the formats take turns with those of the dense network in onnxruntime, in one process and
on one core; the ratios are to it.
"""

import argparse
import gzip
import tempfile
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

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
    build, shape, prune, density = CASES[title]
    sparse = prune(build(key=jax.random.key(0)), density)
    x = jax.random.normal(jax.random.key(1), (64, *shape))
    plain = eqx.nn.inference_mode(sparse.to_dense())
    outputs = jax.jit(jax.vmap(plain))(x)
    found = ntt.compact(sparse, x[:8])
    small = eqx.nn.inference_mode(found.model.to_dense())
    print(f"\n{title}: {found.parameters:,} parameters, compacted {found.compact_parameters:,}\n")
    print("| format | bytes | gzip | 1 (ms) | 64 (ms) | 1 (times) | 64 (times) | difference |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    contents = {"onnx, dense": Onnx().encode("benchmark", plain, x)}
    forms = {"onnx, dense": FORMATS["onnx"], **FORMATS}
    for name, form in FORMATS.items():
        contents[name] = form.encode("benchmark", small, x)
    runs = {name: forms[name].load("benchmark", content) for name, content in contents.items()}
    times = dict(zip(runs, timed(list(runs.values()), np.asarray(x)), strict=True))
    dense = times["onnx, dense"]
    for name, content in contents.items():
        ms = [f"{times[name][n]:.3g}" for n in BATCHES]
        ratios = [f"{dense[n] / times[name][n]:.2f}" for n in BATCHES]
        difference = float(jnp.abs(runs[name](np.asarray(x)) - outputs).max())
        sizes = f"{len(content):,} | {len(gzip.compress(content)):,}"
        print(f"| {name} | {sizes} | {' | '.join([*ms, *ratios])} | {difference:.1g} |", flush=True)
    dense_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(eqx.filter(plain, eqx.is_array)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        ntt.export.save_safetensors(path, sparse)
        content = path.read_bytes()
    share = f"{100 * len(content) / dense_bytes:.1f} %"
    print(f"\nsafetensors: {len(content):,} bytes ({share}), gzip {len(gzip.compress(content)):,}")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="part of a network's name")
    only = parser.parse_args().only
    for title in CASES:
        if only is None or only in title:
            measure(title)


if __name__ == "__main__":
    main()
