"""Masks of constant fan-in: rows of one length, shared by groups, the highest scores of each."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings, strategies as st

import ntt_eqx as ntt


def mask_of(scores, density, group=1):
    return np.asarray(ntt.make_mask(scores, density, pattern=ntt.ConstantFanIn(group)))


def expected(scores, density, group):
    """By a loop over groups and a sort; groups that score highest there get one input more."""
    flat = np.asarray(scores, np.float64).reshape(len(scores), -1)
    cuts = range(0, len(flat), group)
    means = np.stack([flat[n : n + group].mean(0) for n in cuts])
    order = np.argsort(-means, axis=1, kind="stable")
    total = round(density * means.size)
    least, more = divmod(total, len(means))
    marks = np.zeros(means.shape, bool)
    for row, best in zip(marks, order, strict=True):
        row[best[:least]] = True
    if more:
        nexts = [mean[best[least]] for mean, best in zip(means, order, strict=True)]
        for g in np.argsort(-np.asarray(nexts), kind="stable")[:more]:
            marks[g, order[g, least]] = True
    return np.repeat(marks, group, axis=0)[: len(flat)].reshape(scores.shape)


@settings(max_examples=4, deadline=None)
@given(
    shape=st.sampled_from([(1, 9), (7, 1), (8, 3, 2, 2)]),
    group=st.sampled_from([1, 3, 16]),
    density=st.sampled_from([0.1, 0.25, 0.37, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 10**6),
)
def test_every_group_keeps_its_highest_inputs(shape, group, density, seed):
    scores = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    groups = -(-shape[0] // min(group, shape[0]))
    inputs = int(np.prod(shape[1:]))
    if round(density * groups * inputs) == 0:
        return
    got = mask_of(jnp.asarray(scores), density, group)
    np.testing.assert_array_equal(got, expected(scores, density, min(group, shape[0])))
    fan_in = got.reshape(shape[0], -1).sum(1)
    assert fan_in.max() - fan_in.min() <= 1


def test_ties_within_a_row_go_to_the_lowest_index_and_to_no_other_row():
    scores = jnp.asarray(np.tile([3.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0], (4, 1)), jnp.float32)
    got = mask_of(scores, 0.25)
    np.testing.assert_array_equal(got, np.tile(np.arange(8) < 2, (4, 1)))


@pytest.mark.parametrize("scores", [np.ones((4, 8)), np.zeros((4, 8)), np.full((4, 8), np.inf)])
def test_scores_that_rank_nothing_are_an_error(scores):
    with pytest.raises(ValueError, match="cannot rank"):
        mask_of(jnp.asarray(scores, jnp.float32), 0.25)


def test_what_is_refused():
    scores = jnp.arange(32.0).reshape(4, 8)
    with pytest.raises(ValueError, match="constant fan-in"):
        ntt.make_mask(scores, 0.5, scope="global", pattern=ntt.ConstantFanIn())
    with pytest.raises(ValueError, match="shared_by"):
        ntt.ConstantFanIn(0)
    with pytest.raises(ValueError, match="nothing says that"):
        ntt.make_mask({"a": {"kernel": scores}}, 0.5, pattern=ntt.ConstantFanIn())


@pytest.mark.parametrize("density, group", [(0.75, 1), (0.3, 4)])
def test_a_mask_taken_as_scores_is_itself(density, group):
    sparsity = ntt.Sparsity(density, pattern=ntt.ConstantFanIn(group))
    mask = sparsity.mask({"a": jax.random.normal(jax.random.key(1), (8, 13))})
    assert sparsity.holds(mask)
    assert sparsity.of_mask(mask).holds(mask)
    assert not sparsity.holds({"a": ~mask["a"]})


SCHEDULE = ntt.GradualDensity(0.25, end=3, initial=0.5)


@pytest.mark.parametrize("density", [SCHEDULE, pytest.param(0.25, marks=pytest.mark.slow)])
def test_refreshes_keep_it(density):
    """In jit, where a schedule's density is traced; else with the support of shared rows."""
    model = eqx.nn.MLP(12, 4, 8, 1, key=jax.random.key(0))
    method = ntt.NeuralTangentTransfer(
        sparsity=ntt.Sparsity(density, pattern=ntt.ConstantFanIn(4)),
        refresh=ntt.MagnitudeRefresh(every=1),
        optimizer=optax.adam(0.1),
        num_steps=4,
    )
    state, step = ntt.ntt_init(model, method), eqx.filter_jit(ntt.ntt_step)
    first = state.student.mask
    for n in range(4):
        state, metrics = step(state, jax.random.normal(jax.random.key(n), (4, 12)))
        assert jnp.isfinite(metrics.loss)
    assert not eqx.tree_equal(first, state.student.mask)
    for mask in jax.tree.leaves(state.student.mask):
        rows = np.asarray(mask).reshape(-1, 4, mask.shape[1])
        assert (rows == rows[:, :1]).all()
        assert set(rows[:, 0].sum(1)) == {mask.shape[1] // 4}
