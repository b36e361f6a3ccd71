"""What becomes of weights under the mask: free, frozen or zero."""

import equinox as eqx
import jax
import numpy as np
import optax
import pytest
from helpers.students import Tiny, batches, same, step

import ntt_eqx as ntt

OPTIMISERS = {"adam": optax.adam(3e-2), "adamw": optax.adamw(3e-2, weight_decay=0.1)}


def hidden(state, mask):
    """The weights that stay under the mask from now on, as one vector."""
    weights = [np.asarray(w) for w in (state.student.model.first.weight,
                                       state.student.model.second.weight)]  # fmt: skip
    return np.concatenate([w[~np.asarray(m)] for w, m in zip(weights, jax.tree.leaves(mask))])


def after_a_refresh(getkey, pruned, optimizer):
    """A state whose mask was just taken again, and the one three steps later."""
    config = ntt.NTTConfig(0.3, num_steps=8, mask_every=3, pruned=pruned)
    state, data = ntt.ntt_init(Tiny(getkey()), config, OPTIMISERS[optimizer]), batches()
    first = state.student.mask
    for _ in range(3):
        state, _ = step(state, next(data))
    refreshed = state
    for _ in range(3):
        state, _ = step(state, next(data))
    assert same(state.student.mask, refreshed.student.mask)  # the second would be at step 6 > 8-3
    return first, refreshed, state


@pytest.mark.parametrize("optimizer", OPTIMISERS)
def test_frozen_weights_keep_their_values_whatever_the_optimiser(getkey, optimizer):
    first, one, two = after_a_refresh(getkey, "frozen", optimizer)
    mask = one.student.mask
    np.testing.assert_array_equal(hidden(one, mask), hidden(two, mask))
    never = jax.tree.map(np.logical_or, first, mask)
    start = ntt.ntt_init(one.teacher, ntt.NTTConfig(0.3), OPTIMISERS[optimizer])
    np.testing.assert_array_equal(hidden(two, never), hidden(start, never))


@pytest.mark.parametrize("optimizer", OPTIMISERS)
def test_free_weights_are_moved_by_momentum_and_decay_as_published(getkey, optimizer):
    """The published code hands every weight to its optimiser, pruned ones with a gradient of 0."""
    first, one, two = after_a_refresh(getkey, "free", optimizer)
    mask = one.student.mask
    moved = np.abs(hidden(two, mask) - hidden(one, mask))
    fell = np.concatenate(
        [
            (np.asarray(f) & ~np.asarray(m))[~np.asarray(m)]
            for f, m in zip(jax.tree.leaves(first), jax.tree.leaves(mask), strict=True)
        ]
    )
    if optimizer == "adam":  # momentum carries those that were just pruned, and no others
        assert (moved[fell] > 1e-3).all() and (moved[~fell] == 0).all()
    else:
        assert (moved > 0).all()
    assert fell.any(), "no weight was pruned by the refresh, so the test says nothing"


def test_zero_weights_start_there_when_they_come_back(getkey):
    _, one, two = after_a_refresh(getkey, "zero", "adam")
    mask = one.student.mask
    assert (hidden(two, mask) == 0).all() and (hidden(one, mask) == 0).all()
    assert eqx.tree_equal(two.student.model, two.student.to_dense())
