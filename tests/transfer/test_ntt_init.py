"""A start: the teacher under its first mask."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.students import (
    ADAM,
    CONFIG,
    DENSITY,
    GATHERED,
    Tiny,
    batches,
    magnitude_mask,
    random_mask,
    same,
    start,
    step,
)
from helpers.support import flat_indices, known

import ntt_eqx as ntt

pytestmark = pytest.mark.usefixtures("gathers")


def test_the_start_is_the_teacher_under_its_magnitude_mask(getkey):
    state = start(getkey)
    assert same(state.student.model, state.teacher)
    assert same(state.student.mask, magnitude_mask(state.student))
    assert state.step == 0 and state.step.dtype == jnp.int32


def test_the_start_shares_no_memory_with_the_teacher(getkey):
    state = start(getkey)
    pointers = lambda tree: {
        w.unsafe_buffer_pointer() for w in jax.tree.leaves(tree) if eqx.is_array(w)
    }
    assert not pointers(state.student) & pointers(state.teacher)


def test_logit_snip_mask(getkey):
    config = ntt.NTTConfig(DENSITY, initial_mask="logit_snip")
    teacher, x = Tiny(getkey()), next(batches())
    state = ntt.ntt_init(teacher, config, ADAM, x=x)
    expected = ntt.make_mask(ntt.scores.LogitSnip()(teacher, x), DENSITY)
    assert same(state.student.mask, expected)
    assert not same(state.student.mask, magnitude_mask(state.student))
    with pytest.raises(ValueError, match="needs samples: pass `x=`"):
        ntt.ntt_init(teacher, config, ADAM)


def test_global_scope_counts_all_layers_together(getkey):
    config = ntt.NTTConfig(DENSITY, scope="global", num_steps=6, mask_every=2)
    state = start(getkey, config)
    assert same(state.student.mask, magnitude_mask(state.student, scope="global"))
    for x, _ in zip(batches(), range(2), strict=False):
        state, metrics = step(state, x)
    assert same(state.student.mask, magnitude_mask(state.student, scope="global"))
    assert sum(int(m.sum()) for m in jax.tree.leaves(state.student.mask)) == round(DENSITY * 45)


def test_a_mask_from_elsewhere_and_a_choice_of_leaves(getkey):
    teacher = Tiny(getkey())
    mask = random_mask(teacher, getkey())
    assert same(ntt.ntt_init(teacher, CONFIG, ADAM, mask=mask).student.mask, mask)
    where = lambda path, owner, leaf: path == ".second.weight"
    state = ntt.ntt_init(teacher, CONFIG, ADAM, where=where)
    assert [m.shape for m in jax.tree.leaves(state.student.mask)] == [(3, 5)]


@pytest.mark.parametrize("mask_every", [3, None])
def test_a_start_inside_jit_is_the_same_without_knowing_where_the_weights_are(getkey, mask_every):
    config = ntt.NTTConfig(GATHERED, mask_every=mask_every)
    teacher = Tiny(getkey())
    traced = eqx.filter_jit(lambda t: ntt.ntt_init(t, config, ADAM))(teacher)
    plain = ntt.ntt_init(teacher, config, ADAM)
    assert same(traced.student, plain.student) and traced.step == 0
    assert jax.tree.leaves(traced.support) == [] != jax.tree.leaves(plain.support)
    x = next(batches())
    expected = step(plain, x)[1]
    np.testing.assert_allclose(step(traced, x)[1].loss, expected.loss, rtol=1e-5)


@pytest.mark.parametrize("own", [False, True])
def test_a_start_inside_jit_from_constants(getkey, own):
    config, teacher = ntt.NTTConfig(GATHERED), Tiny(getkey())
    mask = random_mask(teacher, getkey(), GATHERED) if own else None
    traced = eqx.filter_jit(lambda: ntt.ntt_init(teacher, config, ADAM, mask=mask))()
    plain = ntt.ntt_init(teacher, config, ADAM, mask=mask)
    assert same(traced.student, plain.student)
    assert (jax.tree.leaves(traced.support) != []) == own


@pytest.mark.parametrize(
    "settings, gathered",
    [
        ({}, True),
        ({"mask_every": None}, True),
        ({"scope": "global"}, False),  # a layer may hold any number after a refresh
        ({"scope": "global", "mask_every": None}, True),
        ({"kernel": "ambient"}, False),  # whose kernel does not look at the mask
        ({"density": 0.5}, False),
    ],
)
def test_weights_are_gathered_where_their_number_stays(getkey, settings, gathered):
    state = start(getkey, ntt.NTTConfig(**{"density": GATHERED, **settings}))
    found = known(state.support)
    assert bool(found) == gathered
    for places, mask in zip(found, jax.tree.leaves(state.student.mask), strict=False):
        np.testing.assert_array_equal(flat_indices(places), np.flatnonzero(mask))


@pytest.mark.parametrize("mask_every", [3, None])
def test_another_number_of_weights_is_gathered_too_for_it_stays(getkey, mask_every):
    config, teacher = ntt.NTTConfig(GATHERED, mask_every=mask_every), Tiny(getkey())
    mask = random_mask(teacher, getkey(), 0.1)
    state = ntt.ntt_init(teacher, config, ADAM, mask=mask)
    assert [len(flat_indices(places)) for places in known(state.support)] == [3, 2]


def test_a_student_of_its_own(getkey):
    """The teacher stays whole; the first mask, its score and counts are those of the student."""
    student = eqx.nn.MLP(4, 3, 5, 1, key=getkey())
    teacher = eqx.nn.MLP(4, 3, 16, 2, key=getkey())
    state = ntt.ntt_init(teacher, CONFIG, ADAM, student=student)
    assert same(state.teacher, teacher) and same(state.student.model, student)
    assert same(state.student.mask, ntt.make_mask(ntt.scores.Magnitude()(student), DENSITY))
    x = jax.random.normal(getkey(), (8, 4))
    state, metrics = step(state, x)
    again = ntt.ntt_loss(
        ntt.ntt_init(teacher, CONFIG, ADAM, student=student).student, teacher, x, CONFIG
    )
    np.testing.assert_allclose(metrics.loss, again[0], rtol=1e-5)
    assert metrics.kernel_distance is not None and 0 < float(metrics.kernel_distance) < np.inf


def test_a_sparse_student_brings_its_mask(getkey):
    teacher = eqx.nn.MLP(4, 3, 16, 2, key=getkey())
    dense = ntt.sparsify(eqx.nn.MLP(4, 3, 5, 1, key=getkey()))
    first = ntt.make_mask(ntt.scores.Random(getkey())(dense), DENSITY)
    state = ntt.ntt_init(teacher, CONFIG, ADAM, student=dense.with_mask(first))
    assert same(state.student.mask, first)
    other = ntt.make_mask(ntt.scores.Magnitude()(dense), DENSITY)
    state = ntt.ntt_init(teacher, CONFIG, ADAM, student=dense.with_mask(first), mask=other)
    assert same(state.student.mask, other)


def test_students_that_cannot_be_fitted(getkey):
    teacher = eqx.nn.MLP(4, 3, 16, 2, key=getkey())
    lost = jax.tree.map(lambda a: a * np.nan if eqx.is_array(a) else a, teacher)
    with pytest.raises(ValueError, match="ntt_init: student"):
        ntt.ntt_init(teacher, CONFIG, ADAM, student=lost)
    wide = eqx.nn.MLP(4, 5, 16, 2, key=getkey())
    state = ntt.ntt_init(teacher, CONFIG, ADAM, student=wide)
    with pytest.raises(ValueError, match="outputs have the shape"):
        step(state, jax.random.normal(getkey(), (8, 4)))


def test_a_sparse_teacher_teaches_what_it_computes(getkey):
    """Numbers under its mask change nothing in the state."""
    sparse = ntt.prune(Tiny(getkey()), ntt.scores.Magnitude(), 0.6)
    hidden = jax.tree.map(
        lambda m, w: w if m is None else jax.numpy.where(m, w, 100.0),
        sparse.mask,
        sparse.model,
        is_leaf=lambda m: m is None,
    )
    other = eqx.tree_at(lambda s: s.model, sparse, hidden)
    one, two = (ntt.ntt_init(teacher, CONFIG, ADAM) for teacher in (sparse, other))
    x = jax.random.normal(getkey(), (4, 6))
    np.testing.assert_array_equal(jax.vmap(one.teacher)(x), jax.vmap(sparse)(x))
    assert same(one, two)
