"""The supervised phase: what is learnt, what stays zero, what resumes, what is refused."""

import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.clusters import examples, network, stream

from ntt_eqx import (
    DivergenceError,
    SparseModel,
    TrainConfig,
    evaluate,
    make_mask,
    scores,
    sparsify,
    train,
    train_init,
    train_step,
    train_steps,
)

ADAM = optax.adam(1e-2)


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_learns_and_reports(kind, sparse):
    model = sparse if kind == "sparse" else sparse.model
    held_out, test_set = examples(90, 1000), examples(50, 1001)
    seen = []
    trained, history = train(
        model,
        stream(120),
        ADAM,
        num_steps=120,
        log_every=50,
        test_set=test_set,
        observe={"held_out": lambda state: evaluate(state.model, held_out)},
        on_log=lambda state, row: seen.append((int(state.step), row)),
    )
    assert [row["step"] for row in history] == [0, 50, 100, 120]
    assert [(row["step"], row) for row in history] == seen
    assert set(history[0]) == {"step", "held_out", "test"}
    assert set(history[1]["train"]) == {"loss", "objective", "accuracy"}
    assert set(history[1]["held_out"]) == {"loss", "accuracy"}
    assert history[-1]["test"] == evaluate(trained, test_set)
    assert history[-1]["test"]["accuracy"] > 0.85 > history[0]["test"]["accuracy"]
    assert all(isinstance(v, float) for v in history[-1]["train"].values())
    assert type(trained) is type(model)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_average_in_16_bits_follows_the_weights(dtype, getkey):
    """A thousandth of a difference is less than half a step between two such numbers."""
    start = jax.tree.map(
        lambda a: a.astype(dtype) if eqx.is_inexact_array(a) else a,
        eqx.nn.MLP(4, 2, 16, 1, key=getkey()),
    )
    batch = jax.random.normal(getkey(), (32, 4), dtype), jnp.arange(32) % 2
    state = train_init(start, TrainConfig(ema=0.99), optax.sgd(0.5))
    step, wanted = eqx.filter_jit(train_step), None
    arrays = lambda model: [
        np.asarray(a, np.float64) for a in jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))
    ]
    wanted = arrays(start)
    for _ in range(300):
        state, _ = step(state, batch)
        wanted = [0.99 * a + 0.01 * b for a, b in zip(wanted, arrays(state.model), strict=True)]
    for found, want in zip(arrays(state.trained), wanted, strict=True):
        np.testing.assert_allclose(found, want, rtol=2e-2, atol=2e-2)
    assert all(a.dtype == dtype for a in jax.tree.leaves(eqx.filter(state.trained, eqx.is_array)))


def test_zeros_stay_exactly_zero_and_masks_stay(sparse):
    trained, _ = train(sparse, stream(30), ADAM, num_steps=30, l2_weight=1e-2)
    assert eqx.tree_equal(trained.mask, sparse.mask)
    for layer in ("first", "second"):
        kept = np.asarray(getattr(sparse.mask, layer).weight)
        dense = np.asarray(getattr(trained.to_dense(), layer).weight)
        before = np.asarray(getattr(sparse.model, layer).weight)
        stored = np.asarray(getattr(trained.model, layer).weight)
        assert (dense[~kept] == 0).all()
        assert (dense[kept] != before[kept]).any()
        np.testing.assert_array_equal(stored[~kept], before[~kept])  # no gradient came


def ruthless():
    """Moves every weight, also those without a gradient, and by the norm of all it is shown."""

    def update(updates, state, params=None):
        norm = optax.tree.norm(params)
        return jax.tree.map(lambda p: norm * jnp.ones_like(p), params), state

    return optax.GradientTransformation(lambda params: (), update)


