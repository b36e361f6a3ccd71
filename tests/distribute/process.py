"""One of several processes: `python process.py MODE PROCESS COUNT ADDRESS FOLDER`.

Not a test: `test_processes.py` starts it. What process 0 found is left in the folder as JSON.
"""

import json
import pathlib
import sys

import equinox as eqx
import jax
import numpy as np
import optax
from helpers.devices import model_and_samples
from jax.experimental import multihost_utils

import ntt_eqx as ntt

mode, number, count, address, folder = sys.argv[1], *map(int, sys.argv[2:4]), *sys.argv[4:6]
jax.config.update("jax_num_cpu_devices", 8 // count)
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


with ntt.distribute():
    found = {"losses": losses, "local": local_batch}[mode]()
if number == 0:
    pathlib.Path(folder, "found.json").write_text(json.dumps(found))
