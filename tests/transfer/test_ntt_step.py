"""A step is what the published code does."""

import dataclasses
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.comparison import relative_error
from helpers.students import (
    ADAM,
    CONFIG,
    DENSITY,
    GATHERED,
    Tiny,
    batches,
    loss_of,
    magnitude_mask,
    random_mask,
    same,
    start,
    step,
)
from helpers.support import known
from helpers.tiers import slow

import ntt_eqx as ntt
from ntt_eqx._ntk import kernel_spec, outputs_and_ntk

pytestmark = pytest.mark.usefixtures("gathers")


@pytest.mark.parametrize(
    "num_steps, mask_every, expected",
    [
        (12, 3, {3, 6}),  # 9 and 12 are within the last 3 steps
        (13, 3, {3, 6, 9}),
        (None, 4, {4, 8, 12}),
        (12, None, set()),
        (3, 5, set()),
    ],
)
def test_the_mask_is_refreshed_at_the_published_steps(getkey, num_steps, mask_every, expected):
    config = ntt.NTTConfig(DENSITY, num_steps=num_steps, mask_every=mask_every)
    state = start(getkey, config)
    before = random_mask(state.teacher, getkey())
    seen = set()
    for n, x in zip(range(1, 14), batches(), strict=False):
        state = eqx.tree_at(lambda s: s.student, state, state.student.with_mask(before))
        state, _ = step(state, x)
        if not same(state.student.mask, before):
            seen.add(n)
            assert same(state.student.mask, magnitude_mask(state.student))
        assert [int(m.sum()) for m in jax.tree.leaves(state.student.mask)] == [9, 4]
    assert seen == expected


@pytest.mark.parametrize("density", [DENSITY, GATHERED])
def test_one_compilation_serves_the_whole_run(getkey, density):
    config = dataclasses.replace(CONFIG, density=density)
    state = start(getkey, config, mask=random_mask(Tiny(getkey()), getkey(), density))
    counted = eqx.debug.assert_max_traces(ntt.ntt_step, max_traces=1)
    counted_step = eqx.filter_jit(counted)
    masks = [state.student.mask]
    for _, x in zip(range(12), batches(), strict=False):
        state, _ = counted_step(state, x)
        if not same(state.student.mask, masks[-1]):
            masks.append(state.student.mask)
    assert eqx.debug.get_num_traces(counted) == 1
    assert len(masks) > 1, "no refresh changed the mask, so the test says nothing"


@pytest.mark.parametrize("first", [0.05, 0.1, GATHERED, 0.5])
def test_the_kernel_sees_the_refreshed_mask_whatever_the_first_one_kept(getkey, first):
    config = ntt.NTTConfig(GATHERED, mask_every=1, kernel_weight=1.0)
    teacher = Tiny(getkey())
    mask = random_mask(teacher, getkey(), first)
    state = ntt.ntt_init(teacher, config, ADAM, mask=mask)
    data = batches()
    for _ in range(2):
        state, _ = step(state, next(data))
    assert not same(state.student.mask, mask)
    kept = [int(m.sum()) for m in jax.tree.leaves(mask)]  # a given mask keeps its counts
    assert [int(m.sum()) for m in jax.tree.leaves(state.student.mask)] == kept
    x = next(data)
    expected = loss_of(state.student, state.teacher, x, config)[1].kernel_distance
    seen = step(state, x)[1].kernel_distance
    np.testing.assert_allclose(seen, expected, rtol=1e-4)


def test_pruned_weights_stay_where_they_are_until_a_refresh(getkey):
    config = ntt.NTTConfig(DENSITY, mask_every=None)
    state = start(getkey, config)
    first = state.student
    for _, x in zip(range(3), batches(), strict=False):
        state, metrics = step(state, x)
    weights = lambda model: (model.first.weight, model.second.weight)
    both = zip(
        jax.tree.leaves(first.mask), weights(first.model), weights(state.student.model), strict=True
    )
    for mask, old, new in both:
        mask, old, new = map(np.asarray, (mask, old, new))
        assert np.array_equal(old[~mask], new[~mask]) and np.all(old[mask] != new[mask])
    for mask, w in zip(jax.tree.leaves(first.mask), weights(state.student.to_dense()), strict=True):
        assert np.all(np.asarray(w)[~np.asarray(mask)] == 0.0)


