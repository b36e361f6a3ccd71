"""Masks from elsewhere: what refreshes keep of them, and that no old cache meets a new mask."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.comparison import counts
from helpers.students import (
    ADAM,
    GATHERED,
    Tiny,
    batches,
    evaluated,
    loss_of,
    random_mask,
    same,
    step,
)
from helpers.support import flat_indices, known

import ntt_eqx as ntt

pytestmark = pytest.mark.usefixtures("gathers")

EVERY = ntt.NTTConfig(GATHERED, mask_every=1, kernel_weight=1.0)


def run(state, steps=2):
    for x, _ in zip(batches(), range(steps), strict=False):
        state, _ = step(state, x)
    return state


def distance(state, x):
    """Without any cache."""
    found = loss_of(state.student, state.teacher, x, EVERY)[1]
    return float(found.kernel_distance)


@pytest.mark.parametrize("density", [GATHERED, 0.05, 0.5])
def test_a_state_with_another_mask_sees_its_kernel(getkey, density):
    """With the support of the mask before, the distance was that of a mask that is not there."""
    teacher, x = Tiny(getkey()), next(batches())
    state = ntt.ntt_init(teacher, EVERY, ADAM)
    mask = random_mask(teacher, getkey(), density)
    other = state.with_mask(mask)
    assert same(other.student.mask, mask) and not same(mask, state.student.mask)
    assert distance(other, x) != pytest.approx(distance(state, x), rel=1e-3)
    assert float(step(other, x)[1].kernel_distance) == pytest.approx(distance(other, x), rel=1e-4)
    found = known(other.support)
    assert len(found) == (0 if density == 0.5 else 2)
    for places, m in zip(found, jax.tree.leaves(mask), strict=False):
        np.testing.assert_array_equal(flat_indices(places), np.flatnonzero(m))
    after = run(other)
    assert counts(after.student.mask) == counts(mask) and not same(after.student.mask, mask)


def test_a_mask_put_in_behind_the_states_back_is_seen_too(getkey):
    teacher, x = Tiny(getkey()), next(batches())
    state = ntt.ntt_init(teacher, EVERY, ADAM)
    put = lambda mask: eqx.tree_at(lambda s: s.student, state, state.student.with_mask(mask))
    for density in (GATHERED, 0.1):  # as many weights, and fewer
        other = put(random_mask(teacher, getkey(), density))
        expected = distance(other, x)
        assert expected != pytest.approx(distance(state, x), rel=1e-3)
        assert float(step(other, x)[1].kernel_distance) == pytest.approx(expected, rel=1e-4)
        assert float(evaluated(other, x).kernel_distance) == pytest.approx(expected, rel=1e-4)
    full = put(random_mask(teacher, getkey(), 0.6))  # more, for which there is no room
    after, metrics = step(full, x)
    assert jnp.isnan(metrics.loss) and jnp.isnan(metrics.kernel_distance)
    with pytest.raises(ValueError, match="transfer: the mask keeps more weights than the one that"):
        ntt.transfer(full, batches(), num_steps=1)


def test_with_mask_inside_jit(getkey):
    teacher, x = Tiny(getkey()), next(batches())
    state = ntt.ntt_init(teacher, EVERY, ADAM)

    @eqx.filter_jit
    def swapped(state, mask):
        return ntt.ntt_evaluate(state.with_mask(mask), x).kernel_distance

    mask = random_mask(teacher, getkey(), GATHERED)
    assert float(swapped(state, mask)) == pytest.approx(distance(state.with_mask(mask), x), 1e-4)
    with pytest.raises(Exception, match="with_mask: inside jit only a mask that the method's"):
        swapped(state, random_mask(teacher, getkey(), 0.5))


MODEL = eqx.nn.MLP(8, 4, 12, 1, jnp.tanh, key=jax.random.key(0))
MAGNITUDES = ntt.scores.Magnitude()(MODEL)
RANDOM = ntt.scores.Random(jax.random.key(1))(MODEL)


def obeys_nm(mask):
    return all(
        (np.asarray(m).reshape(m.shape[0], -1, 4).sum(axis=2) == 2).all()
        for m in jax.tree.leaves(mask)
    )


def obeys_blocks(mask):
    tiles = [np.asarray(m).reshape(m.shape[0] // 2, 2, -1, 2) for m in jax.tree.leaves(mask)]
    return all((t.all(axis=(1, 3)) == t.any(axis=(1, 3))).all() for t in tiles)


STRUCTURES = {
    "erk": (dict(density=0.3, allocation="erk"), lambda m: counts(m) == [24, 19]),
    "2:4": (dict(density=0.5, pattern=ntt.NM(2, 4)), obeys_nm),
    "blocks": (dict(density=0.5, pattern=ntt.Block((2, 2))), obeys_blocks),
    "layers": (
        dict(density={".layers[0].weight": 0.25, ".layers[1].weight": 0.75}),
        lambda m: counts(m) == [24, 36],
    ),
}


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("name", STRUCTURES)
def test_a_structure_holds_through_every_refresh(name, given):
    settings, obeys = STRUCTURES[name]
    config = ntt.NTTConfig(mask_every=1, **settings)
    mask = config.sparsity().mask(RANDOM) if given else None
    state = ntt.ntt_init(MODEL, config, optax.adam(0.1), mask=mask)
    seen = [state.student.mask]
    assert obeys(seen[0])
    for x, _ in zip(batches((4, 8)), range(3), strict=False):
        state, metrics = step(state, x)
        assert obeys(state.student.mask) and jnp.isfinite(metrics.loss)
        seen.append(state.student.mask)
    assert not same(seen[0], seen[-1]), "no refresh changed the mask, so the test says nothing"


def test_a_given_erk_mask_keeps_its_counts_where_the_method_knows_of_none():
    """It became uniform at the first refresh: 0.203/0.344 turned into 0.25/0.25."""
    mask = ntt.make_mask(RANDOM, 0.3, allocation="erk")
    state = ntt.ntt_init(MODEL, ntt.NTTConfig(0.3, mask_every=1), optax.sgd(0.3), mask=mask)
    for x, _ in zip(batches((4, 8)), range(2), strict=False):
        state, _ = step(state, x)
    assert counts(state.student.mask) == counts(mask) == [24, 19]
    assert not same(state.student.mask, mask)


@pytest.mark.parametrize(
    "pattern, density, words",
    [
        (ntt.NM(2, 4), 0.5, "2:4"),
        (ntt.Block((2, 2)), 0.5, "blocks of 2x2"),
        (ntt.Channels(0), 0.5, "filters"),
    ],
)
def test_a_pattern_that_refreshes_do_not_know_is_told(pattern, density, words):
    mask = ntt.make_mask(RANDOM, density, pattern=pattern)
    config = ntt.NTTConfig(density, mask_every=1)
    with pytest.warns(ntt.PatternWarning, match=f"ntt_init: the given mask looks like {words}"):
        ntt.ntt_init(MODEL, config, ADAM, mask=mask)
    ntt.ntt_init(MODEL, ntt.NTTConfig(density, mask_every=None), ADAM, mask=mask)  # it stays
    ntt.ntt_init(MODEL, ntt.NTTConfig(density, pattern=pattern), ADAM, mask=mask)


def test_masks_that_refreshes_cannot_keep_are_refused():
    mask = ntt.make_mask(RANDOM, 0.3)
    with pytest.raises(ValueError, match="the given mask does not have the pattern"):
        ntt.ntt_init(MODEL, ntt.NTTConfig(0.5, pattern=ntt.Block((2, 2))), ADAM, mask=mask)
    with pytest.raises(ValueError, match="not have the density that the schedule gives at step 0"):
        config = ntt.NTTConfig(ntt.GradualDensity(0.1, 10), mask_every=1)
        ntt.ntt_init(MODEL, config, ADAM, mask=mask)


def test_a_mask_of_global_counts_stays_global():
    mask = ntt.make_mask(MAGNITUDES, 0.3, scope="global")
    config = ntt.NTTConfig(0.3, scope="global", mask_every=1)
    state = ntt.ntt_init(MODEL, config, optax.sgd(0.3), mask=mask)
    assert state.method == config.method(state.method.optimizer)
