"""Time tangent kernels and their products beside other libraries: same weights, same images.

    python benchmarks/other_libraries.py --peer torch=PYTHON --peer neural-tangents=PYTHON

Each library runs in a process of its own, with the Python that is named after it, in turn. It gets
the weights and the images from a file and computes the whole kernel of a few images, `[N, N, 10,
10]`, and the product of the kernel of more images with a vector. CPU seconds of the process, so
that other work on the machine and the number of threads do not count; medians of several calls
after a first one. Results are compared with those of `ntt_eqx`.

laplax has no kernel but its dual, the Gauss-Newton matrix of the parameters, which has the same
eigenvalues: its product is timed, beside the same by hand.

All of neural-tangents 0.6.5 runs on JAX up to 0.4.25: `pip install jax==0.4.25 jaxlib==0.4.25
frozendict typing_extensions absl-py dm-tree tensorflow-cpu==2.16.2 "scipy<1.13"`, then `pip install
--no-deps neural-tangents==0.6.5 tf2jax==0.3.6`. `pip install torch`, `pip install laplax` for the
others.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

PLACE = Path(__file__).parent / "results" / "other_libraries.json"
LAYERS = {
    "LeNet-300-100": ("hidden1", "hidden2", "output"),
    "LeNet-5": ("conv1", "conv2", "hidden", "output"),
}
OURS = "ntt_eqx"


# The work of each library. A peer gives, for a network's weights, functions of images.


def jax_network(name):
    """The network as a function `(weights, batch) -> logits` of JAX."""
    import jax
    import jax.numpy as jnp

    def pooled(h):
        h = jax.nn.relu(h)
        window = (1, 1, 2, 2)
        return jax.lax.reduce_window(h, -jnp.inf, jax.lax.max, window, window, "VALID")

    def network(weights, x):
        h = x
        for n, (w, b) in enumerate(weights):
            if w.ndim == 4:
                h = jax.lax.conv(h, w, (1, 1), "VALID") + b.reshape(1, -1, 1, 1)
                h = pooled(h)
            else:
                h = h.reshape(len(h), -1) @ w.T + b
                h = jax.nn.relu(h) if n + 1 < len(weights) else h
        return h

    return network


def ours(name, weights):
    import equinox as eqx
    import jax
    import jax.numpy as jnp

    import ntt_eqx as ntt

    kind = {"LeNet-300-100": ntt.models.LeNet300100, "LeNet-5": ntt.models.LeNet5}[name]
    model = kind(key=jax.random.key(0))
    for layer, (w, b) in zip(LAYERS[name], weights, strict=True):
        old = getattr(model, layer)
        values = jnp.asarray(w), jnp.asarray(b.reshape(old.bias.shape))
        new = eqx.tree_at(lambda o: (o.weight, o.bias), old, values)
        model = eqx.tree_at(lambda m, layer=layer: getattr(m, layer), model, new)
    kernel = lambda x: jax.block_until_ready(ntt.ntk(model, jnp.asarray(x)))

    known = {}  # the operator, made once

    def product(x, v):
        if not known:
            known["operator"] = ntt.ntk_operator(model, jnp.asarray(x))
        return jax.block_until_ready(known["operator"].mv(jnp.asarray(v)))

    return ntt.__version__, {"kernel": kernel, "product": product}


def by_hand(name, weights):
    """JAX as one writes it: Jacobians of all samples, and one VJP and one JVP."""
    import jax
    import jax.numpy as jnp

    network, weights = jax_network(name), jax.tree.map(jnp.asarray, weights)

    @jax.jit
    def kernel(x):
        one = lambda w, x: network(w, x[None])[0]
        jacobians = jax.vmap(jax.jacrev(one), (None, 0))(weights, x)
        flat = (j.reshape(*j.shape[:2], -1) for j in jax.tree.leaves(jacobians))
        return sum(jnp.einsum("nkp,mlp->nmkl", j, j) for j in flat)

    @jax.jit
    def product(x, v):
        outputs = lambda w: network(w, x)
        (tangent,) = jax.vjp(outputs, weights)[1](v)
        return jax.jvp(outputs, (weights,), (tangent,))[1]

    @jax.jit
    def gauss_newton(x, tangent):
        outputs = lambda w: network(w, x)
        along = jax.jvp(outputs, (weights,), (tangent,))[1]
        return jax.vjp(outputs, weights)[1](along)[0]

    wait = lambda f: lambda *a: jax.block_until_ready(f(*map(jnp.asarray, a)))
    made = {"kernel": wait(kernel), "product": wait(product)}
    return jax.__version__, made | {"GGN product": of_tangents(network, weights, gauss_newton)}


def of_tangents(network, weights, gauss_newton):
    """A product `[P, P]` as a function of images and outputs' vectors, whose tangent is known."""
    import jax
    import jax.numpy as jnp

    known = {}

    def product(x, v):
        if not known:
            x, v = jnp.asarray(x), jnp.asarray(v)
            pull = jax.jit(lambda x, v: jax.vjp(lambda w: network(w, x), weights)[1](v)[0])
            known.update(x=x, tangent=pull(x, v))
        found = jax.block_until_ready(gauss_newton(known["x"], known["tangent"]))
        return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(found)])

    return product


