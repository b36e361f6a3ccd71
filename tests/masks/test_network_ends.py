"""The ends of a network: patterns leave them whole, and outputs without a path are told."""

import warnings
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ntt_eqx as ntt
from ntt_eqx import models, scores

GREY, COLOUR = (1, 16, 16), (3, 16, 16)


def whole(sparse):
    return {name.split(".")[1] for name, share in sparse.densities().items() if float(share) == 1.0}


@pytest.fixture(scope="module")
def lenet():
    return models.LeNet300100(GREY, key=jax.random.key(0))


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("pattern", [ntt.Channels(0), ntt.Block((4, 4)), ntt.Block((1, 999))])
def test_no_class_is_cut_off_by_a_pattern(lenet, pattern, scope):
    sparse = ntt.prune(lenet, scores.Magnitude(), 0.25, scope=scope, pattern=pattern)
    assert whole(sparse) == {"output"}
    assert bool(sparse.mask.output.weight.all(axis=1).all())


@pytest.mark.parametrize("shape", [GREY, COLOUR])
def test_the_channels_of_images_are_no_channels_to_drop(shape, density=0.03):
    model = models.Conv4(shape, key=jax.random.key(0))
    sparse = ntt.prune(model, scores.Magnitude(), density, pattern=ntt.Channels(1))
    assert whole(sparse) == {"conv1"}
    kept = np.asarray(sparse.mask.conv2.weight).any(axis=(0, 2, 3))
    assert kept.sum() == round(density * 64)


def test_users_choose_other_layers(lenet):
    pattern = ntt.Channels(0, spare=(".hidden1.weight",))
    assert whole(ntt.prune(lenet, scores.Magnitude(), 0.5, pattern=pattern)) == {"hidden1"}
    every = ntt.prune(lenet, scores.Magnitude(), 0.5, pattern=ntt.Channels(0, spare=()))
    assert whole(every) == set()
    named = {name: 0.5 for name in ntt.sparsify(lenet).densities()}  # each layer has its own
    assert whole(ntt.prune(lenet, scores.Magnitude(), named, pattern=ntt.Channels(0))) == set()
    trees = {"a": jnp.arange(8.0).reshape(4, 2)}  # scores of no model have no ends
    assert int(ntt.make_mask(trees, 0.5, pattern=ntt.Channels(0))["a"].sum()) == 4


class Depthwise(eqx.Module):
    """A hidden layer with one input channel a filter."""

    first: eqx.nn.Conv2d
    middle: eqx.nn.Conv2d
    last: eqx.nn.Linear

    def __init__(self, key):
        self.first = eqx.nn.Conv2d(3, 8, 3, key=key)
        self.middle = eqx.nn.Conv2d(8, 8, 3, groups=8, key=key)
        self.last = eqx.nn.Linear(8, 4, key=key)

    def __call__(self, x):
        h = jax.nn.relu(self.middle(jax.nn.relu(self.first(x))))
        return self.last(jnp.mean(h, axis=(1, 2)))


def test_a_layer_of_one_channel_has_nothing_to_choose(getkey):
    sparse = ntt.prune(Depthwise(getkey()), scores.Magnitude(), 0.25, pattern=ntt.Channels(1))
    assert whole(sparse) == {"first", "middle"}


def test_transfers_keep_the_ends(getkey):
    model = eqx.nn.MLP(4, 3, 8, 2, key=getkey())
    config = ntt.NTTConfig(0.5, num_steps=4, mask_every=2, pattern=ntt.Channels(0))
    state = ntt.ntt_init(model, config, optax.sgd(0.1))
    state, _ = ntt.transfer(state, [jax.random.normal(getkey(), (4, 4))])
    kept = [np.asarray(m).all(axis=1).sum() for m in jax.tree.leaves(state.student.mask)]
    assert kept == [4, 4, 3]


def without(model, **cuts):
    """`model` under a mask that keeps all but what `cuts` name: slices of layers."""
    sparse = ntt.sparsify(model)
    for name, cut in cuts.items():
        at = lambda s, name=name: getattr(s.mask, name).weight
        sparse = eqx.tree_at(at, sparse, at(sparse).at[cut].set(False))
    return sparse


