"""Masks of coupled channels keep and drop whole channels of a network."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.drawn_networks import draw
from helpers.tiers import default_only, drawn, slow

import ntt_eqx as ntt

pytestmark = pytest.mark.usefixtures("x64")

MANY = drawn(8)


def widened(leaf):
    return leaf.astype(jnp.float64) if eqx.is_inexact_array(leaf) else leaf


def arrays_of(tree):
    named = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in named}


def check_coupled(model, x, density, key):
    """Everything that masks of coupled channels promise; returns what `compact` makes of one."""
    pattern = ntt.coupled_channels(model, x)
    sparsity = ntt.Sparsity(density, pattern=pattern)
    scores = ntt.scores.Random(key)(model)
    mask = ntt.make_mask(scores, sparsity)
    masks, stop = arrays_of(mask), 0
    kept = {}
    for name, size in pattern.sets:
        start, stop = stop, stop + size
        kept[name] = 0
        for channel in range(start, stop):
            # every weight of the channel's is pruned, or in each layer one is kept
            slices = [
                masks[axis.weight].swapaxes(0, axis.axis)[axis.numbers == channel]
                for axis in pattern.axes
                if (axis.numbers == channel).any()
            ]
            alive = {bool(one.any()) for one in slices}
            assert len(slices) > 1 and len(alive) == 1, (name, channel)
            kept[name] += alive.pop()
        assert kept[name] == round(density * size)
    assert bool(sparsity.holds(mask))
    shares = {name: kept[name] / size for name, size in pattern.sets}
    assert dict(sparsity.of_mask(mask).density) == shares
    sparse = ntt.SparseModel(model, mask)
    found = ntt.compact(sparse, x)
    one, two = (np.asarray(jax.vmap(m)(x)) for m in (sparse, found.model))
    np.testing.assert_allclose(two, one, rtol=0, atol=1e-12 * max(1.0, np.abs(one).max()))
    return pattern, found


def emptied(pattern, found):
    """Weights of the pattern that still have pruned entries after `compact`."""
    names = {axis.weight for axis in pattern.axes}
    return [a for a in found.arrays if a.name in names and a.compact_kept < a.compact_size]


@pytest.mark.parametrize(
    "name, shape, sets",
    [
        ("lenet-300-100", (1, 4, 4), [300, 100]),
        slow("lenet-5", (1, 16, 16), [20, 50, 500]),
        pytest.param(
            *("resnet-20-bn", (3, 4, 4)),
            [16, 16, 16, 16, 32, 16, 32, 32, 64, 32, 64, 64],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_is_left_is_a_smaller_dense_network(name, shape, sets, getkey):
    model = jax.tree.map(widened, ntt.models.make_model(name, shape, 10, key=getkey()))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, *shape)))
    pattern, found = check_coupled(model, x, 0.25, getkey())
    assert [size for _, size in pattern.sets] == sets
    assert not emptied(pattern, found) and not found.stayed
    assert found.compact_parameters < 0.25 * found.parameters


LAYERS = ("stem", "branch", "side", "head")


class Shortcut(eqx.Module):
    """A residual sum, a concatenation, and an output that reads both."""

    stem: eqx.nn.Linear
    branch: eqx.nn.Linear
    side: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(self, key):
        a, b, c, d = jax.random.split(key, 4)
        self.stem = eqx.nn.Linear(3, 6, key=a, dtype=jnp.float64)
        self.branch = eqx.nn.Linear(6, 6, key=b, dtype=jnp.float64)
        self.side = eqx.nn.Linear(3, 4, key=c, dtype=jnp.float64)
        self.head = eqx.nn.Linear(10, 2, key=d, dtype=jnp.float64)

    def __call__(self, x):
        h = jnp.tanh(self.stem(x))
        h = h + jnp.tanh(self.branch(h))
        return self.head(jnp.concatenate([h, self.side(x)]))


def test_a_residual_sum_and_a_concatenation_by_hand(getkey):
    model = Shortcut(getkey())
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3)))
    pattern, found = check_coupled(model, x, 0.5, getkey())
    assert pattern.sets == ((".stem.weight", 6), (".side.weight", 4))
    shapes = {a.name: a.compact_shape for a in found.arrays}
    assert shapes[".stem.weight"] == (3, 3) and shapes[".branch.weight"] == (3, 3)
    assert shapes[".side.weight"] == (2, 3) and shapes[".head.weight"] == (2, 5)
    assert pattern.pools_of(".head.weight") == (".stem.weight", ".side.weight")
    # the mean of all weights of a channel, by hand
    scores = ntt.scores.Magnitude()(model)
    stem, branch, head = (scores.stem.weight, scores.branch.weight, scores.head.weight)
    by_hand = [
        np.mean(np.concatenate([stem[i], branch[i], branch[:, i], head[:, i]])) for i in range(6)
    ]
    found = pattern.group_scores({f".{n}.weight": getattr(scores, n).weight for n in LAYERS}, None)
    np.testing.assert_allclose(np.asarray(found[".stem.weight"]), by_hand, rtol=1e-13)


@pytest.mark.parametrize("seed", default_only(range(3), 2))
def test_drawn_networks(seed, getkey):
    look_at(seed, getkey())


@pytest.mark.slow
def test_many_drawn_networks(getkey):
    found = [look_at(seed, getkey()) for seed in range(3, 3 + MANY)]
    assert sum(found) > MANY / 3  # the others have no channels to choose from


def look_at(seed, key):
    sparse, x = draw(seed)
    try:
        ntt.coupled_channels(sparse.model, x)
    except ValueError as error:
        assert "no channels that could go" in str(error)
        return False
    pattern, found = check_coupled(sparse.model, x, 0.5, key)
    assert found.stayed or not emptied(pattern, found)
    return True


def test_a_transfer_keeps_the_pattern(getkey):
    """Through refreshes inside `jit`, and from a mask that is given."""
    model = Shortcut(getkey())
    x = jnp.asarray(np.random.default_rng(1).normal(size=(8, 3)))
    pattern = ntt.coupled_channels(model, x)
    config = ntt.NTTConfig(density=0.5, num_steps=4, mask_every=1, pattern=pattern)
    worst = jax.tree.map(jnp.negative, ntt.scores.Magnitude()(model))
    given = ntt.make_mask(worst, ntt.Sparsity(0.5, pattern=pattern))
    state = ntt.ntt_init(model, config, optax.adam(1e-3), mask=given)
    step, before = eqx.filter_jit(ntt.ntt_step), arrays_of(state.student.mask)
    for _ in range(4):
        state, metrics = step(state, x)
        assert bool(jnp.isfinite(metrics.loss))
        assert bool(ntt.Sparsity(0.5, pattern=pattern).holds(state.student.mask))
    after = arrays_of(state.student.mask)
    assert any((after[name] != before[name]).any() for name in after)


def test_rounds_that_never_revive(getkey):
    model = Shortcut(getkey())
    x = jnp.asarray(np.random.default_rng(1).normal(size=(8, 3)))
    sparsity = ntt.Sparsity(0.5, pattern=ntt.coupled_channels(model, x))
    first = ntt.prune(model, ntt.scores.SynFlow(), sparsity, x, steps=3)
    assert bool(sparsity.holds(first.mask))
    less = ntt.Sparsity(1 / 3, pattern=sparsity.pattern)
    again = ntt.prune(first, ntt.scores.Magnitude(), less)
    old, new = arrays_of(first.mask), arrays_of(again.mask)
    assert all((new[name] <= old[name]).all() for name in old)
    assert new[".head.weight"].any(0).sum() == round(6 / 3) + round(4 / 3)


def test_all_channels_compete_with_a_global_scope(getkey):
    model = Shortcut(getkey())
    pattern = ntt.coupled_channels(model, jnp.ones((1, 3)))
    scores = ntt.scores.Random(getkey())(model)
    mask = ntt.make_mask(scores, ntt.Sparsity(0.5, "global", pattern=pattern))
    means = pattern.group_scores({f".{n}.weight": getattr(scores, n).weight for n in LAYERS}, None)
    best = np.argsort(np.concatenate([means[name] for name, _ in pattern.sets]))[-5:]
    assert set(np.flatnonzero(np.asarray(mask.head.weight[0]))) == set(best.tolist())


def test_a_given_mask_of_channels_is_told(getkey):
    """Refreshes without the pattern would scatter it."""
    model = eqx.nn.MLP(4, 3, 8, 2, key=getkey(), dtype=jnp.float64)
    pattern = ntt.coupled_channels(model, jnp.ones((1, 4)))
    mask = ntt.make_mask(ntt.scores.Magnitude()(model), ntt.Sparsity(0.5, pattern=pattern))
    config = ntt.NTTConfig(density=0.5, num_steps=4, mask_every=2)
    with pytest.warns(UserWarning, match="looks like coupled channels"):
        ntt.ntt_init(model, config, optax.adam(1e-3), mask=mask)


def test_what_does_not_fit_is_refused(getkey):
    model = Shortcut(getkey())
    x = jnp.ones((1, 3))
    pattern = ntt.coupled_channels(model, x)
    scores = ntt.scores.Magnitude()(model)
    with pytest.raises(ValueError, match=r"allocation='erk' distributes weights"):
        ntt.make_mask(scores, ntt.Sparsity(0.5, allocation="erk", pattern=pattern))
    with pytest.raises(ValueError, match=r"missing .*side"):
        ntt.make_mask(scores, ntt.Sparsity({".stem.weight": 0.5}, pattern=pattern))
    other = eqx.nn.MLP(3, 2, 6, 1, key=getkey())
    with pytest.raises(ValueError, match="those of another model: .stem.weight has 6"):
        ntt.make_mask(ntt.scores.Magnitude()(other), ntt.Sparsity(0.5, pattern=pattern))
    single = eqx.nn.Linear(3, 2, key=getkey())
    with pytest.raises(ValueError, match="no channels that could go"):
        ntt.coupled_channels(single, x)
    half = jax.tree.map(lambda m: m.at[0, 0].set(False), ntt.sparsify(model).mask)
    with pytest.raises(ValueError, match="does not have the pattern CoupledChannels"):
        ntt.Sparsity(0.5, pattern=pattern).of_mask(half)
    flat = jax.tree.map(jnp.ones_like, scores)
    with pytest.raises(ValueError, match="cannot rank"):
        ntt.make_mask(flat, ntt.Sparsity(0.5, pattern=pattern))
