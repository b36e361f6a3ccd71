"""Training whose large layers store kept weights alone gives what masked training gives."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.drawn_networks import draw
from helpers.tiers import default_only, slow

import ntt_eqx as ntt
from ntt_eqx._supervised import _on_kept_weights

STEPS, CLASSES = 12, 5
ADAM = optax.adam(1e-2)
ELEMENTWISE = {
    "momentum": optax.sgd(0.1, 0.9, nesterov=True),
    "adam": ADAM,
    "adamw by a schedule": optax.adamw(optax.cosine_decay_schedule(1e-2, STEPS)),
    "lion": optax.lion(1e-3),
    "adabelief": optax.adabelief(1e-2),
    "clipped entries": optax.chain(optax.clip(1e-3), ADAM),
    "a rate in the state": optax.inject_hyperparams(optax.rmsprop)(1e-3),
}
# Elementwise as well, for a model with two layers in a list.
OF_ONE_MODEL = {
    "decay by places": optax.chain(
        optax.masked(optax.add_decayed_weights(0.1), lambda p: marked(p)), optax.sgd(0.1)
    ),
}
TOGETHER = {
    "clipped norm": optax.chain(optax.clip_by_global_norm(0.1), ADAM),
    "adafactor": optax.adafactor(1e-2, min_dim_size_to_factor=8),
    "lamb": optax.lamb(1e-2),
    "muon": optax.contrib.muon(1e-2),
    "noise": optax.chain(optax.add_noise(0.1, 0.5, 0), ADAM),
    "finite or skipped": optax.apply_if_finite(ADAM, 3),
    "a rate by the size": optax.stateless(lambda g, _: jax.tree.map(lambda a: -a / a.size, g)),
    "a rate of large weights": optax.multi_transform(
        {True: optax.sgd(0.1), False: optax.sgd(0.3)},
        lambda p: jax.tree.map(lambda a: a.size > 40, p),  # of which 38 are kept in a layer of 192
    ),
    "decay of matrices": optax.chain(
        optax.add_decayed_weights(0.1, mask=lambda p: jax.tree.map(lambda a: a.ndim > 1, p)),
        optax.sgd(0.1),
    ),
}


def marked(params):
    """The weight of the second layer alone."""
    nowhere = jax.tree.map(lambda _: False, params)
    return eqx.tree_at(lambda p: p.model.layers[1].weight, nowhere, True)


@pytest.fixture
def formed(monkeypatch):
    """Sparse layers of every size may change their form; each attempt, and whether it did."""
    found = []
    monkeypatch.setattr(_on_kept_weights, "is_large", lambda mask: True)
    monkeypatch.setattr(_on_kept_weights, "pays_in_training", lambda mask, size: True)
    change = _on_kept_weights.on_kept_weights

    def watched(*arguments):
        after = change(*arguments)
        found.append(after is not None)
        return after

    monkeypatch.setattr(_on_kept_weights, "on_kept_weights", watched)
    return found


def network(key, sparsity=None, module=eqx.nn.MLP):
    model = module(12, CLASSES, 16, 2, key=key)
    return ntt.prune(model, ntt.scores.Random(key), sparsity or ntt.Sparsity(0.2))


def batches(count=STEPS, shape=(12,), seed=0, dtype: Any = np.float32):
    rng = np.random.default_rng(seed)
    return [
        (rng.standard_normal((8, *shape)).astype(dtype), rng.integers(0, CLASSES, 8))
        for _ in range(count)
    ]


def masked_steps(state, data):
    step = eqx.filter_jit(ntt.train_step)
    for batch in data:
        state, _ = step(state, batch)
    return state


def assert_same_training(found, expected, tolerance):
    """All but the optimiser's numbers of pruned weights, which stand still."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert eqx.tree_equal(found.model.mask, expected.model.mask)
    trees = [
        (s.model.model, s.average, ntt.SparseModel(s.model.model, s.model.mask).to_dense())
        for s in (found, expected)
    ]
    pairs = [jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array)) for tree in trees]
    for one, other in zip(*pairs, strict=True):
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "name", default_only(ELEMENTWISE | OF_ONE_MODEL, "momentum", "clipped entries")
)
def test_elementwise_optimisers_give_what_they_give_masked(name, formed, getkey):
    with jax.enable_x64(True):
        config = ntt.TrainConfig(ema=0.9)
        model = jax.tree.map(
            lambda a: a.astype(float) if eqx.is_inexact_array(a) else a, network(getkey())
        )
        optimizer = (ELEMENTWISE | OF_ONE_MODEL)[name]
        state, data = ntt.train_init(model, config, optimizer), batches(dtype=np.float64)
        after, rows = ntt.train_steps(state, data, num_steps=STEPS, log_every=4)
        assert formed == [True] and len(rows) == 3
        assert_same_training(after, masked_steps(state, data), 1e-12)