@pytest.mark.parametrize(
    "cuts, lost",
    [
        ({}, ()),
        ({"output": np.s_[2]}, (2,)),
        ({"output": np.array([1, 4, 9])}, (1, 4, 9)),
        ({"hidden2": np.s_[1:], "output": np.s_[3, 0]}, (3,)),  # by one unit alone
        ({"hidden1": np.s_[5:], "hidden2": np.s_[:, :5]}, tuple(range(10))),  # two halves
        ({"hidden1": np.s_[0], "hidden2": np.s_[0]}, ()),
    ],
)
def test_outputs_without_a_path_are_told(lenet, cuts, lost):
    sparse = without(lenet, **cuts)
    x = np.ones((2, *GREY), np.float32)
    if not lost:
        assert ntt.check_collapse(sparse, x) == ()
        return
    outputs = "output" if len(lost) == 1 else "outputs"
    message = f"no path of kept weights leads from the input to {outputs} {lost[0]}"
    with pytest.warns(ntt.LayerCollapseWarning, match=message):
        assert ntt.check_collapse(sparse, x) == tuple(f"output {k}" for k in lost)
    assert ntt.check_collapse(sparse) == () == ntt.check_collapse(sparse.mask)


@pytest.mark.parametrize("act", [jax.nn.sigmoid, jax.nn.gelu, jnp.tanh, lambda h: jax.nn.relu(-h)])
def test_paths_through_any_activation(act, getkey):
    sparse = without(Three(getkey(), act), last=np.s_[1])
    with pytest.warns(ntt.LayerCollapseWarning, match="to output 1:"):
        ntt.check_collapse(sparse, np.ones((1, 4), np.float32))
    zero = eqx.tree_at(lambda s: s.model.last.weight, sparse, jnp.zeros((3, 5)))
    with pytest.warns(ntt.LayerCollapseWarning, match="to output 1:"):  # values do not matter
        ntt.check_collapse(zero, np.ones((1, 4), np.float32))


class Three(eqx.Module):
    first: eqx.nn.Linear
    norm: eqx.nn.LayerNorm
    last: eqx.nn.Linear
    act: Any = eqx.field(static=True)

    def __init__(self, key, act):
        self.first, self.last = eqx.nn.Linear(4, 5, key=key), eqx.nn.Linear(5, 3, key=key)
        self.norm, self.act = eqx.nn.LayerNorm(5), act

    def __call__(self, x):
        return self.last(self.act(self.norm(self.first(x))))


class Tokens(eqx.Module):
    embed: eqx.nn.Embedding
    last: eqx.nn.Linear

    def __call__(self, x):
        return self.last(jnp.mean(jax.vmap(self.embed)(x), axis=0))


def test_nothing_is_said_of_what_cannot_be_followed(getkey):
    tokens = Tokens(eqx.nn.Embedding(9, 4, key=getkey()), eqx.nn.Linear(4, 3, key=getkey()))
    sparse = without(tokens, last=np.s_[1])
    assert ntt.check_collapse(sparse, np.ones((2, 5), np.int32)) == ()
    other = without(Three(getkey(), jax.nn.relu), last=np.s_[1])
    assert ntt.check_collapse(other, np.ones((2, 7), np.float32)) == ()  # inputs it does not take


def test_pruning_transferring_and_training_tell_of_lost_classes(lenet, getkey):
    x, y = jax.random.normal(getkey(), (8, *GREY)), jnp.arange(8, dtype=jnp.int32)
    with pytest.warns(ntt.LayerCollapseWarning, match="prune: no path .* to outputs"):
        sparse = ntt.prune(lenet, scores.Snip(), 0.01, (x, y))
    lost = without(lenet, output=np.s_[2])
    with pytest.warns(ntt.LayerCollapseWarning, match="train: no path .* to output 2"):
        ntt.train(lost, [(x, y)], optax.sgd(0.1), num_steps=1)
    state = ntt.ntt_init(
        lenet, ntt.NTTConfig(0.5, num_steps=1, mask_every=None), optax.sgd(0.1), mask=lost.mask
    )
    with pytest.warns(ntt.LayerCollapseWarning, match="transfer: no path .* to output 2"):
        ntt.transfer(state, [x])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ntt.prune(lenet, scores.Snip(), 0.5, (x, y))
    assert float(sparse.density()) == pytest.approx(0.01, abs=1e-4)