OPTIMISERS = {"adamw": optax.adamw(1e-2, weight_decay=0.5), "ruthless": ruthless()}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_no_optimiser_reaches_pruned_weights(name, sparse):
    """Neither are they moved, nor do their values under the mask count in what is moved."""
    optimizer = OPTIMISERS[name]
    trained, _ = train(sparse, stream(3), optimizer, num_steps=3)
    large = map_pruned(lambda w: 1e3 * jnp.ones_like(w), sparse)
    other, _ = train(large, stream(3), optimizer, num_steps=3)
    pruned = lambda model: [w[~m] for w, m in zip(weights(model.model), masks(model), strict=True)]
    for before, after in ((sparse, trained), (large, other)):
        for old, new in zip(pruned(before), pruned(after), strict=True):
            np.testing.assert_array_equal(old, new)
    assert eqx.tree_equal(trained.to_dense(), other.to_dense())
    for w, old, m in zip(weights(trained.to_dense()), weights(sparse.model), masks(sparse),
                         strict=True):  # fmt: skip
        assert (w[~m] == 0).all() and (w[m] != old[m]).all()


def weights(net):
    return [np.asarray(net.first.weight), np.asarray(net.second.weight)]


def masks(model):
    return [np.asarray(m) for m in jax.tree.leaves(model.mask)]


def map_pruned(function, sparse):
    change = lambda m, w: w if m is None else jnp.where(m, w, function(w))
    leaf = lambda node: node is None
    return SparseModel(jax.tree.map(change, sparse.mask, sparse.model, is_leaf=leaf), sparse.mask)


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_first_step_is_the_definition(kind, sparse):
    """Loss, L2 and gradient against formulas written out in numpy-like float64."""
    with jax.enable_x64(True):
        to64 = lambda leaf: leaf.astype(jnp.float64) if eqx.is_inexact_array(leaf) else leaf
        model = jax.tree.map(to64, sparse if kind == "sparse" else sparse.model)
        net, l2, rate = (model.model if kind == "sparse" else model), 0.03, 0.1
        keep = [jnp.ones((16, 6), bool), jnp.ones((3, 16), bool)]
        if kind == "sparse":
            keep = jax.tree.leaves(model.mask)
        x, y = examples(8)
        x = x.astype(np.float64)

        def loss(weights, biases):
            w1, w2 = (jnp.where(m, w, 0.0) for m, w in zip(keep, weights, strict=True))
            hidden = jnp.maximum(x @ w1.T + biases[0][None], 0.0)
            logits = hidden @ w2.T + biases[1][None]
            odds = jnp.exp(logits)
            chance = odds / odds.sum(1, keepdims=True)
            entropy = -jnp.log(chance[jnp.arange(8), y]).mean()
            return entropy + l2 * ((w1**2).sum() + (w2**2).sum()), (entropy, logits)

        weights = [net.first.weight, net.second.weight]
        biases = [net.first.bias, net.second.bias]
        (value, (entropy, logits)), slopes = jax.value_and_grad(loss, (0, 1), has_aux=True)(
            weights, biases
        )
        config = TrainConfig(l2)
        state, metrics = eqx.filter_jit(train_step)(
            train_init(model, config, optax.sgd(rate)), (x, y)
        )
        np.testing.assert_allclose(metrics.loss, value, rtol=1e-12)
        np.testing.assert_allclose(metrics.objective, entropy, rtol=1e-12)
        hits = np.asarray(logits).argmax(1) == y
        assert float(metrics.metrics["accuracy"]) == pytest.approx(hits.mean())
        after = state.model.model if kind == "sparse" else state.model
        np.testing.assert_allclose(
            after.first.weight, weights[0] - rate * slopes[0][0], rtol=1e-12, atol=1e-15
        )
        np.testing.assert_allclose(
            after.second.weight, weights[1] - rate * slopes[0][1], rtol=1e-12, atol=1e-15
        )
        np.testing.assert_allclose(after.first.bias, biases[0] - rate * slopes[1][0], rtol=1e-12)
        assert int(state.step) == 1


def test_l2_spares_biases_and_models_without_layers():
    class Scale(eqx.Module):
        scale: jax.Array

        def __call__(self, x):
            return self.scale * x

    model = Scale(jnp.ones(6))
    batch = (examples(4)[0], np.array([0, 1, 2, 5]))
    plain, _ = train(model, [batch], optax.sgd(0.1), num_steps=1, l2_weight=0.0)
    heavy, _ = train(model, [batch], optax.sgd(0.1), num_steps=1, l2_weight=1e3)
    assert eqx.tree_equal(plain, heavy)


