"""Random keys: one of either kind, and a sentence for anything else, wherever a key is taken."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.refusals import X, linear, unchecked
from jaxtyping import PRNGKeyArray

import ntt_eqx as ntt
from ntt_eqx import models, scores
from ntt_eqx._checks import check_key


class Own(scores.AbstractLabelFreeScore, scores.AbstractDrawingScore):
    """A user's score, which checks nothing itself."""

    key: PRNGKeyArray

    def __call__(self, model, x=None):
        return scores.Random(self.key)(model, x)


MASK = ntt.sparsify(linear()).mask
CONFIG = ntt.NTTConfig(0.5, num_steps=1)
TAKERS = {
    "shuffle_mask": lambda key: ntt.shuffle_mask(MASK, key),
    "reinitialise": lambda key: ntt.reinitialise(ntt.sparsify(linear()), key),
    "Random": scores.Random,
    "Own": Own,
    "NTKSAP": scores.NTKSAP,
    "WeightedRandom": scores.WeightedRandom,
    "LeNet300100": lambda key: models.LeNet300100((1, 2, 2), 2, key=key),
    "LeNet5": lambda key: models.LeNet5((1, 16, 16), 2, key=key),
    "Conv4": lambda key: models.Conv4((1, 16, 16), 2, key=key),
    "ResNet20": lambda key: models.ResNet20((1, 4, 4), 2, width=8, key=key),
    "VGG11": lambda key: models.VGG11((1, 16, 16), 2, width=8, key=key),
    "VGG16": lambda key: models.VGG16((1, 16, 16), 2, width=8, key=key),
    "VGG19": lambda key: models.VGG19((1, 16, 16), 2, width=8, key=key),
    "ResNet32": lambda key: models.ResNet32((1, 4, 4), 2, width=8, key=key),
    "ResNet18": lambda key: models.ResNet18((1, 8, 8), 2, width=8, key=key),
    "Conv6": lambda key: models.Conv6((1, 8, 8), 2, key=key),
    "Perceptron": lambda key: models.Perceptron((1, 2, 2), 2, units=(3,), key=key),
    "ViT": lambda key: models.ViT((1, 4, 4), 2, dim=4, depth=1, key=key),
    "make_model": lambda key: models.make_model("lenet-300-100", (1, 2, 2), 2, key=key),
    "glorot_init": lambda key: models.glorot_init(linear(), key=key),
    "sketch_directions": lambda key: ntt.sketch_directions(key, 2, 3),
    "train_init": lambda key: ntt.train_init(linear(), ntt.TrainConfig(), optax.sgd(0.1), key=key),
    "ntt_init": lambda key: ntt.ntt_init(linear(), CONFIG, optax.sgd(0.1), key=key),
    "ntt_loss": lambda key: ntt.ntt_loss(ntt.sparsify(linear()), linear(), X, CONFIG, key=key),
}
NONE = {
    "None": (None, "got None"),
    "int": (0, "got 0"),
    "text": ("0", "got '0'"),
    "batch": (jax.random.split(jax.random.key(0), 3), r"got a batch of keys of shape \[3\]"),
    "floats": (np.zeros(2, np.float32), r"got an array of float32\[2\]"),
    "old batch": (jax.random.split(jax.random.PRNGKey(0), 3), r"got an array of uint32\[3, 2\]"),
    "object": (object(), "got a object"),
}
WITHOUT = {"train_init", "ntt_init", "ntt_loss"}  # take None for no key


@pytest.mark.parametrize("name", TAKERS)
def test_what_is_no_key_is_refused(name):
    for key, got in NONE.values():
        if key is None and name in WITHOUT:
            continue
        with unchecked(), pytest.raises(ValueError, match=f"{name}: .*{got}; use jax.random.key"):
            TAKERS[name](key)


@pytest.mark.parametrize("name", sorted({"shuffle_mask", "Random", "glorot_init", "train_init"}))
def test_both_kinds_of_keys_are_taken(name):
    for key in (jax.random.key(1), jax.random.PRNGKey(1), jax.random.key(1, impl="rbg")):
        TAKERS[name](key)


def test_keys_of_traced_functions():
    keys = jax.random.split(jax.random.key(0), 3)
    shuffled = jax.vmap(lambda key: ntt.shuffle_mask(MASK, key))(keys)
    assert jax.tree.leaves(shuffled)[0].shape == (3, 2, 3)
    eqx.filter_jit(lambda key: models.glorot_init(linear(), key=key))(keys[0])
    eqx.filter_vmap(scores.Random)(keys)
    jax.eval_shape(lambda key: check_key("", key), jax.random.PRNGKey(0))
    assert jnp.issubdtype(keys.dtype, jax.dtypes.prng_key)
