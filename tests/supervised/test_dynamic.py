"""Masks that change in training: counts and schedules by the papers' formulas, and what regrows."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.clusters import examples, network, stream
from helpers.refusals import unchecked

import ntt_eqx as ntt

SGD = optax.sgd(0.1, 0.9)
step = eqx.filter_jit(ntt.train_step)


def run(model, dynamic, batches, optimizer=SGD, **config):
    """The state after each step, that before the first one included."""
    state = ntt.train_init(model, ntt.TrainConfig(dynamic=dynamic, **config), optimizer)
    states = [state]
    for batch in batches:
        state, metrics = step(state, batch)
        assert jnp.isfinite(metrics.loss)
        states.append(state)
    return states


def masks(state):
    return [np.asarray(m) for m in jax.tree.leaves(state.model.mask)]


def weights(state):
    dense = state.model.to_dense()
    return [np.asarray(w) for w in (dense.first.weight, dense.second.weight)]


def random_start(key, density, **how):
    one, two = jax.random.split(key)
    sparsity = ntt.Sparsity(density, **how)
    return ntt.prune(network(one), ntt.scores.Random(two), sparsity), sparsity


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_gradual_pruning_is_the_cubic_of_zhu_and_gupta_and_brings_nothing_back(scope, getkey):
    schedule = ntt.GradualDensity(0.2, end=9, begin=1)
    dynamic = ntt.DynamicSparsity(ntt.Sparsity(schedule, scope), ntt.MagnitudeRefresh(2, 9))
    states = run(network(getkey()), dynamic, stream(12))
    density, before = 1.0, masks(states[0])
    assert all(m.all() for m in before)
    for t, state in enumerate(states):
        if t and (t % 2 == 0 and t < 9 or t == 9):  # s_t = s_f (1 - (1 - (t - t_0) / (n Δt))^3)
            sparsity = 0.8 * (1 - (1 - (min(max(t, 1), 9) - 1) / 8) ** 3)
            density = 1 - sparsity
        found = masks(state)
        kept, sizes = [m.sum() for m in found], [m.size for m in found]
        if scope == "global":
            assert sum(kept) == round(density * sum(sizes))
        else:
            assert kept == [round(density * size) for size in sizes]
        assert not any((m & ~old).any() for m, old in zip(found, before, strict=True))
        before = found


@pytest.mark.parametrize("how", [{}, {"allocation": "erk"}, {"scope": "layer", "density": 0.9}])
def test_rigl_drops_the_smallest_and_grows_the_steepest(how, getkey):
    density = dict(how).pop("density", 0.3)
    options = {k: v for k, v in how.items() if k != "density"}
    sparse, sparsity = random_start(getkey(), density, **options)
    refresh = ntt.RigLRefresh(every=2, until=8, fraction=0.4)
    batches = list(stream(6))
    states = run(sparse, ntt.DynamicSparsity(sparsity, refresh), batches, l2_weight=0.0)
    still, plain = ntt.TrainConfig(0.0), None
    for t in range(1, 7):
        before, after = states[t - 1], states[t]
        if t % 2:
            assert all((a == b).all() for a, b in zip(masks(before), masks(after), strict=True))
            continue
        # the same step, without the refresh; then the paper's update with NumPy
        plain = ntt.train_init(before.model, still, SGD)
        plain = eqx.tree_at(lambda s: s.opt_state, plain, before.opt_state)
        plain, _ = step(plain, batches[t - 1])
        x, y = map(jnp.asarray, batches[t - 1])
        dense = plain.model.to_dense()
        loss = lambda m: jnp.mean(
            optax.softmax_cross_entropy_with_integer_labels(
                jax.vmap(eqx.nn.inference_mode(m))(x), y
            )
        )
        slopes = eqx.filter_grad(loss)(dense)
        slopes = [np.abs(slopes.first.weight), np.abs(slopes.second.weight)]
        share = 0.4 / 2 * (1 + np.cos(np.pi * t / 8))
        lists = zip(weights(plain), masks(plain), slopes, masks(after), weights(after), strict=True)
        for weight, mask, slope, found, value in lists:
            kept, dropped = mask.sum(), round(share * mask.sum())
            size = np.where(mask, np.abs(weight), -1).ravel()
            stays = np.zeros(mask.size, bool)
            stays[np.argsort(-size, kind="stable")[: kept - dropped]] = True
            grow = np.argsort(-np.where(stays, -1, slope.ravel()), kind="stable")[:dropped]
            expected = stays.copy()
            expected[grow] = True
            np.testing.assert_array_equal(found.ravel(), expected)
            new = found & ~mask
            assert found.sum() == kept and not value[new].any()
            np.testing.assert_array_equal(value[found & mask], weight[found & mask])


@pytest.mark.parametrize("kind", [ntt.RigLRefresh, ntt.SETRefresh])
def test_nothing_grows_after_the_end_of_a_refresh(kind, getkey):
    falls = ntt.GradualDensity(0.3, end=6, initial=0.5)
    sparsity, refresh = ntt.Sparsity(falls), kind(every=2, until=3, fraction=0.4)
    sparse = ntt.prune(network(getkey()), ntt.scores.Random(getkey()), 0.5)
    states = run(sparse, ntt.DynamicSparsity(sparsity, refresh), list(stream(6)))
    assert not any((new & ~old).any() for old, new in zip(*map(masks, states[5:7]), strict=True))
    assert all(m.sum() == round(0.3 * m.size) for m in masks(states[6]))


@pytest.mark.parametrize("optimizer", [SGD, optax.adam(0.01)])
def test_what_grows_or_goes_has_no_momentum_and_what_stays_keeps_its_own(optimizer, getkey):
    sparse, sparsity = random_start(getkey(), 0.3)
    dynamic = ntt.DynamicSparsity(sparsity, ntt.SETRefresh(every=3, fraction=0.5))
    batches = list(stream(3))
    *_, before, after = run(sparse, dynamic, batches, optimizer)
    plain = ntt.train_init(before.model, ntt.TrainConfig(), optimizer)
    plain = eqx.tree_at(lambda s: s.opt_state, plain, before.opt_state)
    plain, _ = step(plain, batches[-1])
    moments = lambda s: [
        leaf
        for leaf in jax.tree.leaves(
            s.opt_state, is_leaf=lambda node: isinstance(node, ntt.SparseModel)
        )
        if isinstance(leaf, ntt.SparseModel)
    ]
    assert moments(after)
    for one, other in zip(moments(plain), moments(after), strict=True):
        for name in ("first", "second"):
            m = getattr(after.model.mask, name).weight
            changed = m ^ getattr(before.model.mask, name).weight
            old, new = (getattr(t.model, name).weight for t in (one, other))
            assert (m & changed).any() and not new[changed].any()
            np.testing.assert_array_equal(new[~changed], old[~changed])
            np.testing.assert_array_equal(
                getattr(other.model, name).bias, getattr(one.model, name).bias
            )


def test_set_keeps_the_largest_and_grows_by_its_seed(getkey):
    sparse, sparsity = random_start(getkey(), 0.3)
    ends = {}
    for seed in (0, 0, 1):
        refresh = ntt.SETRefresh(every=3, until=4, fraction=0.5, seed=seed)
        states = run(sparse, ntt.DynamicSparsity(sparsity, refresh), stream(4))
        found = [m.tobytes() for m in masks(states[3])]
        assert ends.setdefault(seed, found) == found
        lists = zip(weights(states[3]), masks(states[2]), masks(states[3]), strict=True)
        for weight, old, new in lists:
            kept = old.sum()
            assert new.sum() == kept
            survivors = np.abs(weight[new & old])
            assert len(survivors) >= kept - round(0.5 * kept)
            assert not weight[new & ~old].any()
        assert [m.tobytes() for m in masks(states[4])] == found
    assert ends[0] != ends[1]


@pytest.mark.parametrize("rewind", [0, 2])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_lottery_ticket_is_trained_pruned_and_rewound(rewind, scope, getkey):
    dynamic = ntt.lottery_ticket(0.2, steps=5, rounds=3, rewind=rewind, scope=scope)
    total = dynamic.refresh.num_steps
    assert total == 5 + 3 * (5 - rewind)
    states = run(network(getkey()), dynamic, stream(total), optax.adam(0.01))
    ends = [5 + n * (5 - rewind) for n in range(3)]
    before, done = masks(states[0]), 0
    for t, state in enumerate(states):
        found = masks(state)
        done += t in ends
        sizes = [m.size for m in found]
        density = 0.2 ** (done / 3)
        if scope == "layer":
            assert [m.sum() for m in found] == [round(density * size) for size in sizes]
        else:
            assert sum(m.sum() for m in found) == round(density * sum(sizes))
        assert not any((m & ~old).any() for m, old in zip(found, before, strict=True))
        if t in ends:  # back to the weights and the optimiser of step `rewind`
            for name in ("model", "opt_state"):
                now, then = (getattr(s, name) for s in (state, states[rewind]))
                now, then = (n.model if name == "model" else n for n in (now, then))
                leaves = lambda tree: jax.tree.leaves(eqx.filter(tree, eqx.is_array))
                pairs = zip(leaves(now), leaves(then), strict=True)
                assert all((a == b).all() for a, b in pairs)
        before = found


class Normed(eqx.Module):
    norm: eqx.nn.BatchNorm
    out: eqx.nn.Linear

    def __call__(self, x, state):
        h, state = self.norm(x, state)
        return self.out(h), state


def test_batch_norm_resumes_to_the_bit_and_nothing_is_compiled_again(getkey):
    norm = eqx.nn.BatchNorm(6, "batch", momentum=0.9, mode="batch")
    net, held = eqx.nn.make_with_state(Normed)(norm, eqx.nn.Linear(6, 3, key=getkey()))
    model = ntt.warm_up(ntt.StatefulModel(net, held), examples(50)[0])
    sparse = ntt.prune(model, ntt.scores.Random(getkey()), 0.5)
    dynamic = ntt.DynamicSparsity(ntt.Sparsity(0.5), ntt.RigLRefresh(every=2))
    start = ntt.train_init(sparse, ntt.TrainConfig(ema=0.9, dynamic=dynamic), SGD)
    whole, _ = ntt.train_steps(start, stream(6), num_steps=6)
    half, _ = ntt.train_steps(start, stream(6), num_steps=3)
    ended, _ = ntt.train_steps(half, list(stream(6))[3:], num_steps=6)
    one, other = (jax.tree.leaves(eqx.filter(s, eqx.is_array)) for s in (whole, ended))
    assert all((a == b).all() for a, b in zip(one, other, strict=True))
    traces = []

    @eqx.filter_jit
    def counted(state, batch):
        traces.append(1)
        return ntt.train_step(state, batch)

    for batch in stream(5):
        start, _ = counted(start, batch)
    assert len(traces) == 1


@pytest.mark.parametrize("score", [ntt.scores.LogitSnip(), ntt.scores.SynFlow()])
def test_a_silent_unit_keeps_its_weights(score, getkey):
    """Its weights have the score of pruned ones, 0, and are kept at a constant density."""
    sparse, sparsity = random_start(getkey(), 0.5)
    silent = eqx.tree_at(
        lambda m: m.first.bias, sparse.model, replace_fn=lambda b: b.at[:3].set(-9)
    )
    sparse = ntt.SparseModel(silent, sparse.mask)
    dynamic = ntt.DynamicSparsity(sparsity, ntt.ScoreRefresh(score, every=1))
    states = run(sparse, dynamic, stream(3))
    for state in states[1:]:
        for now, first in zip(masks(state), masks(states[0]), strict=True):
            np.testing.assert_array_equal(now, first)


def test_scores_that_cannot_rank_end_the_run(getkey):
    class Blind(ntt.AbstractRefresh):
        def due(self, step):
            return step == 2

        def scores(self, view):
            return jax.tree.map(jnp.zeros_like, view.weights())

    sparse, sparsity = random_start(getkey(), 0.5)
    config = ntt.TrainConfig(dynamic=ntt.DynamicSparsity(sparsity, Blind()))
    with pytest.raises(ValueError, match=r"train: the scores of Blind cannot rank .* step 2"):
        ntt.train_steps(ntt.train_init(sparse, config, SGD), stream(3), num_steps=3)


class Ends:
    """A schedule of a user's that says when it ends."""

    def __init__(self, end):
        self.end = end

    def __call__(self, step):
        return 0.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ntt.DynamicSparsity(0.5, ntt.SETRefresh()), "sparsity must be of type Sparsity"),
        (lambda: ntt.DynamicSparsity(ntt.Sparsity(0.5), "set"), "refresh must be of type Abs"),
        (lambda: ntt.DynamicSparsity(ntt.Sparsity(0.5), ntt.SETRefresh(), -1), "rewind must be"),
        (
            lambda: ntt.train_init(
                ntt.prune(network(jax.random.key(0)), ntt.scores.Magnitude(), 0.5),
                ntt.TrainConfig(
                    dynamic=ntt.DynamicSparsity(ntt.Sparsity(0.5), ntt.SETRefresh(4), 4)
                ),
                SGD,
            ),
            "train_init: a refresh follows step 4, and goes back to .* rewind=4 steps",
        ),
        (lambda: ntt.SETRefresh(fraction=1.0), r"SETRefresh: fraction must be in \(0, 1\)"),
        (lambda: ntt.SETRefresh(seed=-1), "SETRefresh: seed must be"),
        (lambda: ntt.RoundRefresh(5, 0), "RoundRefresh: rounds must be"),
        (lambda: ntt.RoundRefresh(5, 1, 5), "RoundRefresh: rewind must be below steps=5, got 5"),
        (lambda: ntt.GradualDensity(0.1, 60.0), "GradualDensity: end must be an integer"),
        (lambda: ntt.GradualDensity(0.1, 60, begin=0.5), "GradualDensity: begin must be an int"),
        (lambda: ntt.Sparsity(Ends(60.0)), "Sparsity: the schedule's end must be an integer"),
        (lambda: ntt.lottery_ticket(1.5, steps=5, rounds=1), "RoundDensity: "),
        (lambda: ntt.TrainConfig(dynamic="rigl"), "dynamic must be a DynamicSparsity"),
        (
            lambda: ntt.TrainConfig(ema=0.9, dynamic=ntt.lottery_ticket(0.5, steps=5, rounds=1)),
            "average of weights that are rewound",
        ),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with unchecked(), pytest.raises(ValueError, match=message):
        make()


