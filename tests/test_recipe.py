"""Recipes: rates by their formulas, optimisers against NumPy, refusals, and what follows."""

import dataclasses
import json
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.clusters import examples, network, stream
from helpers.refusals import unchecked

import ntt_eqx as ntt
from ntt_eqx import Recipe

step = eqx.filter_jit(ntt.train_step)
SGD = {"optimizer": "sgd", "learning_rate": 0.1}


def rates(recipe, steps):
    rate = recipe.rate(steps)
    with jax.numpy_dtype_promotion("standard"):  # as optax needs
        return [float(rate(t)) if callable(rate) else rate for t in range(steps)]


def test_the_default_is_adam_at_a_constant_rate():
    params = {"w": jnp.ones((3, 2)), "b": None}
    ours, usual = Recipe().transformation(10), optax.adam(1e-3)
    assert jax.tree.structure(ours.init(params)) == jax.tree.structure(usual.init(params))
    gradient = {"w": jnp.arange(6.0).reshape(3, 2), "b": None}
    with jax.numpy_dtype_promotion("standard"):
        one, other = (o.update(gradient, o.init(params), params)[0]["w"] for o in (ours, usual))
    np.testing.assert_array_equal(one, other)
    assert rates(Recipe(), 3) == [1e-3] * 3


def test_steps_fall_at_shares_of_the_training():
    recipe = Recipe(schedule="steps", **SGD)
    expected = [0.1] * 20 + [0.01] * 10 + [0.001] * 10
    np.testing.assert_allclose(rates(recipe, 40), expected, rtol=1e-6)
    thrice = Recipe(schedule="steps", milestones=(0.25, 0.5, 0.9), step_factor=0.5, **SGD)
    expected = [0.1] * 5 + [0.05] * 5 + [0.025] * 8 + [0.0125] * 2
    np.testing.assert_allclose(rates(thrice, 20), expected, rtol=1e-6)
    np.testing.assert_allclose(rates(thrice, 1), [0.025], rtol=1e-6)  # two of them at step 0


@pytest.mark.parametrize("final", [0.0, 0.01, 1.0])
def test_cosine_and_linear_are_their_formulas(final):
    t = np.arange(30) / 30
    cosine = Recipe(schedule="cosine", final_share=final, **SGD)
    expected = 0.1 * (final + (1 - final) * (1 + np.cos(math.pi * t)) / 2)
    np.testing.assert_allclose(rates(cosine, 30), expected, rtol=1e-5, atol=1e-8)
    linear = Recipe(schedule="linear", final_share=final, **SGD)
    expected = 0.1 + (0.1 * final - 0.1) * t
    np.testing.assert_allclose(rates(linear, 30), expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("schedule", ["constant", "steps", "cosine", "linear"])
def test_a_warm_up_rises_to_the_rate_and_the_schedule_follows(schedule):
    found = rates(Recipe(schedule=schedule, warm_up=0.1, **SGD), 50)
    np.testing.assert_allclose(found[:5], 0.1 * np.arange(1, 6) / 5, rtol=1e-6)
    alone = rates(Recipe(schedule=schedule, **SGD), 45)
    if schedule == "steps":  # at the same shares of the whole
        alone = [0.1] * 20 + [0.01] * 13 + [0.001] * 12
    np.testing.assert_allclose(found[5:], alone, rtol=1e-5)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_a_warm_up_may_last_longer_than_the_milestones_of_another_schedule(schedule):
    found = rates(Recipe(schedule=schedule, warm_up=0.6, **SGD), 50)
    np.testing.assert_allclose(found[:30], 0.1 * np.arange(1, 31) / 30, rtol=1e-6)
    with pytest.raises(ValueError, match="milestones must rise and lie after the warm-up"):
        Recipe(schedule="steps", warm_up=0.6, **SGD)


def by_hand(recipe, weight, bias, gradients, rate):
    """Textbook optimisers in float64; the bias never decays."""
    out = []
    for at, decays in ((weight, True), (bias, False)):
        w, m, v = np.asarray(at, np.float64), 0.0, 0.0
        lam = recipe.weight_decay * decays
        for t, given in enumerate(gradients, start=1):
            g = np.asarray(given[0 if decays else 1], np.float64)
            if recipe.decay == "l2":
                g = g + lam * w
            if recipe.optimizer == "sgd":
                m = recipe.momentum * m + g
                step = g + recipe.momentum * m if recipe.nesterov else m
            else:
                m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
                step = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
            if recipe.decay == "decoupled":
                step = step + lam * w
            w = w - rate[t - 1] * step
        out.append(w)
    return out


@pytest.mark.parametrize(
    "fields",
    [
        SGD,
        {**SGD, "momentum": 0.9},
        {**SGD, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-2},
        {**SGD, "momentum": 0.9, "weight_decay": 5e-2, "decay": "decoupled", "schedule": "cosine"},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "decay": "decoupled", "learning_rate": 0.01},
    ],
)
def test_optimisers_are_the_textbooks(fields, x64):
    recipe = Recipe(**fields)
    draw = np.random.default_rng(0)
    layer = eqx.nn.Linear(3, 2, key=jax.random.key(0), dtype=jnp.float64)
    made = [(draw.normal(size=(2, 3)), draw.normal(size=2)) for _ in range(6)]
    optimizer = recipe.transformation(6)
    params, rest = eqx.partition(layer, eqx.is_inexact_array)
    weight, bias = by_hand(recipe, layer.weight, layer.bias, made, rates(recipe, 6))
    with jax.numpy_dtype_promotion("standard"):
        state = optimizer.init(params)
        for g in made:
            gradient = eqx.tree_at(lambda p: (p.weight, p.bias), params, tuple(map(jnp.asarray, g)))
            updates, state = optimizer.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params.weight, weight, rtol=1e-6)
    np.testing.assert_allclose(params.bias, bias, rtol=1e-6)


