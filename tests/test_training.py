"""The supervised phase: what is learnt, what stays zero, what resumes, what is refused."""

import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ntt_eqx import DivergenceError, SparseModel, _training as training, make_mask, sparsify
from ntt_eqx._examples import softmax_cross_entropy
from ntt_eqx._scores import Random
from ntt_eqx._training import TrainConfig, evaluate, rescale_by_density, train, train_init


class Net(eqx.Module):
    """Two layers with dropout between them; the key is optional."""

    first: eqx.nn.Linear
    dropout: eqx.nn.Dropout
    second: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key)
        self.first = eqx.nn.Linear(6, 16, key=keys[0])
        self.dropout = eqx.nn.Dropout(0.5)
        self.second = eqx.nn.Linear(16, 3, key=keys[1])

    def __call__(self, x, *, key=None):
        return self.second(self.dropout(jax.nn.relu(self.first(x)), key=key))


rng = np.random.default_rng(0)
CENTRES = rng.normal(size=(3, 6)) * 2


def examples(count, seed=0):
    """Three noisy clusters, learnable in a few steps."""
    draw = np.random.default_rng(seed)
    y = draw.integers(0, 3, size=count).astype(np.int32)
    return (CENTRES[y] + draw.normal(size=(count, 6))).astype(np.float32), y


def stream(count, batch=16):
    for seed in range(count):
        yield examples(batch, seed)


@pytest.fixture
def sparse(getkey):
    model = Net(getkey())
    return sparsify(model).with_mask(make_mask(Random(getkey())(model), 0.4))


ADAM = optax.adam(1e-2)


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_learns_and_reports(kind, sparse):
    model = sparse if kind == "sparse" else sparse.model
    train_set, test_set = examples(90, 1000), examples(50, 1001)
    seen = []
    trained, history = train(
        model,
        stream(120),
        ADAM,
        num_steps=120,
        evaluate_every=50,
        train_set=train_set,
        test_set=test_set,
        on_log=lambda state, row: seen.append((int(state.step), row)),
    )
    assert [row["step"] for row in history] == [0, 50, 100, 120]
    assert [(row["step"], row) for row in history] == seen
    assert "batch" not in history[0]
    assert set(history[1]["batch"]) == set(history[1]["train"]) == {"loss", "accuracy"}
    assert history[-1]["test"] == evaluate(trained, test_set)
    assert history[-1]["test"]["accuracy"] > 0.85 > history[0]["test"]["accuracy"]
    assert all(isinstance(v, float) for v in history[-1]["train"].values())
    assert type(trained) is type(model)


def test_zeros_stay_exactly_zero_and_masks_stay(sparse):
    trained, _ = train(sparse, stream(30), ADAM, num_steps=30, l2=1e-2)
    assert eqx.tree_equal(trained.mask, sparse.mask)
    for layer in ("first", "second"):
        kept = np.asarray(getattr(sparse.mask, layer).weight)
        dense = np.asarray(getattr(trained.to_dense(), layer).weight)
        before = np.asarray(getattr(sparse.model, layer).weight)
        stored = np.asarray(getattr(trained.model, layer).weight)
        assert (dense[~kept] == 0).all()
        assert (dense[kept] != before[kept]).any()
        np.testing.assert_array_equal(stored[~kept], before[~kept])  # no gradient came


def test_a_broken_zero_is_found(sparse):
    pruned = training._pruned_places(sparse)
    with pytest.raises(RuntimeError, match="pruned weight is not zero"):
        training._check_zeros(sparsify(sparse.model), pruned)


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
        config = TrainConfig(l2=l2)
        state, metrics = eqx.filter_jit(training.train_step)(
            train_init(model, config, optax.sgd(rate)), (x, y)
        )
        np.testing.assert_allclose(metrics.loss, value, rtol=1e-12)
        np.testing.assert_allclose(metrics.cross_entropy, entropy, rtol=1e-12)
        assert float(metrics.accuracy) == pytest.approx((np.asarray(logits).argmax(1) == y).mean())
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
    plain, _ = train(model, [batch], optax.sgd(0.1), num_steps=1, l2=0.0)
    heavy, _ = train(model, [batch], optax.sgd(0.1), num_steps=1, l2=1e3)
    assert eqx.tree_equal(plain, heavy)


