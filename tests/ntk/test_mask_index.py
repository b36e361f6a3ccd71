"""Where a mask's entries are: what is stored, what is refreshed, and that nothing is retraced."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.comparison import relative_error
from helpers.support import flat_indices, known
from hypothesis import given, settings, strategies as st

import ntt_eqx as ntt
from ntt_eqx._ntk import (
    MaskIndex,
    index_concrete,
    index_masks,
    kernel_spec,
    outputs_and_ntk,
    stored,
)
from ntt_eqx._sparse import count_kept
from ntt_eqx.kernels import GatheredRows, MaskBits, gather_each, gather_rows, match_each

pytestmark = pytest.mark.usefixtures("gathers")


def mask_support(mask, **options):
    """The index of a concrete mask, as a state stores it."""
    return stored(index_concrete(mask, kernel_spec().costs, **options))


def refresh_support(mask, support):
    """The index of another mask, as a state stores it."""
    return stored(index_masks(mask, support))


def mask_of(shape, count, seed=0):
    places = np.random.default_rng(seed).permutation(np.prod(shape))[:count]
    flat = np.zeros(np.prod(shape), bool)
    flat[places] = True
    return jnp.asarray(flat.reshape(shape))


def test_places_are_those_of_the_mask():
    mask = {"few": mask_of((5, 40), 9), "many": mask_of((5, 40), 60), "none": mask_of((4, 8), 0)}
    mask |= {"unmasked": None, "filters": mask_of((5, 2, 4, 5), 9)}
    support = mask_support(mask)
    for name in ("few", "none", "filters"):
        np.testing.assert_array_equal(
            flat_indices(support[name].places), np.flatnonzero(mask[name])
        )
    assert support["many"] is None and support["unmasked"] is None
    places = support["few"].places
    assert support["few"].places.shape == support["filters"].places.shape == (5, 40)
    assert places.rows.dtype == places.columns.dtype == jnp.int32


@pytest.mark.parametrize("shape", [(0, 7), (1, 3), (5, 51), (16, 16), (300, 784)])
def test_entries_are_counted(shape):
    """However many there are: counted in bytes, no sum may go round."""
    for mask in (np.zeros(shape, bool), np.ones(shape, bool), mask_of(shape, np.prod(shape) // 3)):
        assert count_kept(jnp.asarray(mask)) == np.count_nonzero(mask)


def test_buckets_are_few_and_have_room():
    rooms = set()
    for count in range(0, 150):
        mask = mask_of((10, 100), count)
        found = mask_support(mask, bucketed=True).places
        np.testing.assert_array_equal(flat_indices(found), np.flatnonzero(mask))
        assert count <= found.capacity <= max(1.25 * count + 2, 20) + 16
        rooms.add(found.capacity)
    assert len(rooms) <= 12


HELD = np.random.default_rng(5).random((3, 40)) < 0.3


@jax.jit
def holds(rows, columns, mask):
    return GatheredRows(rows, columns, (3, 40)).matches(mask)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_no_other_places_pass_for_those_of_a_mask(data):
    """Whatever was written into them, and whatever other mask they are held against."""
    places = gather_rows(HELD, int(HELD.sum()))
    rows, columns = np.array(places.rows), np.array(places.columns)
    assert holds(rows, columns, HELD)
    number = st.one_of(st.integers(-2, 42), st.integers(-(2**31), 2**31 - 1))
    for _ in range(data.draw(st.integers(0, 3))):
        array = data.draw(st.sampled_from([rows, columns]))
        array.flat[data.draw(st.integers(0, array.size - 1))] = data.draw(number)
    mask = HELD.copy()
    for place in data.draw(st.lists(st.integers(0, 119), max_size=3)):
        mask.flat[place] = not mask.flat[place]
    used = (columns < 40) & (rows < 3)[:, None]
    flat = (rows[:, None].astype(np.int64) * 40 + columns)[used]
    right = sorted(flat) == list(np.flatnonzero(mask)) and (columns[used] >= 0).all()
    assert right or not holds(rows, columns, mask)


@pytest.mark.parametrize(
    "shapes",
    [
        [(3, 40), (5, 7), (1, 1)],
        [(60, 784), (100, 30), (1, 5000)],  # several words, and running sums of running sums
        [(0, 5), (4, 3), (2, 0)],
        [(0, 5)],
    ],
)
def test_masks_side_by_side_are_searched_as_each_alone(shapes):
    """NumPy's own search says what is right; the places of another mask do not pass."""
    rng = np.random.default_rng(7)
    first = [rng.random(shape) < 0.2 for shape in shapes]
    second = [rng.permutation(m.reshape(-1)).reshape(m.shape) for m in first]
    supports = [gather_rows(m, int(m.sum())) for m in first]
    gather = jax.jit(lambda supports, masks: gather_each(supports, MaskBits.of(masks)))
    hold = jax.jit(lambda supports, masks: match_each(supports, MaskBits.of(masks)))
    found, room = gather(supports, second)
    assert room.all()
    for one, mask in zip(found, second, strict=True):
        assert eqx.tree_equal(one, gather_rows(mask, int(mask.sum())))
    assert hold(supports, first) and hold(found, second)
    if any(m.any() for m in first):
        assert not hold(supports, second) and not hold(found, first)
        everything = [np.ones(shape, bool) for shape in shapes]
        fits = [m.size <= support.capacity for m, support in zip(everything, supports, strict=True)]
        np.testing.assert_array_equal(gather(supports, everything)[1], fits)