def test_metrics_are_those_before_the_update(getkey):
    state = start(getkey)
    x = next(batches())
    expected = loss_of(state.student, state.teacher, x, CONFIG)[1]
    _, metrics = step(state, x)
    for name in ("loss", "kernel_distance", "target_distance", "weight_norm", "density"):
        np.testing.assert_allclose(
            getattr(metrics, name), getattr(expected, name), rtol=1e-6, err_msg=name
        )
        assert getattr(metrics, name).dtype == jnp.float32


def test_learning_rate_is_told_where_the_optimiser_knows_it(getkey):
    _, metrics = step(start(getkey), next(batches()))
    assert metrics.learning_rate is None
    told = optax.inject_hyperparams(optax.sgd)(learning_rate=0.25)
    _, metrics = step(start(getkey, optimizer=told), next(batches()))
    assert metrics.learning_rate == 0.25


@pytest.mark.parametrize("kind", ["injected schedule", "plateau"])
def test_optimisers_that_ask_for_more_than_a_gradient(getkey, kind):
    schedule = optax.linear_schedule(1e-2, 0.0, 10)
    optimizer = {
        "injected schedule": optax.inject_hyperparams(optax.adam)(schedule),
        "plateau": optax.chain(optax.adam(1e-2), optax.contrib.reduce_on_plateau(patience=3)),
    }[kind]
    state = start(getkey, optimizer=optimizer)
    rates = []
    for x in itertools.islice(batches(), 3):
        state, metrics = step(state, x)
        rates.append(metrics.learning_rate)
    if kind == "plateau":
        assert rates == [None] * 3
    else:
        np.testing.assert_allclose(rates, [1e-2, 9e-3, 8e-3], rtol=1e-5)


@pytest.mark.parametrize(
    ("pattern", "height"),
    [slow(ntt.NM(1, 20), 1), (ntt.Block((4, 2)), 4), slow(ntt.Block((3, 2)), None)],
)
def test_masks_of_a_pattern_are_gathered_where_they_keep_their_counts(pattern, height, x64):
    """One row for all that a block keeps; where blocks do not tile a layer, the mask is whole."""
    model = eqx.nn.MLP(40, 4, 20, 1, activation=jnp.tanh, key=jax.random.key(0))
    sparsity = ntt.Sparsity({".layers[0].weight": 0.05, ".layers[1].weight": 1.0}, pattern=pattern)
    method = ntt.NeuralTangentTransfer(
        sparsity=sparsity, optimizer=optax.adam(1e-2), refresh=ntt.MagnitudeRefresh(every=2)
    )
    state = ntt.ntt_init(model, method)
    heights = [places.row_block for places in known(state.support)]
    assert heights == ([] if height is None else [height])
    run = eqx.filter_jit(lambda m, s, x: outputs_and_ntk(kernel_spec(), m, x, index=s)[1])
    masks = []
    for seed in range(5):
        x = jax.random.normal(jax.random.key(seed), (4, 40), jnp.float64)
        expected = ntt.ntk(state.student, x[:2], x[2:], implementation="jacobian")
        assert relative_error(run(state.student, state.support, x), expected) < 1e-12
        teacher = ntt.ntk(state.teacher, x[:2], x[2:], implementation="jacobian")
        distance = jnp.mean((expected - teacher) ** 2)
        masks.append(state.student.mask.layers[0].weight)
        state, metrics = step(state, x)
        assert metrics.kernel_distance == pytest.approx(float(distance), rel=1e-10)
    assert any(bool(jnp.any(mask != masks[0])) for mask in masks)