@pytest.mark.parametrize("dropout", [False, True])
def test_a_run_cut_in_two_gives_the_same_bits(dropout, sparse, getkey):
    config, key = TrainConfig(dropout=dropout), getkey()
    start = train_init(sparse, config, ADAM, key=key)
    whole, rows = training.train_steps(start, stream(20), num_steps=20, evaluate_every=5)
    batches = stream(20)
    half, first = training.train_steps(start, batches, num_steps=10, evaluate_every=5)
    both, second = training.train_steps(half, batches, num_steps=20, evaluate_every=5)
    assert eqx.tree_equal(whole, both)
    assert rows == first + second
    again, none = training.train_steps(whole, iter(()), num_steps=20)
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
    train(sparse, batches(), counting, num_steps=12, evaluate_every=4)
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
    train(sparse, stream(9), ADAM, num_steps=9, evaluate_every=3,
          on_log=lambda state, row: kept.append(state))  # fmt: skip
    assert [int(state.step) for state in kept] == [0, 3, 6, 9]
    assert evaluate(kept[1].model, examples(5))["loss"] > 0


def test_dropout_differs_by_key_and_step_and_is_off_otherwise(sparse, getkey):
    batch = examples(16)
    run = lambda key: train(sparse, [batch, batch], ADAM, num_steps=2, dropout=True, key=key,
                            evaluate_every=1)[1]  # fmt: skip
    one, two = getkey(), getkey()
    losses = [row["batch"]["loss"] for row in run(one)[1:]]
    assert run(one) == run(one)
    assert losses != [row["batch"]["loss"] for row in run(two)[1:]]
    frozen = optax.sgd(0.0)
    rows = train(sparse, [batch] * 3, frozen, num_steps=3, dropout=True, key=one,
                 evaluate_every=1)[1]  # fmt: skip
    assert len({row["batch"]["loss"] for row in rows[1:]}) == 3
    rows = train(sparse, [batch] * 2, frozen, num_steps=2, l2=0.0, evaluate_every=1)[1]
    assert rows[1]["batch"]["loss"] == rows[2]["batch"]["loss"]
    assert rows[1]["batch"]["loss"] == pytest.approx(evaluate(sparse, batch)["loss"], rel=1e-6)


@pytest.mark.parametrize("count", [1, 7, 20, 21])
def test_evaluation_counts_every_sample_once(count, sparse):
    x, y = examples(count, 5)
    logits = jax.vmap(eqx.nn.inference_mode(sparse.to_dense()))(jnp.asarray(x))
    expected = {
        "loss": float(softmax_cross_entropy(logits, jnp.asarray(y)).mean()),
        "accuracy": float((np.asarray(logits).argmax(1) == y).mean()),
    }
    assert evaluate(sparse, (x, y), batch_size=7) == pytest.approx(expected, rel=1e-5)
    assert evaluate(sparse, (jnp.asarray(x), jnp.asarray(y))) == pytest.approx(expected, rel=1e-5)


def test_evaluation_standardises_pixels(sparse):
    pixels = np.random.default_rng(3).integers(0, 256, size=(11, 6)).astype(np.uint8)
    y = np.arange(11) % 3
    mean, std = 0.3, 0.7
    floats = ((pixels / 255 - mean) / std).astype(np.float32)
    out = evaluate(sparse, (pixels, y), mean=mean, std=std, batch_size=4)
    assert out == pytest.approx(evaluate(sparse, (floats, y)), rel=1e-5)


def test_evaluation_takes_what_has_x_and_y(sparse):
    x, y = examples(5)
    data = type("Split", (), {"x": x, "y": y})()
    assert evaluate(sparse, data) == evaluate(sparse, (x, y))