@pytest.mark.parametrize("name", default_only(TOGETHER, "clipped norm", "a rate of large weights"))
def test_other_optimisers_see_all_weights(name, formed, getkey):
    state, data = ntt.train_init(network(getkey()), ntt.TrainConfig(), TOGETHER[name]), batches()
    after, _ = ntt.train_steps(state, data, num_steps=STEPS)
    assert formed == [False]
    assert_same_training(after, masked_steps(state, data), 1e-6)


@pytest.mark.parametrize(
    "refresh", [ntt.RigLRefresh(4, until=9), slow(ntt.SETRefresh(4)), slow(ntt.SETRefresh(1))]
)
def test_masks_that_change_are_those_of_masked_training(refresh, formed, getkey):
    sparsity = ntt.Sparsity(0.2)
    dynamic = ntt.DynamicSparsity(sparsity, refresh)
    model = network(getkey(), sparsity)
    config = ntt.TrainConfig(dynamic=dynamic, ema=0.9)  # averages of weights that come back, too
    state, data = ntt.train_init(model, config, ADAM), batches()
    after, _ = ntt.train_steps(state, data, num_steps=STEPS)
    assert all(formed) and len(formed) == (0 if refresh.every == 1 else 3)
    assert not eqx.tree_equal(after.model.mask, model.mask)
    assert_same_training(after, masked_steps(state, data), 1e-6)


def drifts(updates, _):
    """An update that moves weights without a gradient, too."""
    return jax.tree.map(lambda g: -0.1 * g - 0.01, updates)


FALLING = ntt.GradualDensity(0.1, end=9, initial=0.9, begin=1)
COUNTS_CHANGE = {
    "each layer": (ntt.Sparsity(FALLING), ntt.MagnitudeRefresh(2, 12), ADAM),
    "ERK": (ntt.Sparsity(FALLING, allocation="erk"), ntt.MagnitudeRefresh(2, 12), ADAM),
    "all layers": (ntt.Sparsity(FALLING, "global"), ntt.MagnitudeRefresh(3, 12), ADAM),
    "other weights come": (ntt.Sparsity(FALLING), ntt.RigLRefresh(2, 12), ADAM),
    "one count for all layers": (ntt.Sparsity(0.9, "global"), ntt.SETRefresh(3), ADAM),
    "a schedule without end": (
        ntt.Sparsity(lambda step: 0.9 * 0.8**step),
        ntt.MagnitudeRefresh(3),
        ADAM,
    ),
    "updates without gradient": (
        ntt.Sparsity(FALLING),
        ntt.MagnitudeRefresh(2, 12),
        optax.stateless(drifts),
    ),
}


@pytest.mark.parametrize("name", default_only(COUNTS_CHANGE, "other weights come"))
def test_layers_whose_counts_change_have_room(name, formed, getkey):
    """One program serves counts from a half of its room on; what is spare changes nothing."""
    sparsity, refresh, optimizer = COUNTS_CHANGE[name]
    model = ntt.sparsify(eqx.nn.MLP(12, CLASSES, 16, 2, key=getkey()))
    model = model.with_mask(sparsity.mask(ntt.scores.Random(getkey())(model)))
    dynamic = ntt.DynamicSparsity(sparsity, refresh)
    config = ntt.TrainConfig(l2_weight=0.1, ema=0.9, dynamic=dynamic)
    state, data = ntt.train_init(model, config, optimizer), batches()
    after, rows = ntt.train_steps(state, data, num_steps=STEPS, log_every=1)
    assert len(formed) >= 4 and all(formed)
    step, losses = eqx.filter_jit(ntt.train_step), []
    for batch in data:
        state, metrics = step(state, batch)
        losses.append(metrics.loss)
    assert_same_training(after, state, 1e-5)
    np.testing.assert_allclose([row["train"]["loss"] for row in rows], losses, rtol=1e-5)