def test_an_error_in_the_search_for_weights_is_no_missing_penalty():
    """It came out as a loss without L2."""

    class Odd(eqx.Module):
        layer: eqx.nn.Linear

        def __call__(self, x):
            return self.layer(x)

    model = Odd(eqx.nn.Linear(6, 3, key=jax.random.key(0)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "ntt_eqx._prunable._along", lambda *_: (_ for _ in ()).throw(ValueError("odd"))
        )
        with pytest.raises(ValueError, match="odd"):
            train(model, stream(1), optax.sgd(0.1), num_steps=1, l2_weight=1.0)


@pytest.mark.parametrize("dropout", [False, True])
def test_a_run_cut_in_two_gives_the_same_bits(dropout, sparse, getkey):
    start = train_init(sparse, TrainConfig(), ADAM, key=getkey() if dropout else None)
    whole, rows = train_steps(start, stream(20), num_steps=20, log_every=5)
    batches = stream(20)
    half, first = train_steps(start, batches, num_steps=10, log_every=5)
    both, second = train_steps(half, batches, num_steps=20, log_every=5)
    assert eqx.tree_equal(whole, both)
    assert rows == first + second
    again, none = train_steps(whole, iter(()), num_steps=20)
    assert eqx.tree_equal(again, whole)
    assert none == []


def test_takes_one_batch_per_step_and_compiles_once(sparse):
    taken, traces = [], []

    def batches():
        for i, batch in enumerate(stream(99)):
            taken.append(i)
            yield batch

    adam = optax.adam(1e-3)

    def update(*args):
        traces.append(1)
        return adam.update(*args)

    counting = optax.GradientTransformation(adam.init, update)
    train(sparse, batches(), counting, num_steps=12, log_every=4)
    train(sparse, batches(), counting, num_steps=12)
    assert taken == list(range(12)) * 2
    assert len(traces) == 1


def test_leaves_its_input_alone(sparse):
    before = jax.tree.map(lambda leaf: np.array(leaf) if eqx.is_array(leaf) else leaf, sparse)
    train(sparse, stream(3), ADAM, num_steps=3)
    assert eqx.tree_equal(jax.device_get(eqx.filter(sparse, eqx.is_array)),
                          eqx.filter(before, eqx.is_array))  # fmt: skip


def test_a_logged_state_may_be_kept(sparse):
    kept = []
    train(sparse, stream(9), ADAM, num_steps=9, log_every=3,
          on_log=lambda state, row: kept.append(state))  # fmt: skip
    assert [int(state.step) for state in kept] == [3, 6, 9]
    assert evaluate(kept[0].model, examples(5))["loss"] > 0


def test_dropout_differs_by_key_and_step_and_is_off_otherwise(sparse, getkey):
    batch = examples(16)
    run = lambda key: train(sparse, [batch, batch], ADAM, num_steps=2, key=key, log_every=1)[1]
    one, two = getkey(), getkey()
    assert run(one) == run(one) != run(two)
    frozen = optax.sgd(0.0)
    rows = train(sparse, [batch], frozen, num_steps=3, key=one, log_every=1)[1]
    assert len({row["train"]["loss"] for row in rows}) == 3
    rows = train(sparse, [batch], frozen, num_steps=2, l2_weight=0.0, log_every=1)[1]
    assert rows[0]["train"] == rows[1]["train"]
    assert rows[0]["train"]["loss"] == pytest.approx(evaluate(sparse, batch)["loss"], rel=1e-6)


def test_divergence_names_the_first_bad_step(sparse):
    def batches():
        for i, (x, y) in enumerate(stream(20)):
            yield (np.full_like(x, np.inf) if i == 6 else x), y

    rows = []
    with pytest.raises(DivergenceError, match="train: the loss became nan at step 7") as caught:
        train(sparse, batches(), ADAM, num_steps=20, log_every=5,
              on_log=lambda state, row: rows.append(row["step"]))  # fmt: skip
    assert rows == [5]
    assert (caught.value.phase, caught.value.step) == ("train", 7)
    with pytest.raises(DivergenceError) as caught:
        train(sparse, stream(20), optax.sgd(1e30), num_steps=20)
    assert caught.value.step == 2


def test_divergence_has_the_value_of_the_loss(sparse):
    """Infinite is another finding than NaN; `value` was NaN always."""
    growing = lambda model, batch, key: jnp.mean(jax.vmap(model)(batch[0])) * batch[1]
    batches = [(X, np.float32(1.0)), (X, np.float32(np.inf))]
    with pytest.raises(DivergenceError, match="became -?inf at step 2") as caught:
        train(sparse, batches, ADAM, num_steps=2, objective=growing)
    assert abs(caught.value.value) == np.inf


X, Y = examples(4)
BAD_BATCHES = [
    (X, r"tuple \(x, y\)"),
    ((X, Y[:3]), r"4 inputs need integer labels of shape \(4,\), got int32 of shape \(3,\)"),
    ((X, Y.astype(np.float32)), "need integer labels"),
    ((X, Y + 3), r"labels must lie in \[0, 3\)"),
    ((X, Y - 3), r"labels must lie in \[0, 3\)"),
    ((X * np.nan, Y), "NaN or infinite"),
    (((X * 9).astype(np.uint8), Y), "standardise it first"),
    ((X[:0], Y[:0]), "at least one sample"),
]


@pytest.mark.parametrize(("batch", "message"), BAD_BATCHES)
def test_bad_batches_are_refused(batch, message, sparse):
    with pytest.raises(ValueError, match=message):
        train(sparse, iter([batch]), ADAM, num_steps=1)  # an iterator: nothing looks ahead


def test_bad_arguments_are_refused(sparse):
    with pytest.raises(ValueError, match="ran out after step 3 of 5"):
        train(sparse, stream(3), ADAM, num_steps=5)
    with pytest.raises(ValueError, match="num_steps must be an integer of at least 0"):
        train(sparse, stream(3), ADAM, num_steps=-1)
    with pytest.raises(ValueError, match="log_every must be an integer of at least 1"):
        train(sparse, stream(3), ADAM, num_steps=3, log_every=0)
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="l2_weight must be finite"):
            train(sparse, stream(3), ADAM, num_steps=3, l2_weight=bad)
    broken = eqx.tree_at(lambda s: s.model.first.bias, sparse, jnp.full(16, jnp.nan))
    with pytest.raises(ValueError, match=r"model\.model\.first\.bias has NaN"):
        train(broken, stream(3), ADAM, num_steps=3)
    batchwise = eqx.nn.Lambda(lambda x: x[0])
    with pytest.raises(ValueError, match="must map one sample"):
        train((batchwise, jnp.ones(3))[0], stream(3), ADAM, num_steps=3)


