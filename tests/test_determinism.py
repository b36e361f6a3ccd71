"""The same seed gives the same bits; every source of randomness listens to its own seed."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.models import Dropping

import ntt_eqx as ntt
from ntt_eqx import scores
from ntt_eqx.data import Split, batches, hold_out, make_dataset
from ntt_eqx.experiment.cells import plan
from ntt_eqx.experiment.images import parts
from ntt_eqx.experiment.settings import CompareSettings
from ntt_eqx.models import MODELS, make_model

ADAM = optax.adam(1e-2)
CONFIG = ntt.NTTConfig(0.5, num_steps=6, mask_every=2, kernel_weight=0.1)


def network(seed):
    return Dropping((4, 5, 3), jax.random.key(seed), activation="tanh")


def numbered(size=40):
    """Samples of which no two are alike."""
    x = np.random.default_rng(0).normal(size=(size, 4)).astype(np.float32)
    return Split(x, (np.arange(size) % 3).astype(np.int32))


def stream(seed, threads=0):
    return batches(numbered(), 8, seed=seed, num_threads=threads)


def bits(tree):
    """Every array of a tree, and every number of a history."""
    leaves = jax.tree.leaves(eqx.filter(tree, lambda leaf: eqx.is_array(leaf) or leaf is None))
    leaves = [jax.random.key_data(k) if jnp.issubdtype(k.dtype, jax.dtypes.prng_key) else k
              for k in leaves]  # fmt: skip
    return [np.asarray(leaf).tobytes() for leaf in leaves]


def transferred(model=0, data=0, threads=0, config=CONFIG):
    state = ntt.ntt_init(network(model), config, ADAM)
    state, history = ntt.transfer(state, stream(data, threads), log_every=2)
    return bits(state), [row["train"]["loss"] for row in history]


def trained(model=0, data=0, threads=0, dropout=0):
    net = network(model)
    sparse = ntt.sparsify(net).with_mask(ntt.make_mask(scores.Magnitude()(net), 0.5))
    key = jax.random.key(dropout)
    found, history = ntt.train(
        sparse, stream(data, threads), ADAM, num_steps=6, key=key, log_every=2
    )
    return bits(found), [row["train"]["loss"] for row in history]


# Whole runs


@pytest.mark.parametrize("run", [transferred, trained])
def test_a_run_has_the_same_bits_again_and_with_any_number_of_threads(run):
    first = run()
    assert all(run(threads=threads) == first for threads in (0, 2, 4))


@pytest.mark.parametrize(
    ("run", "source"),
    [
        (transferred, "model"),
        (transferred, "data"),
        (trained, "model"),
        (trained, "data"),
        (trained, "dropout"),
    ],
)
def test_a_run_depends_on_each_of_its_seeds(run, source):
    one, two = run(), run(**{source: 1})
    assert one[0] != two[0] and one[1] != two[1]


# Single sources: a function of a seed


def image_examples(seed):
    used, _ = parts(make_dataset("numbered", numbered(), numbered(6), 3), 0.0, 0)
    return used.examples(10, seed=seed)


def mask_of_half(seed=0):
    return ntt.make_mask(scores.Random(jax.random.key(seed))(network(0)), 0.5)


def pruned(seed):
    return ntt.sparsify(network(0)).with_mask(mask_of_half(seed))


SOURCES = {
    "weights": lambda seed: make_model("lenet-300-100", (1, 4, 4), 2, key=jax.random.key(seed)),
    "data order": lambda seed: next(stream(seed)).x,
    "data order of a later epoch": lambda seed: [b.x for b, _ in zip(stream(seed), range(9))][-1],
    "held-out split": lambda seed: jnp.asarray(hold_out(numbered(), 0.2, seed=seed)[1].x),
    "random mask": mask_of_half,
    "NTK-SAP": lambda seed: scores.NTKSAP(jax.random.key(seed), rounds=1)(network(0), numbered().x),
    "weighted random": lambda s: scores.WeightedRandom(jax.random.key(s))(network(0), numbered().x),
    "score examples": image_examples,
    "sketch directions": lambda seed: ntt.sketch_directions(jax.random.key(seed), 2, 4),
    "shuffled mask": lambda seed: ntt.shuffle_mask(mask_of_half(), jax.random.key(seed)),
    "reinitialised weights": lambda seed: ntt.reinitialise(pruned(0), jax.random.key(seed)),
    "weights from a function": lambda seed: ntt.reinitialise(
        pruned(0), jax.random.key(seed), lambda key: ntt_init_of(key)
    ),
}


def ntt_init_of(key):
    fresh = network(0)
    draw = lambda w, k: jax.random.normal(k, w.shape, w.dtype)
    weights = lambda m: (m.first.weight, m.second.weight)
    drawn = [draw(w, k) for w, k in zip(weights(fresh), jax.random.split(key), strict=True)]
    return eqx.tree_at(weights, fresh, drawn)


@pytest.mark.parametrize("name", SOURCES)
def test_a_source_listens_to_its_seed(name):
    draw = SOURCES[name]
    drawn = [bits(draw(seed)) for seed in range(3)]
    assert drawn[0] == bits(draw(0))
    assert drawn[0] != drawn[1] and drawn[1] != drawn[2] and drawn[0] != drawn[2]
    assert all(drawn), "nothing was drawn"


@pytest.mark.parametrize("name", sorted(set(MODELS) - {"lenet-300-100"}))
def test_every_model_draws_every_weight_from_its_key(name):
    """Without computing: no array of weights is free of the key."""
    shape = (3, 32, 32)

    def build(key):
        arrays = eqx.filter(make_model(name, shape, 3, key=key), eqx.is_inexact_array)
        return [leaf for leaf in jax.tree.leaves(arrays) if leaf.ndim > 1]

    closed = jax.make_jaxpr(build)(jax.random.key(0))
    assert closed.out_avals
    depends = set(closed.jaxpr.invars)
    for eqn in closed.jaxpr.eqns:
        if any(v in depends for v in eqn.invars if not hasattr(v, "val")):
            depends.update(eqn.outvars)
    free = [v.aval for v in closed.jaxpr.outvars if hasattr(v, "val") or v not in depends]
    assert not free, f"{name}: weights that no key decides: {free}"


def test_a_sketch_has_other_directions_at_every_step():
    """The directions belong to the step: a resumed run draws those of the run it goes on from."""
    config = ntt.NTTConfig(0.5, outputs="sketch", sketch_size=1, mask_every=None)
    x = next(stream(0)).x
    evaluated = eqx.filter_jit(ntt.ntt_evaluate)
    at = lambda step, key=0: float(
        evaluated(
            eqx.tree_at(
                lambda s: s.step,
                ntt.ntt_init(network(0), config, ADAM, key=jax.random.key(key)),
                jnp.int32(step),
            ),
            x,
        ).kernel_distance
    )
    assert len({at(step) for step in range(4)}) == 4
    assert at(2) == at(2)
    assert len({at(2, key) for key in range(3)}) == 3


def test_dropout_differs_from_step_to_step_and_from_sample_to_sample():
    net = network(0)
    x = jnp.ones((6, 4))
    config = ntt.TrainConfig(0.0)
    state = ntt.train_init(net, config, optax.sgd(0.0), key=jax.random.key(0))
    step = eqx.filter_jit(ntt.train_step)
    y = jnp.zeros(6, jnp.int32)
    losses = []
    for _ in range(4):
        state, metrics = step(state, (x, y))
        losses.append(float(metrics.loss))
    assert len(set(losses)) == 4
    one = ntt.train_init(net, config, optax.sgd(0.0), key=jax.random.key(0))
    alone = [float(step(one, (x[:1], y[:1]))[1].loss) for _ in range(2)]
    assert alone[0] == alone[1] and alone[0] != losses[0]


def test_the_seeds_of_a_run_do_not_share_their_randomness():
    """One seed for weights, order and held-out part must not make them the same draw."""
    order = np.concatenate([b.y for b, _ in zip(batches(numbered(), 40, seed=3), range(1))])
    rest, held = hold_out(numbered(), 0.5, seed=3)
    shuffled = next(batches(numbered(), 40, seed=3)).x
    assert not np.array_equal(np.asarray(shuffled)[:20], held.x)
    assert order.shape == (40,) and len(rest) == 20


@pytest.mark.parametrize("kind", ["rbg", "unsafe_rbg"])
def test_a_seed_means_the_same_whatever_the_default_kind_of_keys(kind):
    """A comparison whose commands ran under two defaults had two networks of one seed."""
    (cell,) = plan(CompareSettings(methods=("dense",), seeds=(3,)))
    small = ntt.sparsify(network(0)).with_mask(mask_of_half())
    config = ntt.TrainConfig(
        dynamic=ntt.DynamicSparsity(ntt.Sparsity(0.5), ntt.SETRefresh(2, seed=1))
    )

    def draw():
        state, _ = ntt.train_steps(
            ntt.train_init(small, config, optax.sgd(0.1)), stream(0), num_steps=3
        )
        start = ntt.ntt_init(network(0), CONFIG, ADAM).key
        return bits((cell.key(0), state.model, start))

    usual = draw()
    with jax.default_prng_impl(kind):
        assert draw() == usual
