"""Measure the operator of a kernel: a product beside one by hand, and eigenpairs of LeNet-5's.

    python benchmarks/kernel_operator.py

CPU seconds of the process, medians of several turns of all candidates. The count of
products for the eigenpairs of the full kernel of some images, and the time of one product with
10,000 images, say what the eigenpairs of those take.
"""

import argparse
import json
import resource
import statistics
import time
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import ntt_eqx as ntt

PLACE = Path(__file__).parent / "results" / "kernel_operator.json"
BLOCK = 8


def by_hand(model, x, v):
    """One VJP and one JVP a block of 50 samples, as one writes them."""
    params, static = eqx.partition(model, eqx.is_inexact_array)
    blocks = lambda a: a.reshape(-1, 50, *a.shape[1:])
    outputs = lambda x: lambda p: jax.vmap(eqx.combine(p, static))(x)

    def pull(total, block):
        (found,) = jax.vjp(outputs(block[0]), params)[1](block[1])
        return jax.tree.map(jnp.add, total, found), None

    zeros = jax.tree.map(jnp.zeros_like, params)
    tangent, _ = jax.lax.scan(pull, zeros, (blocks(x), blocks(v)))
    push = lambda x: jax.jvp(outputs(x), (params,), (tangent,))[1]
    return jax.lax.map(push, blocks(x)).reshape(v.shape)


def seconds(calls, turns):
    """Median CPU seconds of each call, and of each turn's ratios to the first call."""
    for call in calls.values():
        jax.block_until_ready(call())
    found = {name: [] for name in calls}
    for _ in range(turns):
        for name, call in calls.items():
            begin = time.process_time()
            jax.block_until_ready(call())
            found[name].append(time.process_time() - begin)
    return {name: statistics.median(times) for name, times in found.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--large", type=int, default=10_000, help="for the time of one product")
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()
    data = ntt.data.load_dataset("fashion-mnist-mini")
    x = ntt.data.as_batch(data.train, mean=data.mean, std=data.std).x
    model, rng = ntt.models.LeNet5(key=jax.random.key(0)), np.random.default_rng(0)
    small = x[: args.images]
    operator = ntt.ntk_operator(model, small)
    v = jnp.asarray(rng.normal(size=(args.images, 10)), jnp.float32)
    many = jnp.asarray(rng.normal(size=(args.images, 10, BLOCK)), jnp.float32)
    hand = jax.jit(lambda v: by_hand(model, small, v))
    found = seconds(
        {
            "by hand": lambda: hand(v),
            "product": lambda: operator.mv(v),
            f"block of {BLOCK}": lambda: operator.mv(many),
        },
        args.turns,
    )
    print(found, flush=True)
    result = {"jax": jax.__version__, "images": args.images, "cpu_seconds": found}

    class Counted(ntt.AbstractNTKOperator):
        inner: ntt.NTKOperator
        calls: list

        def mv(self, v):
            self.calls.append(1 if v.ndim == 2 else v.shape[2])
            return self.inner.mv(v)

        def transpose(self):
            return self

        def in_structure(self):
            return self.inner.in_structure()

        def out_structure(self):
            return self.inner.out_structure()

        @property
        def is_symmetric(self):
            return True

    calls = []
    begin = time.process_time()
    pairs = ntt.top_eigenpairs(Counted(operator, calls), args.pairs)
    spent = time.process_time() - begin
    result["eigenpairs"] = {
        "pairs": args.pairs,
        "products": sum(n for n in calls if n == 1),
        "products_in_blocks": sum(n for n in calls if n > 1),
        "cpu_seconds": spent,
        "largest": float(pairs.values[0]),
        "least": float(pairs.values[-1]),
        "largest_residual": float(pairs.residuals.max()),
    }
    print(result["eigenpairs"], flush=True)
    large = np.resize(x, (args.large, *x.shape[1:]))  # only the time of a product is asked for
    operator = ntt.ntk_operator(model, large)
    v = jnp.asarray(rng.normal(size=(args.large, 10)), jnp.float32)
    found = seconds({"product": lambda: operator.mv(v)}, 1)
    result["large_images"], result["large_product"] = args.large, found["product"]
    result["peak_gigabytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(result, flush=True)
    PLACE.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
