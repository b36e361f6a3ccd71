"""Masks on few channels keep single weights, all of them between a part of the channels."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.drawn_networks import draw
from helpers.refusals import unchecked
from helpers.tiers import default_only, drawn, slow

import ntt_eqx as ntt

MODELS = {
    "perceptron": (lambda key: ntt.models.LeNet300100(key=key), (1, 28, 28)),
    "convolutions": (lambda key: ntt.models.LeNet5(key=key), (1, 28, 28)),
}


def arrays_of(tree):
    named = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in named}


HOW: list[tuple[Any, Any]] = [("layer", None), ("layer", "erk"), ("global", None)]


def counts(mask):
    return [int(m.sum()) for m in jax.tree.leaves(mask)]


def part_of(pattern, mask):
    """All that the part has, worked out from its indices alone."""
    found = {name: np.ones(m.shape, bool) for name, m in arrays_of(mask).items()}
    for one in pattern.chosen:
        along = np.isin(np.arange(one.size), one.numbers)
        shape = [-1 if n == one.axis else 1 for n in range(found[one.weight].ndim)]
        found[one.weight] &= along.reshape(shape)
    return found


def lies_within(mask, part):
    return all(not (m & ~part[name]).any() for name, m in arrays_of(mask).items())


def check_few(model, x, density, key):
    """Everything that masks on few channels promise; returns what `compact` makes of one."""
    pattern = ntt.few_channels(model, x, 1 / 2, key=key)
    dense = ntt.sparsify(model).mask
    part, size = part_of(pattern, dense), sum(m.size for m in jax.tree.leaves(dense))
    scores, drawn_scores = ntt.scores.Random(key)(model), {}
    for scope, allocation in HOW:
        sparsity = ntt.Sparsity(density, scope, allocation, pattern)
        mask = sparsity.quiet_mask(scores)
        assert lies_within(mask, part)
        if allocation is None and scope == "layer":
            whole = [round(density * m.size) for m in jax.tree.leaves(dense)]
            assert counts(mask) == whole
        else:
            assert sum(counts(mask)) == round(density * size)
        assert bool(sparsity.holds(mask))
        assert counts(jax.jit(sparsity.quiet_mask)(scores)) == counts(mask)
        for name, leaf in arrays_of(mask).items():  # the highest scores of the part, and no others
            drawn_scores[name] = np.asarray(arrays_of(scores)[name])
            if scope == "layer":
                ranked = np.sort(drawn_scores[name][part[name]])
                np.testing.assert_array_equal(
                    np.sort(drawn_scores[name][leaf]), ranked[len(ranked) - leaf.sum() :]
                )
    sparse = ntt.SparseModel(model, mask)
    found = ntt.compact(sparse, x)
    return part, found


@pytest.mark.parametrize("name", default_only(MODELS, "perceptron"))
def test_a_mask_lies_on_its_part_of_the_channels(name, getkey):
    make, shape = MODELS[name]
    model, x = make(getkey()), jnp.ones((2, *shape))
    _, found = check_few(model, x, 0.05, getkey())
    assert found.compact_parameters < 0.6 * found.parameters
    pattern = ntt.few_channels(model, x, key=getkey())
    sixth = ntt.prune(
        model, ntt.scores.Random(getkey()), ntt.Sparsity(0.01, "layer", "erk", pattern)
    )
    *hidden, last = jax.tree.leaves(sixth.mask)
    for mask in hidden:
        assert mask.reshape(len(mask), -1).any(1).sum() <= round(len(mask) / 6)
    assert last.any(1).all()  # outputs are not channels that could go
    small = ntt.compact(sixth, x)
    assert small.compact_parameters < 0.18 * small.parameters


def look_at(seed, key):
    sparse, x = draw(seed)
    try:
        check_few(sparse.model, x, 0.1, key)
    except ValueError as error:
        text = str(error)
        assert "no channels that could go" in text or "leaves no weight" in text, text
        return False
    return True


def test_networks_that_were_drawn(getkey, x64):
    assert any([look_at(seed, getkey()) for seed in range(2)])


@pytest.mark.slow
def test_many_networks_that_were_drawn(getkey, x64):
    looked = [look_at(seed, getkey()) for seed in range(drawn(12))]
    assert 12 * sum(looked) > 5 * len(looked)


def test_erk_shares_are_those_of_whole_layers_up_to_the_part(getkey):
    model, x = eqx.nn.MLP(6, 4, 12, 2, key=getkey()), jnp.ones((1, 6))
    pattern = ntt.few_channels(model, x, 1 / 3, key=getkey())
    sparsity = ntt.Sparsity(0.15, "layer", "erk", pattern)
    mask = ntt.prune(model, ntt.scores.Random(getkey()), sparsity).mask
    # 39.6 of 264 by outputs + inputs are 12.3, 16.4 and 10.9, and the part has 24, 16 and 16.
    rest = (0.15 * 264 - 16) / (18 + 16)
    assert sum(counts(mask)) == 40
    np.testing.assert_allclose(counts(mask), [18 * rest, 16, 16 * rest], atol=1)


@pytest.mark.parametrize("allocation", [None, "erk"])
def test_a_schedule_begins_with_all_of_the_part(allocation, getkey):
    model, x = ntt.models.LeNet300100(key=getkey()), jnp.ones((1, 1, 28, 28))
    pattern, scores = ntt.few_channels(model, x, key=getkey()), ntt.scores.Random(getkey())(model)
    falling = ntt.Sparsity(ntt.GradualDensity(0.01, 10), "layer", allocation, pattern)
    inside = jax.jit(falling.mask)
    constant = ntt.Sparsity(0.01, "layer", allocation, pattern)
    assert counts(falling.mask(scores, 0)) == counts(falling.widest(ntt.sparsify(model).mask))
    assert counts(falling.mask(scores, 10)) == counts(constant.mask(scores))
    part = part_of(pattern, ntt.sparsify(model).mask)
    for step in range(0, 11, 2):
        np.testing.assert_allclose(
            counts(inside(scores, step)), counts(falling.mask(scores, step)), atol=1
        )
        assert lies_within(inside(scores, step), part)


@pytest.mark.parametrize("num_steps", [None, 20])
def test_a_schedule_must_not_end_with_more_than_the_part(num_steps, getkey):
    """Also one that says no `end`: what counts is the last step, or where it comes to rest."""
    model, x = eqx.nn.MLP(4, 3, 8, 2, key=getkey()), jnp.ones((8, 4))
    pattern = ntt.few_channels(model, x, 1 / 2, key=getkey())

    def method(last):
        falling = lambda step: jnp.maximum(1 - 0.1 * step, last)
        return ntt.NeuralTangentTransfer(
            sparsity=ntt.Sparsity(falling, "layer", "erk", pattern),
            optimizer=optax.adam(1e-3),
            num_steps=num_steps,
        )

    ntt.ntt_init(model, method(0.2))
    with pytest.raises(ValueError, match="to choose from there"):
        ntt.ntt_init(model, method(0.5))
    dynamic = ntt.DynamicSparsity(method(0.5).sparsity, ntt.MagnitudeRefresh(2))
    with pytest.raises(ValueError, match="to choose from there"):
        ntt.train_init(ntt.sparsify(model), ntt.TrainConfig(dynamic=dynamic), optax.adam(1e-2))


REFRESHES = {
    "magnitude": ntt.MagnitudeRefresh(1),
    "rigl": ntt.RigLRefresh(1),
    "set": ntt.SETRefresh(1),
}


@pytest.mark.parametrize("kind", REFRESHES)
def test_a_transfer_stays_within_its_part(kind, getkey):
    model = eqx.nn.MLP(4, 3, 8, 2, key=getkey())
    x = jax.random.normal(getkey(), (8, 4))
    pattern = ntt.few_channels(model, x, 1 / 2, key=getkey())
    method = ntt.NeuralTangentTransfer(
        sparsity=ntt.Sparsity(0.15, "layer", "erk", pattern),
        optimizer=optax.adam(0.1),
        refresh=REFRESHES[kind],
        num_steps=8,
    )
    state = ntt.ntt_init(model, method, x=x, key=getkey())
    step, first = eqx.filter_jit(ntt.ntt_step), arrays_of(state.student.mask)
    part = part_of(pattern, state.student.mask)
    for _ in range(6):
        state, _ = step(state, x)
        assert lies_within(state.student.mask, part)
        assert counts(state.student.mask) == [m.sum() for m in first.values()]
    after = arrays_of(state.student.mask)
    assert any((after[name] != first[name]).any() for name in first)


TRANSFERRED: dict[str, tuple[Any, str]] = {
    "active": ("active", "full"),
    "active, sketched": ("active", "sketch"),
    "ambient": ("ambient", "full"),
}


@pytest.mark.parametrize("kind", default_only(TRANSFERRED, "active", "ambient"))
@pytest.mark.parametrize("name", ["perceptron", slow("convolutions")])
def test_a_transfer_to_the_part_is_that_to_the_whole(name, kind, getkey, x64):
    """The ambient kernel of both is one where channels outside of the part are constant 0."""
    if name == "perceptron":
        model, shape = eqx.nn.MLP(6, 3, 12, 2, key=getkey()), (6,)
    else:
        model, shape = SmallConvolutions(getkey()), (2, 6, 6)
    kernel, outputs = TRANSFERRED[kind]
    if kernel == "ambient":
        arrays, rest = eqx.partition(model, eqx.is_array)
        model = eqx.combine(
            jax.tree.map(lambda a: a if a.ndim == 2 or a.ndim > 3 else 0 * a, arrays), rest
        )
    x = jax.random.normal(getkey(), (6, *shape))
    dense = ntt.sparsify(model)
    few = ntt.few_channels(model, x, 1 / 2, key=getkey())

    def method(pattern):
        return ntt.NeuralTangentTransfer(
            sparsity=ntt.Sparsity(ntt.GradualDensity(0.1, 4), "layer", "erk", pattern),
            optimizer=optax.sgd(0.05, momentum=0.9),
            loss=ntt.KernelMatching(kernel, ntt.Sketch(2) if outputs == "sketch" else ntt.Full()),
            refresh=ntt.MagnitudeRefresh(2),
            num_steps=6,
        )

    part = ntt.compact(dense.with_mask(method(few).sparsity.widest(dense.mask)), x)
    assert part.compact_parameters < 0.6 * part.parameters
    one = ntt.ntt_init(model, method(few))
    small = part.take(dense).model
    two = ntt.ntt_init(model, method(few.inside(dense.mask, part.model.mask)), student=small)
    assert jax.tree.structure(two.teacher) == jax.tree.structure(model)
    step = eqx.filter_jit(ntt.ntt_step)
    for _ in range(6):
        one, first = step(one, x)
        two, second = step(two, x)
        for field in ("loss", "kernel_distance", "target_distance", "weight_norm"):
            np.testing.assert_allclose(getattr(first, field), getattr(second, field), rtol=1e-5)
    again = part.expand(two.student, one.student)
    leaves = [jax.tree.leaves(eqx.filter(each, eqx.is_array)) for each in (one.student, again)]
    for a, b in zip(*leaves, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


class SmallConvolutions(eqx.Module):
    first: eqx.nn.Conv2d
    second: eqx.nn.Conv2d
    last: eqx.nn.Linear

    def __init__(self, key):
        one, two, three = jax.random.split(key, 3)
        self.first = eqx.nn.Conv2d(2, 6, 3, padding=1, key=one)
        self.second = eqx.nn.Conv2d(6, 8, 3, stride=2, key=two)
        self.last = eqx.nn.Linear(32, 3, key=three)

    def __call__(self, x):
        x = jax.nn.relu(self.second(jax.nn.relu(self.first(x))))
        return self.last(x.reshape(-1))


def test_a_training_stays_within_its_part(getkey):
    """Its density falls from the part whole, which is what `widest` gives."""
    model = eqx.nn.MLP(4, 3, 8, 2, key=getkey())
    x, y = jax.random.normal(getkey(), (64, 4)), jnp.arange(64) % 3
    pattern = ntt.few_channels(model, x, 1 / 2, key=getkey())
    sparsity = ntt.Sparsity(ntt.GradualDensity(0.15, 6), "layer", "erk", pattern)
    dynamic = ntt.DynamicSparsity(sparsity, ntt.MagnitudeRefresh(2))
    dense = ntt.sparsify(model)
    config = ntt.TrainConfig(dynamic=dynamic)
    first = dense.with_mask(sparsity.widest(dense.mask))
    state = ntt.train_init(first, config, optax.adam(1e-2))
    step, part = eqx.filter_jit(ntt.train_step), part_of(pattern, dense.mask)
    assert lies_within(first.mask, part)
    for _ in range(8):
        state, _ = step(state, (x[:16], y[:16]))
        assert lies_within(state.model.mask, part)
    assert sum(counts(state.model.mask)) == round(0.15 * 120)


@pytest.mark.slow
def test_a_residual_network_with_batch_norm(getkey):
    model = ntt.models.make_model("resnet-20-bn", (3, 8, 8), 10, key=getkey())
    x = jax.random.normal(getkey(), (2, 3, 8, 8))
    pattern = ntt.few_channels(model, x, 1 / 4, key=getkey())
    sparsity = ntt.Sparsity(0.04, "layer", "erk", pattern)
    sparse = ntt.prune(model, ntt.scores.Random(getkey()), sparsity)
    small = ntt.compact(ntt.warm_up(sparse, x), x)
    assert small.compact_parameters < 0.1 * small.parameters


def test_rounds_keep_their_part(getkey):
    model, x = ntt.models.LeNet300100(key=getkey()), jnp.ones((4, 1, 28, 28))
    sparsity = ntt.Sparsity(0.01, "global", pattern=ntt.few_channels(model, x, key=getkey()))
    found = ntt.prune(model, ntt.scores.SynFlow(), sparsity, x, steps=5)
    assert lies_within(found.mask, part_of(sparsity.pattern, found.mask))
    assert sum(counts(found.mask)) == 2662 and bool(sparsity.holds(found.mask))


def test_counts_of_a_mask_are_kept(getkey):
    model, x = ntt.models.LeNet300100(key=getkey()), jnp.ones((1, 1, 28, 28))
    pattern = ntt.few_channels(
        model, x, {".hidden1.weight": 0.5, ".hidden2.weight": 0.1}, key=getkey()
    )
    mask = ntt.Sparsity(0.01, "layer", "erk", pattern).mask(ntt.scores.Random(getkey())(model))
    again = ntt.Sparsity(0.5, pattern=pattern).of_mask(mask)
    assert counts(again.mask(ntt.scores.Magnitude()(model))) == counts(mask)
    outside = jax.tree.map(lambda m: jnp.ones_like(m), mask)
    with pytest.raises(ValueError, match="does not have the pattern FewChannels"):
        again.of_mask(outside)


def test_what_does_not_fit_is_refused(getkey):
    model, x = ntt.models.LeNet300100(key=getkey()), jnp.ones((1, 1, 28, 28))
    pattern, scores = ntt.few_channels(model, x, key=getkey()), ntt.scores.Magnitude()(model)
    for scope, allocation in HOW:
        sparsity = ntt.Sparsity(0.2, scope, allocation, pattern)
        with pytest.raises(ValueError, match=r"0\.2.* of .* to choose from there"):
            ntt.make_mask(scores, sparsity)
    falling = ntt.Sparsity(ntt.GradualDensity(0.2, 4), "layer", "erk", pattern)
    method = ntt.NeuralTangentTransfer(sparsity=falling, optimizer=optax.adam(1e-3), num_steps=8)
    with pytest.raises(ValueError, match="to choose from there"):
        ntt.ntt_init(model, method, x=x, key=getkey())
    with pytest.raises(ValueError, match="those of another model"):
        other = eqx.nn.MLP(4, 3, 8, 1, key=getkey())
        ntt.prune(other, ntt.scores.Magnitude(), ntt.Sparsity(0.1, pattern=pattern))
    with pytest.raises(ValueError, match="not made of whole channels"):
        ntt.FewChannels.of_mask(ntt.make_mask(scores, 0.1))
    with pytest.raises(ValueError, match="no channels that could go"):
        ntt.few_channels(eqx.nn.Linear(3, 2, key=getkey()), jnp.ones((1, 3)), key=getkey())
    for share in (0.0, 1.5, 1e-6):
        with pytest.raises(ValueError, match="density"):
            ntt.few_channels(model, x, share, key=getkey())


def test_a_model_is_not_its_channels():
    made: list[Any] = [lambda: ntt.FewChannels(len), lambda: ntt.CoupledChannels(len, len)]
    for make, name in zip(made, ("few_channels", "coupled_channels"), strict=True):
        with unchecked(), pytest.raises(ValueError, match=rf"{name}\(model, x"):
            make()


def test_a_part_is_trained_in_place_of_the_whole(getkey):
    """`take` and `expand`: the steps of the part are those of the network."""
    model = ntt.models.LeNet5(key=getkey())
    x, y = jax.random.normal(getkey(), (64, 1, 28, 28)), jnp.arange(64) % 10
    sparsity = ntt.Sparsity(0.02, "layer", "erk", ntt.few_channels(model, x, 1 / 4, key=getkey()))
    whole = ntt.prune(model, ntt.scores.Random(getkey()), sparsity)
    part = ntt.compact(whole.with_mask(sparsity.widest(whole.mask)), x)
    small = part.take(whole)
    assert counts(small.mask) == counts(whole.mask)
    assert eqx.tree_equal(part.expand(small, whole), whole)
    batches = [(x[n : n + 16], y[n : n + 16]) for n in range(0, 64, 16)]
    optimizer = optax.adam(1e-2)
    one, _ = ntt.train(whole, iter(batches), optimizer, num_steps=4)
    two, _ = ntt.train(small, iter(batches), optimizer, num_steps=4)
    two = part.expand(two, whole)
    arrays = lambda tree: jax.tree.leaves(eqx.filter(tree, eqx.is_array))
    for ours, theirs in zip(arrays(two), arrays(one), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    assert not eqx.tree_equal(two, whole)
    for wrong in (small, ntt.sparsify(ntt.models.LeNet300100(key=getkey()))):
        with pytest.raises(ValueError, match=r"Compacted\.take: the model has other arrays"):
            part.take(wrong)
    with pytest.raises(ValueError, match=r"Compacted\.expand: `small` has other arrays"):
        part.expand(whole, whole)


@pytest.mark.slow
def test_running_statistics_of_a_part_return(getkey):
    model = ntt.models.make_model("resnet-20-bn", (3, 8, 8), 10, key=getkey())
    x = jax.random.normal(getkey(), (4, 3, 8, 8))
    pattern = ntt.few_channels(model, x, 1 / 4, key=getkey())
    whole = ntt.warm_up(
        ntt.prune(model, ntt.scores.Random(getkey()), ntt.Sparsity(0.04, "layer", "erk", pattern)),
        x,
    )
    part = ntt.compact(whole.with_mask(ntt.Sparsity(0.04, pattern=pattern).widest(whole.mask)), x)
    small = ntt.warm_up(part.take(whole), 2 * x)
    again = part.expand(small, whole)
    one, two = (jax.vmap(eqx.nn.inference_mode(each))(x) for each in (small, again))
    np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-4)


class Normed(eqx.Module):
    """A normalisation of each channel by itself, which fixes the number of channels."""

    first: eqx.nn.Conv2d
    norm: eqx.nn.GroupNorm
    second: eqx.nn.Conv2d
    head: eqx.nn.Linear

    def __init__(self, *, key):
        one, two, three = jax.random.split(key, 3)
        self.first = eqx.nn.Conv2d(1, 12, 3, padding=1, key=one)
        self.norm = eqx.nn.GroupNorm(12, 12)
        self.second = eqx.nn.Conv2d(12, 12, 3, padding=1, key=two)
        self.head = eqx.nn.Linear(12, 10, key=three)

    def __call__(self, x):
        x = jax.nn.relu(self.norm(self.first(x)))
        return self.head(jax.nn.relu(self.second(x)).mean((1, 2)))


@pytest.mark.parametrize("make", [ntt.models.LeNet300100, slow(Normed)])
def test_inside_its_part_a_pattern_keeps_the_same_weights(make, getkey):
    model, x = make(key=getkey()), jnp.ones((1, 1, 28, 28))
    pattern = ntt.few_channels(model, x, 1 / 4, key=getkey())
    dense, score = ntt.sparsify(model), ntt.scores.Magnitude()
    density = 0.02 if make is ntt.models.LeNet300100 else 0.06
    for scope, allocation in HOW:
        whole = ntt.Sparsity(density, scope, allocation, pattern)
        part = ntt.compact(dense.with_mask(whole.widest(dense.mask)), x)
        inside = pattern.inside(dense.mask, part.model.mask)
        assert len(inside.chosen) == (0 if make is ntt.models.LeNet300100 else 2)
        inner = ntt.Sparsity(density, scope, allocation, inside)
        small = part.take(dense.with_mask(whole.mask(score(model))))
        scores = score(small.model)
        again = inner.mask(scores)
        assert eqx.tree_equal(again, small.mask) and bool(inner.holds(again))
        assert counts(jax.jit(inner.mask)(scores)) == counts(again)
        with pytest.raises(ValueError, match="to choose from there"):
            ntt.Sparsity(0.3, scope, allocation, inner.pattern).mask(scores)