def test_only_weights_decay_and_pruned_ones_stay_as_they_are(getkey):
    class Net(eqx.Module):
        conv: eqx.nn.Conv2d
        norm: eqx.nn.GroupNorm
        out: eqx.nn.Linear

        def __call__(self, x):
            return self.out(self.norm(self.conv(x)).ravel())

    net = Net(eqx.nn.Conv2d(1, 2, 3, key=getkey()), eqx.nn.GroupNorm(1, 2),
              eqx.nn.Linear(8, 3, key=getkey()))  # fmt: skip
    sparse = ntt.sparsify(net)
    sparse = sparse.with_mask(ntt.make_mask(ntt.scores.Random(getkey())(net), 0.5))
    recipe = Recipe(optimizer="sgd", learning_rate=0.1, weight_decay=0.5, l2=0.0)
    flat = lambda model, batch, key: jnp.zeros(())  # so that all that moves a weight is its decay
    state = ntt.train_init(sparse, ntt.TrainConfig(0.0, flat), recipe.transformation(1))
    after, _ = step(state, (jnp.zeros((2, 1, 4, 4)), jnp.zeros(2, jnp.int32)))
    old, new = sparse.model, after.model.model
    for name in ("conv", "out"):
        mask = getattr(sparse.mask, name).weight
        before = getattr(old, name).weight
        expected = jnp.where(mask, before * jnp.float32(1 - 0.1 * 0.5), before)
        np.testing.assert_allclose(getattr(new, name).weight, expected, rtol=1e-6)
        np.testing.assert_array_equal(getattr(new, name).bias, getattr(old, name).bias)
    np.testing.assert_array_equal(new.norm.weight, old.norm.weight)


def test_weight_decay_is_twice_the_l2_weight_of_the_loss(getkey):
    model = network(getkey())
    plain = {**SGD, "momentum": 0.9}
    recipes = Recipe(weight_decay=0.02, l2=0.0, **plain), Recipe(l2=0.01, **plain)
    ends = []
    for recipe in recipes:
        state = recipe.init(model, 5)
        state, _ = ntt.train_steps(state, stream(5), num_steps=5)
        ends.append(state.model)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
                 *(eqx.filter(m, eqx.is_array) for m in ends))  # fmt: skip


def test_smoothed_labels_are_the_cross_entropy_of_the_smoothed_target(getkey):
    model, (x, y) = eqx.nn.inference_mode(network(getkey())), examples(20)
    logits = np.asarray(jax.vmap(model)(x), np.float64)
    logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    target = 0.9 * np.eye(3)[y] + 0.1 / 3
    found = ntt.evaluate(model, (x, y), ntt.CrossEntropy(0.1))
    assert found["loss"] == pytest.approx(-(target * logs).sum(1).mean(), rel=1e-5)
    plain = ntt.evaluate(model, (x, y))
    assert found["accuracy"] == plain["accuracy"] and found["loss"] != plain["loss"]


def test_a_moving_average_follows_the_weights(getkey):
    model = network(getkey())
    recipe = Recipe(ema=0.75, **SGD)
    state = recipe.init(model, 6)
    expected = np.asarray(model.second.weight, np.float64)
    rows = []
    for batch in stream(6):
        state, _ = step(state, batch)
        expected = 0.75 * expected + 0.25 * np.asarray(state.model.second.weight, np.float64)
    np.testing.assert_allclose(state.trained.second.weight, expected, rtol=1e-5)
    assert not jnp.array_equal(state.trained.second.weight, state.model.second.weight)
    again, rows = ntt.train_steps(
        recipe.init(model, 6), stream(6), num_steps=6, test_set=examples(30, 9)
    )
    assert rows[-1]["test"] == ntt.evaluate(again.trained, examples(30, 9))
    np.testing.assert_allclose(again.trained.second.weight, expected, rtol=1e-5)