def laplax(name, weights):
    import importlib.metadata

    import jax
    import jax.numpy as jnp
    from laplax.curv.ggn import create_ggn_mv_without_data  # pyright: ignore[reportMissingImports]
    from laplax.enums import LossFn  # pyright: ignore[reportMissingImports]

    network, weights = jax_network(name), jax.tree.map(jnp.asarray, weights)
    one = lambda input, params: network(params, input[None])[0]
    multiply = create_ggn_mv_without_data(one, weights, LossFn.NONE, 1.0)
    data = lambda x: {"input": x, "target": jnp.zeros(len(x))}
    product = jax.jit(lambda x, tangent: multiply(tangent, data(x)))
    version = f"{importlib.metadata.version('laplax')} on JAX {jax.__version__}"
    return version, {"GGN product": of_tangents(network, weights, product)}


def neural_tangents(name, weights):
    import jax
    import jax.numpy as jnp
    import neural_tangents as nt  # pyright: ignore[reportMissingImports]

    network, weights = jax_network(name), jax.tree.map(jnp.asarray, weights)
    made = {}
    for way in nt.NtkImplementation:
        f = nt.empirical_ntk_fn(
            lambda w, x: network(w, x), trace_axes=(), vmap_axes=0, implementation=way
        )
        made[f"kernel, {way.name.lower()}"] = jax.jit(lambda x, f=f: f(x, None, weights))
    made["product"] = jax.jit(
        lambda x, v: nt.empirical_ntk_vp_fn(lambda w, x: network(w, x), x, None, weights)(v)
    )
    wait = lambda f: lambda *a: jax.block_until_ready(f(*map(jnp.asarray, a)))
    return f"{nt.__version__} on JAX {jax.__version__}", {n: wait(f) for n, f in made.items()}


def torch_func(name, weights):
    """The contraction of PyTorch's tutorial on tangent kernels, and its NTK-vector product."""
    import torch  # pyright: ignore[reportMissingImports]
    import torch.nn.functional as F  # pyright: ignore[reportMissingImports]
    from torch.func import jacrev, jvp, vjp, vmap  # pyright: ignore[reportMissingImports]

    weights = [tuple(torch.from_numpy(np.array(a)) for a in pair) for pair in weights]

    def network(weights, h):
        for n, (w, b) in enumerate(weights):
            if w.ndim == 4:
                h = F.max_pool2d(F.relu(F.conv2d(h, w, b)), 2)
            else:
                h = F.linear(h.flatten(1), w, b)
                h = F.relu(h) if n + 1 < len(weights) else h
        return h

    def kernel(x):
        one = lambda w, x: network(w, x[None])[0]
        jacobians = vmap(jacrev(one), (None, 0))(weights, torch.from_numpy(x))
        flat = [j.flatten(2) for pair in jacobians for j in pair]
        parts = [torch.einsum("nkp,mlp->nmkl", j, j) for j in flat]
        return torch.stack(parts).sum(0).numpy()

    def product(x, v):
        outputs = lambda w: network(w, torch.from_numpy(x))
        _, back = vjp(outputs, weights)
        (tangent,) = back(torch.from_numpy(v))
        return jvp(outputs, (weights,), (tangent,))[1].detach().numpy()

    return torch.__version__, {"kernel": kernel, "product": product}


