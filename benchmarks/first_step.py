"""Time the wait before the first step: imports, the state, trace, lowering, compilation.

    python benchmarks/first_step.py
    python benchmarks/first_step.py --cases mlp4 mlp32 scan32 --pieces kernel kernel_jacobian

Every row is a process of its own, run once with an empty and once with a filled cache of compiled
programs; both may be run several times (`--repeats`), and medians are shown. All columns are CPU
seconds, which differ less from run to run than the time on the clock, except `programs`: how many
XLA compiled. `total` has everything after the imports; `cached` is the total with a filled cache.
The pieces that end in `jacobian` do the same by explicit Jacobians of one sample in plain JAX.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

CASES = ("lenet300100", "lenet5", "mlp4", "mlp8", "mlp16", "mlp32", "scan32")
STEPS = {
    "published": {"mask_every": 100},
    "one_mask": {"mask_every": None},
    "ambient": {"mask_every": None, "kernel": "ambient"},
}
PIECES = (*STEPS, "step_jacobian", "kernel", "kernel_jacobian")
COLUMNS = ("imports", "state", "trace", "lower", "compile", "run", "total", "programs", "cached")


def main() -> None:
    """Measure the rows that are asked for, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["lenet300100", "lenet5"])
    parser.add_argument("--pieces", nargs="+", choices=PIECES, default=list(PIECES))
    parser.add_argument("--repeats", type=int, default=1, help="runs of each row (default: 1)")
    parser.add_argument("--json", metavar="FILE", help="write all rows")
    parser.add_argument("--row", nargs=2, metavar=("CASE", "PIECE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        print(json.dumps(measure(*options.row)))
        return
    rows = []
    print(f"{'case':<12} {'piece':<16}" + "".join(f"{c:>9}" for c in COLUMNS))
    for case in options.cases:
        for piece in options.pieces:
            found = [in_a_process(case, piece) for _ in range(options.repeats)]
            row = {c: statistics.median(one[c] for one in found) for c in COLUMNS}
            rows.append({"case": case, "piece": piece, **row})
            shown = "".join(f"{row[c]:9.0f}" if c == "programs" else f"{row[c]:9.2f}" for c in row)
            print(f"{case:<12} {piece:<16}{shown}", flush=True)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(rows, file, indent=1)


def in_a_process(case: str, piece: str) -> dict[str, float]:
    """A row, measured with an empty cache of compiled programs and then with what it left there."""
    with tempfile.TemporaryDirectory() as cache:
        kept = {
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        command = [sys.executable, __file__, "--row", case, piece]
        # A process without the cache: what it costs to write there is not what is asked for.
        cold = _row(command, {"JAX_ENABLE_COMPILATION_CACHE": "false"})
        _row(command, kept)
        return {**cold, "cached": _row(command, kept)["total"]}


def _row(command: list[str], variables: dict[str, str]) -> dict[str, float]:
    output = subprocess.run(
        command, env={**os.environ, **variables}, check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    return json.loads(output.splitlines()[-1])


def measure(case: str, piece: str) -> dict[str, float]:
    """One row, in this process."""
    row: dict[str, float] = {}

    def timed(column: str, work: Callable[[], Any]) -> Any:
        start = time.process_time()
        found = work()
        row[column] = time.process_time() - start
        return found

    timed("imports", _imports)
    import jax

    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(_noted(compiled))
    model, x = make_case(case)
    compiled.clear()
    make = make_kernel if piece.startswith("kernel") else make_step
    function, arguments = timed("state", lambda: jax.block_until_ready(make(piece, model, x)))
    traced = timed("trace", lambda: jax.jit(function).trace(arguments))
    lowered = timed("lower", traced.lower)
    program = timed("compile", lowered.compile)
    timed("run", lambda: jax.block_until_ready(program(arguments)))
    row["total"] = sum(seconds for column, seconds in row.items() if column != "imports")
    return {**row, "programs": len(compiled)}


def _noted(compiled: list[str]) -> Callable[..., None]:
    def note(event: str, duration_secs: float, **_: Any) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    return note


def _imports() -> None:
    import optax  # noqa: F401

    import ntt_eqx  # noqa: F401


def make_case(case: str) -> tuple[Any, Any]:
    """The model of a case and its batch, of 64 samples, or of 16 for an explicit kernel's sake."""
    import equinox as eqx
    import jax
    from cases import CASES as MODELS

    key, data = jax.random.split(jax.random.key(0))
    if case in MODELS:
        return MODELS[case].teacher(key), MODELS[case].samples(data, 64)
    depth = int(case.removeprefix("mlp").removeprefix("scan"))
    x = jax.random.normal(data, (64, 64))
    if case.startswith("mlp"):
        return eqx.nn.MLP(64, 10, 64, depth, key=key), x

    class Scanned(eqx.Module):
        """As many layers as iterations of one scan, and a head."""

        layers: eqx.nn.Linear
        head: eqx.nn.Linear

        def __call__(self, x: Any) -> Any:
            arrays, static = eqx.partition(self.layers, eqx.is_array)
            layer = lambda h, one: (jax.nn.relu(eqx.combine(one, static)(h)), None)
            return self.head(jax.lax.scan(layer, x, arrays)[0])

    one = eqx.filter_vmap(lambda key: eqx.nn.Linear(64, 64, key=key))
    keys = jax.random.split(key, depth + 1)
    return Scanned(one(keys[1:]), eqx.nn.Linear(64, 10, key=keys[0])), x


def make_step(piece: str, model: Any, x: Any) -> tuple[Callable[[Any], Any], Any]:
    """A whole step of a transfer as a function of arrays, and these."""
    import equinox as eqx
    import optax

    import ntt_eqx as ntt

    optimizer = optax.adam(5e-4)
    if piece == "step_jacobian":
        return jacobian_step(optimizer, model, x)
    config = ntt.NTTConfig(density=0.03, num_steps=1000, **STEPS[piece])  # pyright: ignore
    state = ntt.ntt_init(model, config, optimizer)
    arrays, static = eqx.partition((state, x), eqx.is_array)

    def step(arrays: Any) -> Any:
        return eqx.filter(ntt.ntt_step(*eqx.combine(arrays, static)), eqx.is_array)

    return step, arrays


def make_kernel(piece: str, model: Any, x: Any) -> tuple[Callable[[Any], Any], Any]:
    """The kernel of a dense model as a function of arrays, and these."""
    import equinox as eqx

    import ntt_eqx as ntt

    arrays, static = eqx.partition((model, x), eqx.is_array)

    def kernel(arrays: Any) -> Any:
        model, x = eqx.combine(arrays, static)
        if piece == "kernel":
            return ntt.ntk(model, x)
        weights, rest = eqx.partition(model, eqx.is_inexact_array)
        return jacobian_kernel(lambda w, one: eqx.combine(w, rest)(one), weights, x, x)

    return kernel, arrays


def jacobian_kernel(f: Callable[[Any, Any], Any], weights: Any, x1: Any, x2: Any) -> Any:
    """The kernel `[N, M, K, K]` of `f(weights, sample)` by explicit Jacobians."""
    import jax
    import jax.numpy as jnp

    jacobian = jax.vmap(jax.jacrev(f), (None, 0))
    one, two = (jax.tree.leaves(jacobian(weights, x)) for x in (x1, x2))
    flat = lambda j: j.reshape(*j.shape[:2], -1)
    return sum(jnp.einsum("nkp,mlp->nmkl", flat(a), flat(b)) for a, b in zip(one, two, strict=True))


def jacobian_step(optimizer: Any, model: Any, x: Any) -> tuple[Callable[[Any], Any], Any]:
    """A step on the transfer loss in plain JAX and optax, for a mask that stays."""
    import equinox as eqx
    import jax
    import jax.numpy as jnp
    import optax

    import ntt_eqx as ntt

    sparse = ntt.prune(model, ntt.scores.Magnitude(), 0.03)
    weights, rest = eqx.partition(model, eqx.is_inexact_array)
    unpruned = lambda w: None if w is None else jnp.ones(w.shape, bool)
    masks = jax.tree.map(
        lambda w, m: unpruned(w) if m is None else m,
        weights,
        eqx.filter(sparse.mask, eqx.is_array),
        is_leaf=lambda leaf: leaf is None,
    )

    def step(arrays: Any) -> Any:
        weights, teacher, opt_state, masks, x = arrays
        f = lambda w, sample: eqx.combine(w, rest)(sample)
        half = len(x) // 2

        def loss(weights: Any) -> Any:
            masked = lambda w, m: jnp.where(m, w, 0)
            kept = lambda w, sample: f(jax.tree.map(masked, w, masks), sample)
            outputs, wanted = (jax.vmap(g, (None, 0)) for g in (kept, f))
            student = jacobian_kernel(kept, weights, x[:half], x[half:])
            target = jacobian_kernel(f, teacher, x[:half], x[half:])
            norm = sum(jnp.sum(jnp.square(w)) for w in jax.tree.leaves(weights))
            distance = jnp.mean((student - target) ** 2)
            return (
                jnp.mean((outputs(weights, x) - wanted(teacher, x)) ** 2)
                + 1e-3 * distance
                + 1e-4 * norm
            )

        value, gradient = jax.value_and_grad(loss)(weights)
        updates, opt_state = optimizer.update(gradient, opt_state, weights)
        return optax.apply_updates(weights, updates), opt_state, value

    return step, (weights, weights, optimizer.init(weights), masks, x)


if __name__ == "__main__":
    main()