def test_rescale_divides_by_the_root_of_each_density(sparse):
    rescaled = rescale_by_density(sparse)
    assert eqx.tree_equal(rescaled.mask, sparse.mask)
    for layer in ("first", "second"):
        kept = np.asarray(getattr(sparse.mask, layer).weight)
        before = np.asarray(getattr(sparse.to_dense(), layer).weight)
        after = np.asarray(getattr(rescaled.to_dense(), layer).weight)
        np.testing.assert_allclose(after, before / np.sqrt(kept.mean()), rtol=1e-6)
        np.testing.assert_array_equal(
            getattr(rescaled.model, layer).bias, getattr(sparse.model, layer).bias
        )


def test_rescale_leaves_an_empty_layer_alone(sparse):
    mask = eqx.tree_at(lambda m: m.first.weight, sparse.mask, jnp.zeros((16, 6), bool))
    rescaled = rescale_by_density(SparseModel(sparse.model, mask))
    np.testing.assert_array_equal(rescaled.model.first.weight, sparse.model.first.weight)


def test_divergence_names_the_first_bad_step(sparse):
    def batches():
        for i, (x, y) in enumerate(stream(20)):
            yield (np.full_like(x, np.inf) if i == 6 else x), y

    rows = []
    with pytest.raises(DivergenceError, match="step 6"):
        train(sparse, batches(), ADAM, num_steps=20, evaluate_every=5,
              on_log=lambda state, row: rows.append(row["step"]))  # fmt: skip
    assert rows == [0, 5]
    with pytest.raises(DivergenceError):
        train(sparse, stream(20), optax.sgd(1e30), num_steps=20)


X, Y = examples(4)
BAD_BATCHES = [
    (X, r"must? be|tuple \(x, y\)"),
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
    with pytest.raises(ValueError, match="num_steps must not be negative"):
        train(sparse, stream(3), ADAM, num_steps=-1)
    with pytest.raises(ValueError, match="evaluate_every must be at least 1"):
        train(sparse, stream(3), ADAM, num_steps=3, evaluate_every=0)
    with pytest.raises(ValueError, match="dropout needs a key"):
        train(sparse, stream(3), ADAM, num_steps=3, dropout=True)
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="l2 must be finite"):
            train(sparse, stream(3), ADAM, num_steps=3, l2=bad)
    broken = eqx.tree_at(lambda s: s.model.first.bias, sparse, jnp.full(16, jnp.nan))
    with pytest.raises(ValueError, match=r"model\.model\.first\.bias has NaN"):
        train(broken, stream(3), ADAM, num_steps=3)
    batchwise = eqx.nn.Lambda(lambda x: x[0])
    with pytest.raises(ValueError, match="must map one sample"):
        train((batchwise, jnp.ones(3))[0], stream(3), ADAM, num_steps=3)


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ((X, Y[:2]), {}, "one per sample"),
        ((X[:0], Y[:0]), {}, "at least one sample"),
        ((X, Y), {"mean": 0.1, "std": 1.0}, "float inputs take none"),
        (((X * 9).astype(np.uint8), Y), {}, "integer inputs need mean and std"),
        ((X, Y), {"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_bad_evaluations_are_refused(data, options, message, sparse):
    with pytest.raises(ValueError, match=message):
        evaluate(sparse, data, **options)


def test_bfloat16_models_train(getkey):
    model = jax.tree.map(
        lambda leaf: leaf.astype(jnp.bfloat16) if eqx.is_inexact_array(leaf) else leaf,
        Net(getkey()),
    )
    sparse = sparsify(model).with_mask(make_mask(Random(getkey())(model), 0.5))
    batches = [(jnp.asarray(x, jnp.bfloat16), y) for x, y in stream(5)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained, history = train(sparse, batches, ADAM, num_steps=5)
    assert trained.model.first.weight.dtype == jnp.bfloat16
    assert np.isfinite(history[-1]["batch"]["loss"])