def test_refreshed_support_is_that_of_the_new_mask_and_nothing_is_retraced():
    traces = []

    @jax.jit
    def refresh(mask, support):
        traces.append(None)
        return refresh_support(mask, support)

    first = {"a": mask_of((6, 50), 11), "b": None, "c": mask_of((3, 4), 9)}
    for bucketed in (False, True):
        support = mask_support(first, bucketed=bucketed)
        traces.clear()
        for seed in range(1, 4):
            mask = {"a": mask_of((6, 50), 11, seed), "b": None, "c": mask_of((3, 4), 9, seed)}
            support = refresh(mask, support)
            expected = mask_support(mask, bucketed=bucketed)["a"]
            assert eqx.tree_equal(support["a"], expected)
            assert support["b"] is None and support["c"] is None
        assert len(traces) == 1


def test_kernel_after_a_refresh_compiles_nothing_again():
    """Masks with other rows, some of them empty, through one compiled program."""
    key, data = jax.random.split(jax.random.key(0))
    model = ntt.sparsify(eqx.nn.MLP(20, 2, 12, 1, activation=jnp.tanh, key=key))
    x = jax.random.normal(data, (4, 20))
    masks = [
        jax.tree.map(lambda m, s=seed: mask_of(m.shape, m.size // 10, s), model.mask)
        for seed in range(3)
    ]
    support = mask_support(masks[0], bucketed=True)
    assert len(known(support)) == 2
    traces = []

    @eqx.filter_jit
    def run(model, support):
        traces.append(None)
        support = refresh_support(model.mask, support)
        return outputs_and_ntk(kernel_spec(), model, x, index=support)

    for mask in masks:
        pruned = model.with_mask(mask)
        outputs, theta = run(pruned, support)
        expected = ntt.ntk(pruned, x[:2], x[2:], implementation="jacobian")
        assert relative_error(theta, expected) < 1e-5
        assert relative_error(outputs, jax.vmap(pruned)(x)) < 1e-5
    assert len(traces) == 1


def outdated():
    """A model, a compiled kernel of it, and the support of a mask that is not its own."""
    model = ntt.sparsify(eqx.nn.MLP(20, 2, 12, 1, activation=jnp.tanh, key=jax.random.key(0)))
    x = jax.random.normal(jax.random.key(1), (4, 20))
    mask = lambda count, seed: jax.tree.map(
        lambda m: mask_of(m.shape, m.size // count, seed), model.mask
    )
    run = eqx.filter_jit(lambda m, s: outputs_and_ntk(kernel_spec(), m, x, index=s)[1])
    return model, x, mask, run


def test_a_support_of_another_mask_is_found_anew():
    model, x, mask, run = outdated()
    support = mask_support(mask(10, 0))
    for other in (mask(10, 1), mask(20, 2)):  # as many entries elsewhere, and fewer
        pruned = model.with_mask(other)
        expected = ntt.ntk(pruned, x[:2], x[2:], implementation="jacobian")
        assert relative_error(run(pruned, support), expected) < 1e-5


class Heads(eqx.Module):
    """Its weight's first axis is not the layer's features."""

    weight: jax.Array

    def __call__(self, x):
        return jnp.tanh(self.weight.reshape(6, 20) @ x)


@pytest.mark.parametrize("kept", [9, 12, 40])
def test_a_layer_whose_rows_are_not_those_of_its_weight(kept):
    """By its own support, by one of another mask, and, with too many entries, by none."""
    heads = Heads(jax.random.normal(jax.random.key(0), (2, 3, 20)))
    model = ntt.sparsify(heads, lambda path, owner, leaf: True)
    first, other = (
        model.with_mask(jax.tree.map(lambda m, c=c, s=s: mask_of(m.shape, c, s), model.mask))
        for c, s in ((12, 0), (kept, 1))
    )
    x = jax.random.normal(jax.random.key(1), (4, 20))
    support = mask_support(first.mask)
    assert known(support)[0].shape == (2, 60)
    run = eqx.filter_jit(lambda m, s: outputs_and_ntk(kernel_spec(), m, x, index=s)[1])
    assert relative_error(run(first, support), ntt.ntk(first, x[:2], x[2:])) < 1e-5
    expected = ntt.ntk(other, x[:2], x[2:], implementation="jacobian")
    found = run(other, support)
    assert jnp.isnan(found).all() if kept == 40 else relative_error(found, expected) < 1e-5
    assert relative_error(ntt.ntk(other, x[:2], x[2:]), expected) < 1e-5


def test_a_support_without_room_never_gives_a_number():
    model, _, mask, run = outdated()
    more, support = model.with_mask(mask(5, 1)), mask_support(mask(10, 0))
    assert jnp.isnan(run(more, support)).all()


def test_a_mask_that_would_fit_by_luck_never_gives_a_number():
    """More entries than the capacity, though in rows that leave room: not now, and not later."""
    known = mask_support(mask_of((5, 40), 9))
    assert known.places.capacity == 15
    lucky = jnp.zeros((5, 40), bool).at[:2, :10].set(True)
    compare = jax.jit(lambda mask, known: index_masks(mask, known))
    for _ in range(3):
        index = compare(lucky, known)
        assert not index.fits and flat_indices(index.places).size == 0
        known = stored(index)
    assert compare(mask_of((5, 40), 15), known).fits


def test_an_index_answers_for_its_own_array_alone():
    """What was compared with an array is not compared with it again, and with any other it is."""
    mask = mask_of((5, 40), 9)
    ones = jnp.ones((3, 4), bool)
    trees = {"few": mask, "all": ones, "none": None}
    concrete = index_concrete(trees, kernel_spec().costs)
    assert index_masks(trees, concrete)["few"] is concrete["few"]
    equal = index_masks({"few": mask.copy(), "all": ones.copy(), "none": None}, concrete)
    assert equal["few"] is not concrete["few"] and equal["few"].fits and equal["all"].fits
    other = index_masks({"few": mask, "all": ones.at[0, 0].set(False), "none": None}, equal)
    assert other["few"].fits and not other["all"].fits and other["none"] is None
    assert all(leaf.mask is None and leaf.fits is None for leaf in (stored(other)["few"],))


def blocks(mask, row_block):
    """A mask whose rows are alike in blocks of that many."""
    return jnp.repeat(mask[::row_block], row_block, axis=0)[: len(mask)]


def test_alike_rows_are_stored_once_and_a_mask_without_them_gives_no_number():
    model, x, mask, run = outdated()
    first, second = (jax.tree.map(lambda m: blocks(m, 4), mask(12, seed)) for seed in (0, 1))
    support = mask_support(first, row_blocks=lambda m: 4)
    small = mask_support(first)
    for short, whole in zip(known(support), known(small), strict=True):
        assert len(short.rows) < len(whole.rows) and short.shape == whole.shape
    for other in (first, second):
        pruned = model.with_mask(other)
        expected = ntt.ntk(pruned, x[:2], x[2:], implementation="jacobian")
        assert relative_error(run(pruned, support), expected) < 1e-5
        refreshed = refresh_support(other, support)
        assert relative_error(run(pruned, refreshed), expected) < 1e-5
    # As many entries in the rows that are stored, others elsewhere.
    broken = jax.tree.map(lambda m: m.at[1].set(jnp.roll(m[1], 1)), first)
    assert jnp.isnan(run(model.with_mask(broken), support)).all()


class Sequence(eqx.Module):
    """A dense layer at one position and at many, with a metric of its own."""

    layer: eqx.nn.Linear
    last: eqx.nn.Linear

    def __call__(self, x):
        return self.last(jnp.mean(jax.vmap(lambda x: jnp.tanh(self.layer(x)))(x), axis=0))


def test_alike_rows_where_they_do_not_help(x64):
    """Tangents need every row, and so does a metric that is not a mask."""
    keys = jax.random.split(jax.random.key(0), 3)
    model = ntt.sparsify(
        Sequence(eqx.nn.Linear(30, 8, key=keys[0]), eqx.nn.Linear(8, 4, key=keys[1]))
    )
    mask = jax.tree.map(lambda m: blocks(mask_of(m.shape, m.size // 8), 2), model.mask)
    model, support = model.with_mask(mask), mask_support(mask, row_blocks=lambda m: 2)
    assert [s.row_block for s in known(support)] == [2, 2]
    x = jax.random.normal(keys[2], (4, 5, 30), jnp.float64)
    params = eqx.filter(model.to_dense(), eqx.is_inexact_array)
    metric = jax.tree.map(lambda p: jnp.linspace(0.5, 2.0, p.size).reshape(p.shape), params)
    for c in (None, metric):
        expected = ntt.ntk(model, x[:2], x[2:], metric=c, implementation="jacobian")
        run = eqx.filter_jit(
            lambda m, s, c=c: outputs_and_ntk(kernel_spec(), m, x, metric=c, index=s)[1]
        )
        assert relative_error(run(model, support), expected) < 1e-12


@pytest.mark.parametrize("metric", [False, True])
def test_a_mask_that_keeps_everything_is_as_if_there_were_none(metric, x64):
    """By its own support and by one that is held; and no number once it does not."""
    model = ntt.sparsify(eqx.nn.MLP(9, 2, 6, 1, activation=jnp.tanh, key=jax.random.key(0)))
    thin = model.with_mask(
        eqx.tree_at(lambda m: m.layers[1].weight, model.mask, mask_of((2, 6), 5))
    )
    x = jax.random.normal(jax.random.key(1), (4, 9), jnp.float64)
    params = eqx.filter(model.to_dense(), eqx.is_inexact_array)
    ones = lambda p: jnp.linspace(0.5, 2.0, p.size).reshape(p.shape)
    c = jax.tree.map(ones, params) if metric else None
    support = mask_support(thin.mask)
    assert support.layers[0].weight == MaskIndex(None) and support.layers[1].weight is None
    run = eqx.filter_jit(lambda m, s: outputs_and_ntk(kernel_spec(), m, x, metric=c, index=s))
    expected = ntt.ntk(thin, x[:2], x[2:], metric=c, implementation="jacobian")
    outputs, theta = run(thin, support)
    assert relative_error(theta, expected) < 1e-12
    assert relative_error(outputs, jax.vmap(thin)(x)) < 1e-12
    assert relative_error(ntt.ntk(thin, x[:2], x[2:], metric=c), expected) < 1e-12
    assert refresh_support(thin.mask, support).layers[0].weight == MaskIndex(None)
    other = eqx.tree_at(lambda m: m.layers[0].weight, thin.mask, mask_of((6, 9), 53))
    assert jnp.isnan(run(thin.with_mask(other), support)[1]).all()


def test_a_whole_mask_costs_what_no_mask_costs():
    model = ntt.sparsify(eqx.nn.MLP(40, 4, 30, 1, key=jax.random.key(0)))
    x = jnp.ones((4, 40))
    costs = [ntt.explain(m, x).parameters[0].flops for m in (model, model.to_dense())]
    assert costs[0] == costs[1]