def test_bfloat16_models_train(getkey):
    model = jax.tree.map(
        lambda leaf: leaf.astype(jnp.bfloat16) if eqx.is_inexact_array(leaf) else leaf,
        network(getkey()),
    )
    sparse = sparsify(model).with_mask(make_mask(scores.Random(getkey())(model), 0.5))
    batches = [(jnp.asarray(x, jnp.bfloat16), y) for x, y in stream(5)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained, history = train(sparse, batches, ADAM, num_steps=5)
    assert trained.model.first.weight.dtype == jnp.bfloat16
    assert np.isfinite(history[-1]["train"]["loss"])


def test_what_a_model_refuses_at_run_time_is_said(getkey):
    """By `eqx.error_if`, whose message `eqx.filter_jit` shows; a run has steps in plain `jit`."""

    class Refuses(eqx.Module):
        layer: eqx.nn.Linear

        def __call__(self, x):
            return self.layer(eqx.error_if(x, x[0] > 2, "the first feature is too large"))

    y = jnp.array([0, 1, 0, 1])
    batches = [(jnp.zeros((4, 3)), y)] * 2 + [(jnp.full((4, 3), 3.0), y)] * 2
    model = Refuses(eqx.nn.Linear(3, 2, key=getkey()))
    with pytest.raises(RuntimeError, match="^the first feature is too large"):
        train(model, batches, optax.sgd(0.1), num_steps=4)
