"""A loss that is not finite: what is blamed, what optimisers may skip, and no NaN by design."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.models import Dropping
from helpers.students import batches, start, step

import ntt_eqx as ntt
from ntt_eqx import _fit
from ntt_eqx._diagnosis import weight_norms

X = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
Y = np.array([0, 1, 2, 0, 1, 2, 0, 1], np.int32)
SGD = optax.sgd(0.1)


class Normalised(eqx.Module):
    """Two layers, the first with its rows divided by their norms; `(norm^2 + eps)^(1/2)`."""

    first: eqx.nn.Linear
    second: eqx.nn.Linear
    eps: float

    def __init__(self, eps=0.0):
        one, two = jax.random.split(jax.random.key(0))
        self.first = eqx.nn.Linear(6, 5, key=one)
        self.second = eqx.nn.Linear(5, 3, key=two)
        self.eps = eps

    def __call__(self, x):
        weight = self.first.weight
        square = jnp.sum(jnp.square(weight), axis=1, keepdims=True)
        return self.second(jnp.tanh(weight / jnp.sqrt(square + self.eps) @ x))


def network():
    return Dropping((6, 5, 3), jax.random.key(0))


def halved():
    half = lambda leaf: leaf.astype(jnp.float16) if eqx.is_inexact_array(leaf) else leaf
    return jax.tree.map(half, network())


def without_a_row(model):
    sparse = ntt.sparsify(model)
    weight = sparse.mask.first.weight.at[2].set(False)
    return sparse.with_mask(eqx.tree_at(lambda m: m.first.weight, sparse.mask, weight))


def learn(*given, model=None, optimizer=SGD, steps=4, **options):
    model = network() if model is None else model
    return ntt.train(model, list(given), optimizer, num_steps=steps, **options)


def transfer(*given, model=None, optimizer=SGD, mask=None, steps=4, every=None):
    config = ntt.NTTConfig(0.5, num_steps=steps, mask_every=every)
    state = ntt.ntt_init(network() if model is None else model, config, optimizer, mask=mask)
    return ntt.transfer(state, list(given))


def from_step(number, rate):
    """An optimiser whose rate is another from this step on."""
    return optax.sgd(lambda done: jnp.where(done < number - 1, 0.1, rate))


def bad_log(model, batch, key):
    """A loss that is NaN at any weights, though outputs are finite."""
    return jnp.log(-1.0 - jnp.square(jax.vmap(model)(batch[0])[:, 0]))


EMPTY_ROW = "first.weight keeps no weight in 1 of its 5 rows: a weight normalisation"
HALVES = "float16 weights: numbers below 6e-8 are 0 there, Adam's eps of 1e-8"
RATE = "Try a smaller learning rate"
# name -> (what runs, the step, what is said, whether the learning rate is blamed)
FAULTS = {
    "a label": (lambda: learn((X, Y), (X, Y + 1)), 2, r"step 2 cannot be used: labels .*1 to 3"),
    "label -1": (lambda: learn((X, Y), (X, Y - 1)), 2, r"step 2 cannot be used: labels .*-1 to 1"),
    "nan": (
        lambda: learn((X, Y), (X, Y), (np.where(X > 1, np.nan, X), Y)),
        3,
        "The batch of step 3 has NaN or infinity in x in 4 of its 8 samples",
    ),
    "infinity in a target": (
        lambda: learn((X, X[:, :3]), (X, X[:, :3] + np.inf), objective=ntt.SquaredError()),
        2,
        "batch of step 2 has NaN or infinity in y in 8 of its 8",
    ),
    "a target of another scale": (
        lambda: learn((X, X[:, :3]), (X, X[:, :3] * 1e30), objective=ntt.SquaredError()),
        2,
        r"batch of step 2 has entries up to 2\.\de\+30 in y: standardise it",
    ),
    "weight normalisation": (
        lambda: learn((X, Y), model=without_a_row(Normalised())),
        1,
        f"the model's outputs are not finite: no learning rate mends this. {EMPTY_ROW}",
    ),
    "own loss": (
        lambda: learn((X, Y), objective=bad_log),
        1,
        "the loss is not finite, though the model's outputs are: .*jax_debug_nans",
    ),
    "an update": (
        lambda: learn((X, Y), optimizer=from_step(3, math.nan), steps=6),
        4,
        "The update of step 3 made first.weight, second.weight, one of first.bias, second.bias NaN "
        "or infinite, though the loss of that step was finite",
    ),
    "an update in float16": (
        lambda: learn(
            (X.astype(np.float16), Y), model=halved(), optimizer=from_step(3, math.nan), steps=6
        ),
        4,
        f"The update of step 3 made first.weight, .*{HALVES}",
    ),
    "transfer: nan": (
        lambda: transfer(X, X, X * np.nan),
        3,
        "The batch of step 3 has NaN or infinity in x in 8 of its 8 samples",
    ),
    "transfer: nan before a refresh": (
        lambda: transfer(X, X * np.nan, steps=8, every=2),
        2,
        "The batch of step 2 has NaN or infinity in x in 8 of its 8 samples",
    ),
    "transfer: an update before a refresh": (
        lambda: transfer(X, optimizer=from_step(3, math.nan), steps=9, every=4),
        4,
        "The update of step 3 made first.weight",
    ),
    "transfer: weight normalisation": (
        lambda: transfer(X, model=Normalised(), mask=without_a_row(Normalised()).mask),
        1,
        f"the model's outputs are not finite: no learning rate mends this. {EMPTY_ROW}",
    ),
    "transfer: an update": (
        lambda: transfer(X, optimizer=from_step(2, math.nan)),
        3,
        "The update of step 2 made first.weight, second.weight, one of",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_wrong_is_named(name):
    """All of these said to try a smaller learning rate."""
    run, at, message = FAULTS[name]
    with pytest.raises(ntt.DivergenceError, match=f"(?s){message}") as caught:
        run()
    assert caught.value.step == at and caught.value.reason in str(caught.value)
    assert RATE not in str(caught.value)


@pytest.mark.parametrize("rate", [1e3, 1e8, 1e30])
@pytest.mark.parametrize("run", [learn, transfer])
def test_steps_that_are_too_long_are_blamed_on_the_learning_rate(run, rate):
    """A refresh finds no order in infinite weights, which is no fault of its scores."""
    data = (X, X[:, :3]) if run is learn else X
    options = {"objective": ntt.SquaredError()} if run is learn else {"every": 2}
    with pytest.raises(ntt.DivergenceError, match=RATE) as caught:
        run(data, optimizer=optax.sgd(rate), steps=300, **options)
    assert caught.value.reason is None


FIRST = {
    "adam in float16": (
        lambda: learn((X.astype(np.float16), Y), model=halved(), optimizer=optax.adam(1e-3)),
        f"train: .*though the loss and its gradient were finite.*{HALVES}.*larger eps",
    ),
    "a gradient": (
        lambda: learn((X, Y), objective=lambda m, b, k: jnp.sqrt(0 * jax.vmap(m)(b[0])[:, 0])),
        "train: .*made first.weight NaN.* was finite: the gradient of the loss by .*is not finite",
    ),
    "a rate": (
        lambda: transfer(X, optimizer=optax.sgd(math.nan)),
        "transfer: .*its gradient were finite; the optimizer's learning rate",
    ),
}


@pytest.mark.parametrize("name", FIRST)
def test_a_first_update_is_explained_before_the_second(name):
    run, message = FIRST[name]
    with pytest.raises(ValueError, match=f"(?s)^{message}") as caught:
        run()
    assert type(caught.value) is ValueError


def test_batches_are_held_only_until_their_losses_are_looked_at(monkeypatch):
    """Large ones are looked at early, all but the newest."""
    monkeypatch.setattr(_fit, "_MOST_HELD", 3 * X.nbytes)
    taken = []

    def given():
        for number in range(1, 100):
            taken.append(number)
            yield (X * np.nan if number == 5 else X), Y

    with pytest.raises(ntt.DivergenceError, match="batch of step 5 has NaN") as caught:
        ntt.train(network(), given(), SGD, num_steps=99, log_every=None)
    assert caught.value.step == 5 and len(taken) < 12


def test_the_norms_are_those_that_the_model_sees():
    sparse = without_a_row(Normalised())
    found = weight_norms(sparse)
    first, second = (
        np.asarray(layer.weight) for layer in (sparse.model.first, sparse.model.second)
    )
    biases = [np.asarray(layer.bias) for layer in (sparse.model.first, sparse.model.second)]
    rest = sum(float((b**2).sum()) for b in biases)
    kept = float((first**2).sum() - (first[2] ** 2).sum())
    np.testing.assert_allclose(found[:2], [kept, (second**2).sum()], rtol=1e-6)
    assert found.shape == (3,) and float(found[2]) == pytest.approx(rest, rel=1e-5)
    np.testing.assert_allclose(weight_norms(sparse.model)[0], (first**2).sum(), rtol=1e-6)


SKIPPING = {
    "apply_if_finite": lambda count: optax.apply_if_finite(SGD, count),
    "within a chain": lambda count: optax.chain(optax.apply_if_finite(SGD, count)),
    "multi steps": lambda count: optax.MultiSteps(
        SGD, 1, should_skip_update_fn=optax.skip_not_finite
    ).gradient_transformation(),
}


@pytest.mark.parametrize("name", SKIPPING)
@pytest.mark.parametrize("run", [learn, transfer])
def test_an_optimiser_may_skip_what_is_not_finite(run, name):
    optimizer, lost = SKIPPING[name](3), X * np.nan
    give = (lambda *xs: xs) if run is transfer else (lambda *xs: [(x, Y) for x in xs])
    found, rows = run(*give(X, lost, lost, X), optimizer=optimizer, steps=4)
    expected, same = run(*give(X, X), optimizer=optimizer, steps=2)
    model = (lambda state: state.student) if run is transfer else (lambda model: model)
    assert eqx.tree_equal(model(found), model(expected))
    assert rows[-1]["train"]["loss"] == same[-1]["train"]["loss"]  # the mean of the finite ones


def test_a_row_of_skipped_steps_alone_has_no_mean():
    optimizer = optax.apply_if_finite(SGD, 3)
    rows = learn((X, Y), (X * np.nan, Y), optimizer=optimizer, log_every=1)[1]
    assert [math.isnan(row["train"]["loss"]) for row in rows] == [False, True, False, True]


@pytest.mark.parametrize("steps", [5, 9])
def test_an_optimiser_that_gives_up_ends_the_run(steps):
    """After two skipped steps it lets the third through, in the last step, too."""
    data = [(X, Y), (X, Y), *[(X * np.nan, Y)] * 7]
    with pytest.raises(ntt.DivergenceError, match="did not skip all such steps.*batch of step 3"):
        learn(*data, optimizer=optax.apply_if_finite(SGD, 2), steps=steps)


def test_no_metric_is_nan_by_design(getkey):
    """With `jax_debug_nans` the first healthy step raised: its learning rate was NaN."""
    with jax.debug_nans(True):
        state, metrics = step(start(getkey), next(batches()))
        assert metrics.learning_rate is None and metrics.loss > 0
        _, rows = ntt.transfer(state, batches(), validation=next(batches()), num_steps=4)
        values = [v for part in ("train", "validation") for v in rows[-1][part].values()]
        assert np.isfinite(values).all()
        begun = ntt.train_init(state.student, ntt.TrainConfig(), SGD)
        _, metrics = eqx.filter_jit(ntt.train_step)(begun, (X, Y))
        assert metrics.loss > 0
        _, rows = ntt.train(state.student, [(X, Y)], SGD, num_steps=2, test_set=(X, Y))
        assert rows[-1]["test"]["loss"] > 0


@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", "i4", "u4", "i8"])
def test_labels_out_of_range_make_a_traced_loss_nan(dtype):
    """-1 was the last class; in 64 bits 2**32 was the first."""
    take, model = eqx.filter_jit(ntt.train_step), network()
    expected = ntt.evaluate(model, (X, Y))["loss"]
    with jax.enable_x64(dtype == "i8"):
        state = ntt.train_init(model, ntt.TrainConfig(), SGD)
        good = float(take(state, (X, Y.astype(dtype)))[1].loss)
        assert good == pytest.approx(expected, rel=1e-4)
        bad = [3, np.iinfo(dtype).max] + ([-1, -3] if dtype[0] == "i" else [])
        for label in [*bad, 2**32] if dtype == "i8" else bad:
            y = Y.astype(dtype)
            y[3] = label
            assert jnp.isnan(take(state, (X, y))[1].loss), label
