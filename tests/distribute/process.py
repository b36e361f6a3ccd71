"""One of several processes: `python process.py MODE PROCESS COUNT ADDRESS FOLDER DEVICES`.

Not a test: `test_processes.py` starts it. What process 0 found is left in the folder as JSON.
"""

import hashlib
import json
import pathlib
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from helpers.devices import model_and_samples
from jax.experimental import multihost_utils

import ntt_eqx as ntt
from ntt_eqx.experiment.checkpoint import Checkpoint, CheckpointStore
from ntt_eqx.experiment.claims import claimed

mode, number, count, address, folder = sys.argv[1], *map(int, sys.argv[2:4]), *sys.argv[4:6]
jax.config.update("jax_num_cpu_devices", int(sys.argv[6]) // count)
if count > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, count, number)


def transfer(num_steps):
    model, x = model_and_samples("mlp", 96)
    split = ntt.data.Split(np.asarray(x, np.float32), np.zeros(96, np.int32))
    model = jax.tree.map(lambda w: w.astype(np.float32) if eqx.is_array(w) else w, model)
    config = ntt.NTTConfig(density=0.2, mask_every=20, num_steps=60)
    state = ntt.ntt_init(model, config, optax.adam(1e-2))
    batches = ntt.data.batches(split, 32, seed=0)
    return ntt.transfer(state, batches, num_steps=num_steps, log_every=1)


def losses():
    state, history = transfer(50)
    kept = [np.asarray(m).sum() for m in jax.tree.leaves(state.student.mask)]
    x = ntt.data.as_batch(ntt.data.Split(np.ones((8, 12), np.float32), np.zeros(8, np.int32))).x
    theta = ntt.ntk(state.student, x)
    whole = multihost_utils.process_allgather(theta, tiled=True) if count > 1 else theta
    return {
        "losses": [row["train"]["loss"] for row in history if "train" in row],
        "kept": [int(k) for k in kept],
        "trace": float(np.einsum("nnkk->", np.asarray(whole))),
    }


def local_batch():
    model, x = model_and_samples("mlp", 32)
    state = ntt.ntt_init(model, ntt.NTTConfig(density=0.2, num_steps=3), optax.adam(1e-2))
    try:
        ntt.transfer(state, [x.astype(np.float32) + number] * 3)
    except ValueError as error:
        return {"error": str(error)}
    return {"error": None}


def raw_steps():
    """The losses of bare steps on a batch that all processes have, and on one that differs."""
    model, x = model_and_samples("mlp", 32)
    x = np.asarray(x, np.float32)
    state = ntt.ntt_init(model, ntt.NTTConfig(density=0.2, num_steps=3), optax.adam(1e-2))
    step = eqx.filter_jit(ntt.ntt_step)
    state, shared = step(state, x)
    seen = eqx.filter_jit(ntt.ntt_evaluate)(state, x + number).loss
    lost, differs = step(state, x + number)
    weights = [
        bool(jnp.isnan(w).all())
        for w in jax.tree.leaves(eqx.filter(lost.student, eqx.is_inexact_array))
    ]
    return {"losses": [float(shared.loss), float(differs.loss), float(seen)], "lost": weights}


def checkpoint():
    """A state goes on from where another number of devices left it."""
    model, x = model_and_samples("mlp", 32)
    state = ntt.ntt_init(model, ntt.NTTConfig(density=0.2, num_steps=60), optax.adam(1e-2))
    with claimed(pathlib.Path(folder, "run"), "network") as run:
        store = CheckpointStore(run, "transfer")
        found = store.latest(state) or Checkpoint(0, state, {})
        state, read = found.state, digest(found.state)
        step = eqx.filter_jit(ntt.ntt_step)
        for _ in range(3):
            state, _ = step(state, x)
        store.save(Checkpoint(found.step + 3, state, {}))
    return {"step": found.step, "read": read, "written": digest(state)}


def digest(state):
    whole = hashlib.sha256()
    for leaf in jax.tree.leaves(eqx.filter(state, eqx.is_array)):
        whole.update(np.asarray(leaf).tobytes())
    return whole.hexdigest()


def operator():
    """Products of operators of a batch and of streams, and the largest eigenvalues."""
    model, x = model_and_samples("mlp", 13, density=0.3)
    x = np.asarray(x, np.float32)
    v = np.random.default_rng(0).normal(size=(13, 4, 2)).astype(np.float32)
    whole = ntt.ntk_operator(model, x)
    streamed = ntt.streamed_ntk_operator(model, [x[:5], x[5:10], x[10:]])
    return {
        "product": np.asarray(whole.mv(v)).tolist(),
        "streamed": np.asarray(streamed.mv(v)).tolist(),
        "values": ntt.top_eigenpairs(whole, 3).values.tolist(),
        "trace": float(np.asarray(whole.diagonal()).sum()),
    }


modes = {
    "operator": operator,
    "losses": losses,
    "local": local_batch,
    "raw": raw_steps,
    "checkpoint": checkpoint,
}
with ntt.distribute():
    found = modes[mode]()
if number == 0:
    pathlib.Path(folder, "found.json").write_text(json.dumps(found))