PEERS = {
    OURS: ours,
    "jax": by_hand,
    "neural-tangents": neural_tangents,
    "torch": torch_func,
    "laplax": laplax,
}


# Timing


def work(peer, name, given, place, turns):
    """Time a peer's calls in its own process, and store their results."""
    data = np.load(given)
    layers = LAYERS[name]
    weights = [(data[f"{layer}.weight"], data[f"{layer}.bias"]) for layer in layers]
    version, calls = PEERS[peer](name, weights)
    rows, results = {}, {}
    for what, call in calls.items():
        inputs = [data["few"]] if what.startswith("kernel") else [data["many"], data["v"]]
        begin = time.process_time()
        result = np.asarray(call(*inputs))
        first = time.process_time() - begin
        spent = []
        for _ in range(turns):
            begin = time.process_time()
            call(*inputs)
            spent.append(time.process_time() - begin)
        rows[what] = {"cpu_seconds": statistics.median(spent), "first_call": first}
        results[what] = result
    np.savez(place, rows=np.array(json.dumps({"version": version, "rows": rows})), **results)


def given_to_all(name, few, many, path):
    import jax

    import ntt_eqx as ntt

    data = ntt.data.load_dataset("fashion-mnist-mini")
    x = np.asarray(ntt.data.as_batch(data.train, mean=data.mean, std=data.std).x)
    kind = {"LeNet-300-100": ntt.models.LeNet300100, "LeNet-5": ntt.models.LeNet5}[name]
    model = kind(key=jax.random.key(0))
    arrays = {}
    for layer in LAYERS[name]:
        arrays[f"{layer}.weight"] = np.asarray(getattr(model, layer).weight)
        arrays[f"{layer}.bias"] = np.asarray(getattr(model, layer).bias).reshape(-1)
    v = np.random.default_rng(0).normal(size=(many, 10)).astype(np.float32)
    np.savez(path, few=x[:few], many=x[:many], v=v, **arrays)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", action="append", default=[], help="NAME or NAME=PYTHON")
    parser.add_argument("--network", choices=LAYERS, nargs="+", default=list(LAYERS))
    parser.add_argument("--few", type=int, default=32, help="images of the kernel")
    parser.add_argument("--many", type=int, default=250, help="images of the product")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        peer, name, given, place = args.work
        work(peer, name, given, place, args.turns)
        return
    pythons = {OURS: sys.executable, "jax": sys.executable}
    for text in args.peer:
        name, _, python = text.partition("=")
        pythons[name] = python or sys.executable
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in args.network:
            given = f"{folder}/given.npz"
            given_to_all(name, args.few, args.many, given)
            expected = {}
            for peer, python in pythons.items():
                place = f"{folder}/found.npz"
                command = [python, __file__, "--turns", str(args.turns), "--work"]
                subprocess.run([*command, peer, name, given, place], check=True)
                found = dict(np.load(place))
                said = json.loads(str(found.pop("rows")))
                for what, result in found.items():
                    kind = what.split(",")[0]
                    right = expected.setdefault(kind, result.reshape(-1))
                    error = np.abs(result.reshape(-1) - right).max() / np.abs(right).max()
                    row = {"network": name, "library": peer, "version": said["version"]}
                    row |= {"what": what, **said["rows"][what], "difference": float(error)}
                    rows.append(row)
                    print(row, flush=True)
    before = json.loads(PLACE.read_text())["rows"] if PLACE.exists() else []
    rows += [row for row in before if row["network"] not in args.network]  # of an earlier run
    found = {"few": args.few, "many": args.many, "rows": rows}
    PLACE.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
