"""`scores.RandomChannels`: a mask of few weights lies on its part of the channels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ntt_eqx as ntt

MODELS = {
    "perceptron": (lambda key: ntt.models.LeNet300100(key=key), (1, 28, 28)),
    "convolutions": (lambda key: ntt.models.LeNet5(key=key), (1, 28, 28)),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_mask_lies_on_its_part_of_the_channels(name, getkey):
    make, shape = MODELS[name]
    model, x, key = make(getkey()), jnp.ones((2, *shape)), getkey()
    sparse = ntt.prune(model, ntt.scores.RandomChannels(key, 1 / 4), 0.01, x, allocation="erk")
    *hidden, last = jax.tree.leaves(sparse.mask)
    before = None
    for mask in hidden:
        used = np.asarray(mask.reshape(len(mask), -1).any(1))
        assert used.sum() <= round(len(mask) / 4)
        read = np.asarray(mask.any(tuple(n for n in range(mask.ndim) if n != 1)))
        if before is not None and len(read) == len(before):  # no flattening in between
            assert not (read & ~before).any()
        before = used
    assert last.any(1).all()  # outputs are not channels that could go
    counts = lambda tree: [int(m.sum()) for m in jax.tree.leaves(tree)]
    everywhere = ntt.prune(model, ntt.scores.Random(key), 0.01, allocation="erk")
    assert counts(sparse.mask) == counts(everywhere.mask)
    small = ntt.compact(sparse, x)
    assert small.compact_parameters < 0.3 * small.parameters


@pytest.mark.parametrize("form", [lambda x: (x, None), lambda x: {"image": x}, np.asarray])
def test_inputs_may_have_any_form_of_a_batch(form, getkey):
    model, x = ntt.models.LeNet300100(key=getkey()), jnp.ones((2, 1, 28, 28))
    score = ntt.scores.RandomChannels(getkey())
    one, other = (ntt.prune(model, score, 0.1, given).mask for given in (x, form(x)))
    for m, same in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(m, same)


def test_a_residual_network_with_batch_norm(getkey):
    model = ntt.models.make_model("resnet-20-bn", (3, 8, 8), 10, key=getkey())
    x = jnp.ones((2, 3, 8, 8))
    score = ntt.scores.RandomChannels(getkey(), 1 / 4)
    sparse = ntt.prune(model, score, 0.04, x, allocation="erk")
    small = ntt.compact(ntt.warm_up(sparse, jax.random.normal(getkey(), x.shape)), x)
    assert small.compact_parameters < 0.2 * small.parameters


def test_rounds_keep_their_channels(getkey):
    model, x = ntt.models.LeNet300100(key=getkey()), jnp.ones((1, 1, 28, 28))
    score = ntt.scores.RandomChannels(getkey(), 1 / 4)
    once = ntt.prune(model, score, 0.01, x, allocation="erk").mask
    rounds = ntt.prune(model, score, 0.01, x, allocation="erk", steps=3).mask
    for one, other in zip(jax.tree.leaves(once), jax.tree.leaves(rounds), strict=True):
        np.testing.assert_array_equal(one, other)


def test_what_does_not_fit_is_refused(getkey):
    model = ntt.models.LeNet300100(key=getkey())
    for share in (0.0, 1.5):
        with pytest.raises(ValueError, match=r"share must be in \(0, 1\]"):
            ntt.scores.RandomChannels(getkey(), share)
    with pytest.raises(ValueError, match="RandomChannels: needs a batch of inputs"):
        ntt.prune(model, ntt.scores.RandomChannels(getkey()), 0.1)
