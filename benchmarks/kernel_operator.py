"""Measure the operator of a kernel: products beside those by hand, and the eigenpairs of LeNet-5's.

    python benchmarks/kernel_operator.py products
    python benchmarks/kernel_operator.py eigenpairs --checkpoint eigenpairs.npz
    python benchmarks/kernel_operator.py by-layer

CPU seconds of the process, medians of several turns of all candidates in one process. The
eigenpairs are those of the full kernel, `[N K, N K]`, of the first images of Fashion-MNIST;
stopped, they go on from the checkpoint.
"""

import argparse
import json
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import ntt_eqx as ntt

PLACE = Path(__file__).parent / "results" / "kernel_operator.json"
NETWORKS = {"LeNet-300-100": ntt.models.LeNet300100, "LeNet-5": ntt.models.LeNet5}
BLOCKS = (8, 16)


def images(count, name="fashion-mnist"):
    data = ntt.data.load_dataset(name)
    return np.asarray(ntt.data.as_batch(data.train[:count], mean=data.mean, std=data.std).x)


@eqx.filter_jit
def by_hand(model, x, v, size):
    """One VJP and one JVP for each block of samples, as one writes them."""
    params, static = eqx.partition(model, eqx.is_inexact_array)
    blocks = lambda a: a.reshape(-1, size, *a.shape[1:])
    outputs = lambda x: lambda p: jax.vmap(eqx.combine(p, static))(x)

    def pull(total, block):
        (found,) = jax.vjp(outputs(block[0]), params)[1](block[1])
        return jax.tree.map(jnp.add, total, found), None

    zeros = jax.tree.map(jnp.zeros_like, params)
    tangent, _ = jax.lax.scan(pull, zeros, (blocks(x), blocks(v)))
    push = lambda x: jax.jvp(outputs(x), (params,), (tangent,))[1]
    return jax.lax.map(push, blocks(x)).reshape(v.shape)


def seconds(calls, turns):
    """Median CPU seconds of each call; the candidates take turns."""
    for call in calls.values():
        jax.block_until_ready(call())
    found = {name: [] for name in calls}
    for _ in range(turns):
        for name, call in calls.items():
            begin = time.process_time()
            jax.block_until_ready(call())
            found[name].append(time.process_time() - begin)
    return {name: statistics.median(times) for name, times in found.items()}


def products(args):
    rows, rng = [], np.random.default_rng(0)
    x = jnp.asarray(images(args.images))
    for name, kind in NETWORKS.items():
        model = kind(key=jax.random.key(0))
        operator = ntt.ntk_operator(model, x)
        v = jnp.asarray(rng.normal(size=(args.images, 10)), jnp.float32)
        calls: dict[str, Any] = {"product": lambda operator=operator, v=v: operator.mv(v)}
        for size in (50, args.images):
            hand = lambda size=size, model=model, v=v: by_hand(model, x, v, size)
            calls[f"by hand, {size} at once"] = hand
        for width in BLOCKS:
            many = jnp.asarray(rng.normal(size=(args.images, 10, width)), jnp.float32)
            calls[f"block of {width}"] = lambda operator=operator, many=many: operator.mv(many)
        rows.append({"network": name, "cpu_seconds": seconds(calls, args.turns)})
        print(rows[-1], flush=True)
    return {"images": args.images, "rows": rows}


def by_layer(args):
    rows, x = [], images(args.images)
    for name, kind in NETWORKS.items():
        model = kind(key=jax.random.key(0))
        whole = jax.jit(lambda x, model=model: ntt.ntk(model, x))
        layers = jax.jit(lambda x, model=model: ntt.ntk(model, x, by_layer=True))
        calls = {"whole": lambda f=whole: f(x), "by layer": lambda f=layers: f(x)}
        rows.append({"network": name, "cpu_seconds": seconds(calls, args.turns)})
        print(rows[-1], flush=True)
    return {"images": args.images, "rows": rows}


def eigenpairs(args):
    model = ntt.models.LeNet5(key=jax.random.key(0))
    operator = ntt.ntk_operator(model, images(args.images))
    v = jnp.zeros(operator.in_structure().shape, jnp.float32)
    one = seconds({"product": lambda: operator.mv(v)}, 1)["product"]
    print(f"a product takes {one:.2f} CPU seconds", flush=True)
    begin = time.process_time(), time.monotonic()
    pairs = ntt.top_eigenpairs(operator, args.pairs, checkpoint=args.checkpoint)
    return {
        "images": args.images,
        "pairs": args.pairs,
        "product_cpu_seconds": one,
        "products": pairs.num_products,
        "cpu_seconds": time.process_time() - begin[0],
        "wall_seconds": time.monotonic() - begin[1],
        "peak_gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "values": pairs.values.tolist(),
        "residuals": (pairs.residuals / pairs.values[0]).tolist(),
    }


PARTS = {"products": products, "eigenpairs": eigenpairs, "by-layer": by_layer}
IMAGES = {"products": 250, "eigenpairs": 10_000, "by-layer": 32}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--images", type=int)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args()
    args.images = args.images or IMAGES[args.part]
    found = PARTS[args.part](args)
    print({name: value for name, value in found.items() if name != "values"}, flush=True)
    results = json.loads(PLACE.read_text()) if PLACE.exists() else {}
    results[args.part] = {"jax": jax.__version__, **found}
    PLACE.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