def test_the_average_of_a_sparse_model_has_its_mask_and_the_newest_statistics(getkey):
    class Net(eqx.Module):
        norm: eqx.nn.BatchNorm
        out: eqx.nn.Linear

        def __call__(self, x, state):
            h, state = self.norm(x, state)
            return self.out(h), state

    norm = eqx.nn.BatchNorm(6, "batch", momentum=0.9, mode="batch")
    net, held = eqx.nn.make_with_state(Net)(norm, eqx.nn.Linear(6, 3, key=getkey()))
    sparse = ntt.sparsify(ntt.warm_up(ntt.StatefulModel(net, held), examples(50)[0]))
    sparse = sparse.with_mask(ntt.make_mask(ntt.scores.Random(getkey())(sparse.model), 0.5))
    state = Recipe(ema=0.5, **SGD).init(sparse, 4)
    mean = lambda m: np.asarray(m.model.state.get(m.model.model.norm.batch_state_index)[0])
    for batch in stream(4):
        state, _ = step(state, batch)
    np.testing.assert_array_equal(mean(state.trained), mean(state.model))
    assert not np.allclose(mean(state.model), mean(sparse))
    mask, weight = sparse.mask.model.out.weight, state.trained.to_dense().model.out.weight
    assert not jnp.any(weight[~mask]) and jnp.all(weight[mask] != 0)
    hidden = state.trained.model.model.out.weight[~mask]  # so that a weight that grows starts at 0
    assert not jnp.any(hidden) and jnp.any(state.model.model.model.out.weight[~mask])


def test_a_recipe_survives_json_and_is_one_object_for_a_run():
    recipe = Recipe(schedule="steps", milestones=(0.3, 0.6), momentum=0.9, crop=4, **SGD)
    again = Recipe(**json.loads(json.dumps(dataclasses.asdict(recipe))))
    assert again == recipe and hash(again) == hash(recipe)
    assert again.transformation(7) is recipe.transformation(7)
    assert again.transformation(8) is not recipe.transformation(7)


def test_steps_are_whole_batches_of_each_pass():
    recipe = Recipe(epochs=2.5, batch_size=64)
    assert recipe.num_steps(1000) == round(2.5 * 15)
    assert Recipe(epochs=1e-9).num_steps(64) == 1
    with pytest.raises(ValueError, match="batch of 64 samples does not fit into 63"):
        recipe.num_steps(63)


@pytest.mark.parametrize("steps", [50.0, 2.5, -1, None])
def test_epochs_are_no_number_of_steps(steps):
    """They would end a schedule after so many steps."""
    recipe = Recipe(schedule="cosine")
    recipe.transformation(50)
    for use in (recipe.rate, recipe.transformation, lambda n: recipe.init(None, n)):
        with unchecked(), pytest.raises(ValueError, match="Recipe: num_steps must be an integer"):
            use(steps)


def test_batches_are_those_of_the_recipe():
    x = np.random.default_rng(0).integers(0, 256, (20, 1, 4, 4), np.uint8)
    split = ntt.data.Split(x, np.zeros(20, np.int32))
    recipe = Recipe(batch_size=6, crop=1, flip=True)
    found = next(recipe.batches(split, seed=3, mean=0.5, std=0.2))
    expected = next(ntt.data.batches(split, 6, seed=3, mean=0.5, std=0.2, crop=1, flip=True))
    np.testing.assert_array_equal(found.x, expected.x)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"optimizer": "rmsprop"}, "optimizer must be one of"),
        ({"schedule": "exponential"}, "schedule must be one of"),
        ({"epochs": 0}, "epochs must be above 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be finite"),
        ({"batch_size": 0}, "batch_size must be an integer"),
        ({"crop": -1}, "crop must be an integer"),
        ({"ema": 1.0}, r"ema must be in \[0, 1\)"),
        ({"label_smoothing": -0.1}, "label_smoothing must be in"),
        ({"warm_up": 1.0}, "warm_up must be in"),
        ({"weight_decay": -1.0}, "weight_decay must be finite and >= 0"),
        ({"momentum": 0.9}, "momentum=0.9 does nothing without optimizer='sgd'"),
        ({**SGD, "nesterov": True}, "nesterov=True does nothing without a momentum"),
        ({"milestones": (0.2,)}, "milestones=.* does nothing without schedule='steps'"),
        ({"step_factor": 0.2}, "step_factor=0.2 does nothing"),
        ({"final_share": 0.1, "schedule": "steps"}, "final_share=0.1 does nothing"),
        ({"decay": "decoupled"}, "decay='decoupled' does nothing without a weight_decay"),
        ({"schedule": "steps", "milestones": (0.6, 0.3)}, "milestones must rise"),
        ({"schedule": "steps", "milestones": (0.6, 1.0)}, "milestones must be in"),
        ({"schedule": "steps", "warm_up": 0.5}, "milestones must .* after the warm-up"),
    ],
)
def test_what_cannot_be_or_does_nothing_is_refused(fields, message):
    with unchecked(), pytest.raises(ValueError, match=f"Recipe: {message}"):
        Recipe(**fields)


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_shares_of_the_objective_and_the_average_are_checked(share):
    with unchecked(), pytest.raises(ValueError, match="CrossEntropy: label_smoothing"):
        ntt.CrossEntropy(share)
    with unchecked(), pytest.raises(ValueError, match="TrainConfig: ema"):
        ntt.TrainConfig(ema=share)