def test_a_falling_density_has_few_programs(monkeypatch, formed, getkey):
    rooms = []
    entries = _on_kept_weights.kept_entries

    def watched(*arguments):
        found = entries(*arguments)
        rooms.append(tuple(one.index.kept for one in found.values()))
        return found

    monkeypatch.setattr(_on_kept_weights, "kept_entries", watched)
    falling = ntt.GradualDensity(0.1, end=40)
    dynamic = ntt.DynamicSparsity(ntt.Sparsity(falling), ntt.MagnitudeRefresh(1))
    model = eqx.nn.MLP(12, CLASSES, 16, 1, key=getkey())
    state = ntt.train_init(model, ntt.TrainConfig(dynamic=dynamic), optax.sgd(0.1))
    after, _ = ntt.train_steps(state, batches(44), num_steps=44)
    assert not rooms  # a refresh behind each step leaves nothing to do on kept weights
    dynamic = ntt.DynamicSparsity(ntt.Sparsity(falling), ntt.MagnitudeRefresh(2, 40))
    state = ntt.train_init(model, ntt.TrainConfig(dynamic=dynamic), optax.sgd(0.1))
    after, _ = ntt.train_steps(state, batches(44), num_steps=44)
    counts = [int(m.sum()) for m in jax.tree.leaves(after.model.mask)]
    assert list(rooms[-1]) == counts  # which stay to the end
    assert len(rooms) == 21 and len(set(rooms[:-1])) <= 5


CHANGES = {
    "one mask": None,
    "SET": ntt.DynamicSparsity(ntt.Sparsity(0.2), ntt.SETRefresh(4)),
    "falls, then changes": ntt.DynamicSparsity(
        ntt.Sparsity(ntt.GradualDensity(0.2, end=6)), ntt.MagnitudeRefresh(2, 10)
    ),
}


@pytest.mark.parametrize("name", default_only(CHANGES, "falls, then changes"))
@pytest.mark.parametrize("cut", default_only((3, 4, 5, 7, 11), 7))
def test_a_run_cut_in_two_gives_the_bits_of_an_uncut_one(name, cut, formed, getkey):
    model = network(getkey())
    model = model.model if name.startswith("falls") else model
    state = ntt.train_init(model, ntt.TrainConfig(dynamic=CHANGES[name], ema=0.5), ADAM)
    data = batches()
    whole, _ = ntt.train_steps(state, data, num_steps=STEPS)
    half, _ = ntt.train_steps(state, data, num_steps=cut)
    again, _ = ntt.train_steps(half, data[cut:], num_steps=STEPS)
    assert formed and all(formed)
    assert eqx.tree_equal(again, whole)


def test_everyone_who_looks_sees_masked_states(formed, getkey):
    state = ntt.train_init(network(getkey()), ntt.TrainConfig(), ADAM)
    seen = []
    ntt.train_steps(
        state,
        batches(),
        num_steps=STEPS,
        log_every=4,
        observe={"seen": lambda s: seen.append(s) or {}},
        on_log=lambda s, row: seen.append(s),
        on_step=lambda progress: seen.append(progress.state),
    )
    assert formed == [True] and len(seen) == STEPS + 3 + 4 + 1
    assert all(jax.tree.structure(s) == jax.tree.structure(state) for s in seen)
    masked = masked_steps(state, batches())
    assert_same_training(seen[-1], masked, 1e-6)


class Reads(eqx.nn.MLP):
    """A model that multiplies by its weights itself."""

    def __call__(self, x):
        for layer in self.layers:
            x = jnp.tanh(layer.weight @ x)
        return x


class Asks(eqx.nn.MLP):
    """A model that treats layers of a known class in another way than the rest."""

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x) if type(layer) is eqx.nn.Linear else 2 * layer(x)
        return x


class Turns(eqx.nn.MLP):
    """A model that does something else with a weight than to multiply by it."""

    def __call__(self, x):
        for layer in self.layers:
            x = jnp.tanh(x @ layer.weight.T)
        return x


class Caps(eqx.nn.MLP):
    """A model that limits the deviation of its arrays, which none exceeds at the start."""

    def __call__(self, x):
        capped = lambda w: w * jnp.minimum(1.0, 0.4 / jnp.std(w))
        arrays, static = eqx.partition(self.layers, eqx.is_inexact_array)
        for layer in eqx.combine(jax.tree.map(capped, arrays), static):
            x = jnp.tanh(layer(x))
        return x