def test_the_first_mask_must_have_the_counts(getkey):
    sparse, _ = random_start(getkey(), 0.5)
    dynamic = ntt.DynamicSparsity(ntt.Sparsity(0.3), ntt.SETRefresh())
    for model in (sparse, network(getkey())):
        with pytest.raises(ValueError, match="train_init: the model's mask does not have the"):
            ntt.train_init(model, ntt.TrainConfig(dynamic=dynamic), SGD)


@pytest.mark.parametrize("optimizer", [optax.lamb(1e-2), optax.lars(0.1, momentum=0.9)])
def test_what_is_dropped_takes_no_part_in_norms(optimizer, getkey):
    """The step after a refresh is one of an optimiser that never saw the dropped weights."""
    model, x = eqx.nn.MLP(6, 3, 12, 1, key=getkey()), jax.random.normal(getkey(), (16, 6))
    batch = x, jnp.arange(16) % 3
    falls = ntt.GradualDensity(0.3, 5, initial=0.9, begin=4)
    dynamic = ntt.DynamicSparsity(ntt.Sparsity(falls), ntt.MagnitudeRefresh(100))
    start = ntt.prune(model, ntt.scores.Magnitude(), 0.9)
    state = ntt.train_init(start, ntt.TrainConfig(dynamic=dynamic), optimizer)
    step = eqx.filter_jit(ntt.train_step)
    for _ in range(5):
        state, _ = step(state, batch)
    assert float(state.model.density()) < 0.35
    is_sparse = lambda node: isinstance(node, ntt.SparseModel)
    moments = [n for n in jax.tree.leaves(state.opt_state, is_leaf=is_sparse) if is_sparse(n)]
    assert moments
    for each in moments:
        for mask, leaf in zip(jax.tree.leaves(state.model.mask), weights_of(each), strict=True):
            assert not leaf[~np.asarray(mask)].any()


def weights_of(sparse):
    return [np.asarray(layer.weight) for layer in sparse.model.layers]
