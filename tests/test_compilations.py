"""How many programs XLA compiles: operations one by one, outside of `jit`, are a program each."""

import collections
import contextlib
import functools

import equinox as eqx
import jax
import numpy as np
import optax
import pytest

import ntt_eqx as ntt

RNG = np.random.default_rng(0)
X = RNG.normal(size=(16, 20)).astype(np.float32)
Y = np.arange(16) % 5
ADAM = optax.adam(1e-3)
CONFIG = ntt.NTTConfig(density=0.2, num_steps=6, mask_every=2)


@functools.cache  # what its initialisation compiles is not counted
def model():
    return eqx.nn.MLP(20, 5, 32, 2, key=jax.random.key(0))


@contextlib.contextmanager
def compiled():
    """The names of the programs that are compiled inside the block, and how often each."""
    names = collections.Counter()

    def note(event, duration, **about):
        if event.endswith("backend_compile_duration"):
            names[about.get("fun_name")] += 1

    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


# What runs in milliseconds takes seconds to compile in a hundred pieces. The limits are a few above
# what is needed now, which is less than one for each operation and shape.
WORK = {
    "ntt_init": (22, lambda: ntt.ntt_init(model(), CONFIG, ADAM)),
    "transfer": (60, lambda: ntt.transfer(ntt.ntt_init(model(), CONFIG, ADAM), [X] * 6)),
    "train": (54, lambda: ntt.train(ntt.sparsify(model()), [(X, Y)] * 6, ADAM, num_steps=6)),
    "evaluate": (16, lambda: ntt.evaluate(model(), (X, Y))),
    "magnitude": (26, lambda: ntt.prune(model(), ntt.scores.Magnitude(), 0.2)),
    "snip": (54, lambda: ntt.prune(model(), ntt.scores.Snip(), 0.2, (X, Y))),
    "ntk": (4, lambda: ntt.ntk(model(), X)),
}


@pytest.mark.parametrize("name", WORK)
def test_few_programs_are_compiled(name):
    limit, work = WORK[name]
    model()
    with compiled() as names:
        work()
    assert sum(names.values()) <= limit, names.most_common()


def test_a_step_is_one_program_and_compiles_once():
    state = ntt.ntt_init(model(), CONFIG, ADAM)
    step = eqx.filter_jit(ntt.ntt_step)
    with compiled() as names:
        for _ in range(5):  # refreshes among them
            state, _ = step(state, X)
    assert names == {"jit(ntt_step)": 1}