@pytest.mark.parametrize(
    ("module", "alike"), [(Reads, True), (Asks, True), (Turns, False), (Caps, False)]
)
def test_models_that_know_their_layers(module, alike, formed, getkey):
    """They see their own layers, and train masked where they see more of a weight."""
    state, data = (
        ntt.train_init(network(getkey(), module=module), ntt.TrainConfig(), ADAM),
        batches(),
    )
    after, _ = ntt.train_steps(state, data, num_steps=STEPS)
    assert formed == [alike]
    assert_same_training(after, masked_steps(state, data), 1e-6)


def test_objectives_of_ones_own_see_the_masked_model(formed, getkey):
    def objective(model, batch, key):
        assert isinstance(model.layers[0], eqx.nn.Linear)
        return optax.softmax_cross_entropy_with_integer_labels(jax.vmap(model)(batch[0]), batch[1])

    state = ntt.train_init(network(getkey()), ntt.TrainConfig(objective=objective), ADAM)
    ntt.train_steps(state, batches(), num_steps=2)
    assert formed == []


def test_a_divergence_is_explained_as_in_masked_training(formed, getkey, monkeypatch):
    state = ntt.train_init(network(getkey()), ntt.TrainConfig(), optax.sgd(1e12))
    with pytest.raises(ntt.DivergenceError) as one:
        ntt.train_steps(state, batches(), num_steps=STEPS)
    assert formed == [True]
    monkeypatch.setattr(_on_kept_weights, "pays_in_training", lambda mask, size: False)
    with pytest.raises(ntt.DivergenceError) as other:
        ntt.train_steps(state, batches(), num_steps=STEPS)
    assert str(one.value) == str(other.value)


@pytest.mark.filterwarnings("ignore::ntt_eqx.LayerCollapseWarning")
def test_only_large_layers_with_few_weights_change_their_form(monkeypatch, getkey):
    tried = []
    change = _on_kept_weights.on_kept_weights
    monkeypatch.setattr(
        _on_kept_weights,
        "on_kept_weights",
        lambda *arguments: tried.append(change(*arguments)) or tried[-1],
    )
    for width, density, expected in [(64, 0.01, []), (520, 0.5, [False]), (520, 0.01, [True])]:
        tried.clear()
        model = eqx.nn.MLP(12, CLASSES, width, 2, key=getkey())
        sparse = ntt.prune(model, ntt.scores.Random(getkey()), ntt.Sparsity(density))
        ntt.train(sparse, batches(), ADAM, num_steps=2)
        assert [after is not None for after in tried] == expected


@pytest.mark.filterwarnings("ignore::ntt_eqx.LayerCollapseWarning")
@pytest.mark.parametrize("seed", default_only(range(12), 0))
def test_drawn_networks_train_as_masked_ones(seed, formed):
    rng = np.random.default_rng(seed)
    with jax.enable_x64(True):
        sparse, x = draw(seed)
        out = eqx.filter_eval_shape(jax.vmap(sparse), x).shape
        data = [(rng.normal(size=x.shape), rng.normal(size=out)) for _ in range(5)]
        optimizer = list(ELEMENTWISE.values())[seed % len(ELEMENTWISE)]
        state = ntt.train_init(sparse, ntt.TrainConfig(objective=ntt.SquaredError()), optimizer)
        after, _ = ntt.train_steps(state, data, num_steps=5)
        assert formed == [True]
        assert_same_training(after, masked_steps(state, data), 1e-9)


def test_batches_of_other_sizes_choose_other_layers(getkey, monkeypatch):
    """A short last batch behind a refresh takes other layers than the batches before it."""
    monkeypatch.setattr(_on_kept_weights, "is_large", lambda mask: True)
    pays = lambda mask, size: size >= 8 or mask.shape == (16, 12)
    monkeypatch.setattr(_on_kept_weights, "pays_in_training", pays)
    dynamic = ntt.DynamicSparsity(ntt.Sparsity(0.2), ntt.SETRefresh(2))
    state = ntt.train_init(network(getkey()), ntt.TrainConfig(dynamic=dynamic), ADAM)
    sizes = [8, 8, 3, 8, 8, 8, 3]
    data = [(x[:n], y[:n]) for (x, y), n in zip(batches(len(sizes)), sizes, strict=True)]
    after, _ = ntt.train_steps(state, data, num_steps=len(data))
    assert_same_training(after, masked_steps(state, data), 1e-5)
