"""Small students, their settings, and what tests of the transfer compare them with."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import ntt_eqx as ntt

DENSITY = 0.3
GATHERED = 0.13  # few enough weights for the kernel to gather them: 4 and 2
# Made once: optimiser and settings are static, so tests that share them share a compiled step.
ADAM = optax.adam(1e-2)
CONFIG = ntt.NTTConfig(density=DENSITY, num_steps=12, mask_every=3, kernel_weight=0.1)


loss_of = eqx.filter_jit(ntt.ntt_loss)
step = eqx.filter_jit(ntt.ntt_step)
evaluated = eqx.filter_jit(ntt.ntt_evaluate)


@eqx.filter_jit
def loss_in(state, student, x):
    """The loss as a step of `state` takes it, with all that the state knows of its mask."""
    return state.method.loss(student, state.teacher, x, state.step_info())


def key_of(number):
    """The key of a step of a state that was started without one."""
    return jax.random.fold_in(jax.random.key(0), number)


class Tiny(eqx.Module):
    """Two dense layers with a smooth non-linearity in between."""

    first: eqx.nn.Linear
    second: eqx.nn.Linear

    def __init__(self, key):
        first, second = jax.random.split(key)
        self.first = eqx.nn.Linear(6, 5, key=first)
        self.second = eqx.nn.Linear(5, 3, key=second)

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x)))


class Noisy(eqx.Module):
    """A convolution, and dropout that needs a key in training."""

    conv: eqx.nn.Conv2d
    dropout: eqx.nn.Dropout
    head: eqx.nn.Linear

    def __init__(self, key):
        first, second = jax.random.split(key)
        self.conv = eqx.nn.Conv2d(1, 3, 2, key=first)
        self.dropout = eqx.nn.Dropout(0.5)
        self.head = eqx.nn.Linear(12, 2, key=second)

    def __call__(self, x, *, key=None):
        h = jnp.tanh(self.conv(x)).reshape(-1)
        return self.head(self.dropout(h, key=key))


def batches(shape=(4, 6), seed=0):
    rng = np.random.default_rng(seed)
    while True:
        yield jnp.asarray(rng.standard_normal(shape), jnp.float32)


def start(getkey, config=CONFIG, optimizer=ADAM, **kwargs):
    return ntt.ntt_init(Tiny(getkey()), config, optimizer, **kwargs)


def moved(sparse, key, scale=0.1):
    """The same sparse model with noise on every float leaf, those under the mask too."""
    params, static = eqx.partition(sparse, eqx.is_inexact_array)
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    leaves = [
        w + scale * jax.random.normal(k, w.shape, w.dtype)
        for w, k in zip(leaves, keys, strict=True)
    ]
    return eqx.combine(jax.tree.unflatten(treedef, leaves), static)


def random_mask(model, key, density=DENSITY):
    return ntt.make_mask(ntt.scores.Random(key)(model), density)


def magnitude_mask(sparse, density=DENSITY, scope="layer"):
    """By a sort, and with no code of the library."""
    leaves, treedef = jax.tree.flatten(sparse.mask)
    sizes = [
        np.abs(np.asarray(layer.weight)) for layer in (sparse.model.first, sparse.model.second)
    ]
    assert [s.shape for s in sizes] == [m.shape for m in leaves]

    def keep(values):
        order = np.argsort(-values, kind="stable")
        marks = np.zeros(values.shape, bool)
        marks[order[: round(density * values.size)]] = True
        return marks

    if scope == "layer":
        marks = [keep(s.reshape(-1)) for s in sizes]
    else:
        flat = keep(np.concatenate([s.reshape(-1) for s in sizes]))
        marks = np.split(flat, np.cumsum([s.size for s in sizes])[:-1])
    shaped = [m.reshape(s.shape) for m, s in zip(marks, sizes, strict=True)]
    return jax.tree.unflatten(treedef, shaped)


def same(a, b):
    """Bit for bit, array leaves only."""
    a, b = (jax.tree.leaves(eqx.filter(t, eqx.is_array)) for t in (a, b))
    return len(a) == len(b) and all(
        np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in zip(a, b, strict=True)
    )
