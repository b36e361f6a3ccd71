"""Bad input to the library gets one documented error that says what to do, before any compute.

One table, `name -> (call, error, message)`, of what cuts across rooms; the tests of each room have
the cases of their own. Runs without the tests' type checker, as users do.
"""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest

import ntt_eqx as ntt
from ntt_eqx import scores

SGD = optax.sgd(0.1)
X = np.linspace(-1.0, 1.0, 12, dtype=np.float32).reshape(4, 3)
Y = np.array([0, 1, 1, 0], np.int32)
CONFIG = ntt.NTTConfig(0.5, num_steps=2)


def linear(inputs=3, outputs=2, **options):
    return eqx.nn.Linear(inputs, outputs, key=jax.random.key(0), **options)


class Wrapped(eqx.Module):
    """A linear layer that is called in an unusual way."""

    layer: eqx.nn.Linear = eqx.field(default_factory=linear)


class Batched(Wrapped):
    def __call__(self, x):
        return jax.vmap(self.layer)(x)


class NeedsKey(Wrapped):
    def __call__(self, x, key):
        return self.layer(x + jax.random.normal(key, x.shape))


class NeedsState(Wrapped):
    def __call__(self, x, state):
        return self.layer(x), state


class ReturnsState(Wrapped):
    def __call__(self, x):
        return self.layer(x), {"count": x}


class Grid(Wrapped):
    def __call__(self, x):
        return jnp.stack([self.layer(x), self.layer(x)])


def broken(value):
    return eqx.tree_at(lambda m: m.bias, linear(), jnp.asarray([0.0, value]))


def start(teacher=None, optimizer=SGD, **options):
    return ntt.ntt_init(linear() if teacher is None else teacher, CONFIG, optimizer, **options)


def run(x, teacher=None, optimizer=SGD, **options):
    return ntt.transfer(start(teacher, optimizer), iter([x]), num_steps=1, **options)


def learn(batch, model=None, optimizer=SGD, **options):
    return ntt.train(linear() if model is None else model, iter([batch]), optimizer, num_steps=1,
                     **options)  # fmt: skip


def test_with(data, model=None, **options):
    return ntt.evaluate(linear() if model is None else model, data, **options)


test_with.__test__ = False


def mask(model=None):
    return ntt.sparsify(linear() if model is None else model).mask


def hyper(rate):
    return optax.inject_hyperparams(optax.sgd)(learning_rate=rate)


ONE_SAMPLE = "must map one sample|fails on one sample"
ASKS_FOR_ONE = r"fails on one sample.*called as model\(x\), for a sample without a batch axis"
HOLDS_THEM = "needs a key or a state goes into a module that holds them"

CASES = {
    # batches and the model do not fit
    "transfer: features": (lambda: run(X[:, :2]), ASKS_FOR_ONE),
    "transfer: rank": (lambda: run(X[:, :, None]), ASKS_FOR_ONE),
    "transfer: one sample": (lambda: run(X[:1]), "even number of samples, got 1"),
    "transfer: no axis": (lambda: run(X[0, 0]), r"needs an array of inputs \[batch, ...\]"),
    "transfer: a list": (lambda: run([[1.0, 2.0]]), "needs an array of inputs.*got list"),
    "transfer: text": (lambda: run("images"), "needs an array of inputs.*got str"),
    "transfer: objects": (lambda: run(np.array([None] * 4)), "array of numbers, got one of object"),
    "transfer: complex": (lambda: run(X.astype(complex)), "must be floats, got complex"),
    "transfer: pixels": (lambda: run(X.astype(np.uint8)), "uint8; standardise it first"),
    "transfer: nan": (lambda: run(X * np.nan), "transfer: x has NaN or infinite"),
    "transfer: inf": (lambda: run(np.full_like(X, np.inf)), "transfer: x has NaN or infinite"),
    "transfer: labels first": (lambda: run((Y, X)), ASKS_FOR_ONE),
    "transfer: odd validation": (lambda: run(X, validation=X[:3]), "validation: .*got 3"),
    "transfer: nan validation": (lambda: run(X, validation=X * np.nan), "validation: x has NaN"),
    "transfer: other validation": (lambda: run(X, validation=X[:, :2]), "validation: the model"),
    "transfer: no batches": (
        lambda: ntt.transfer(start(), iter(()), num_steps=3),
        "transfer: the batches ran out after step 0 of 3",
    ),
    "transfer: too few batches": (
        lambda: ntt.transfer(start(), [X], num_steps=3),
        "transfer: the batches ran out after step 1 of 3",
    ),
    "transfer: negative steps": (
        lambda: ntt.transfer(start(), iter([X]), num_steps=-1),
        "num_steps must be at least 0, got -1",
    ),
    "transfer: steps of text": (
        lambda: ntt.transfer(start(), iter([X]), num_steps="3"),
        "num_steps must be at least 0, got '3'",
    ),
    "transfer: log_every 0": (lambda: run(X, log_every=0), "log_every must be at least 1, got 0"),
    "transfer: batches": (lambda: run(X, Batched()), ASKS_FOR_ONE),
    "transfer: key": (lambda: run(X, NeedsKey()), HOLDS_THEM),
    "transfer: state": (lambda: run(X, NeedsState()), HOLDS_THEM),
    "transfer: returns state": (lambda: run(X, ReturnsState()), "module that returns the outputs"),
    "loss: outputs": (
        lambda: ntt.ntt_loss(ntt.sparsify(linear(3, 5)), linear(), jnp.asarray(X), CONFIG),
        r"the student's outputs have the shape \(5,\), the teacher's \(2,\)",
    ),
    "loss: features": (
        lambda: ntt.ntt_loss(ntt.sparsify(linear()), linear(), jnp.asarray(X[:, :2]), CONFIG),
        ASKS_FOR_ONE,
    ),
    "loss: sketch of too many": (
        lambda: ntt.ntt_loss(
            ntt.sparsify(linear()),
            linear(),
            jnp.asarray(X),
            ntt.NTTConfig(0.5, outputs="sketch", sketch_size=3),
        ),
        "needs 1 <= R <= K, got R = 3, K = 2",
    ),
    # the kernel
    "ntk: features": (lambda: ntt.ntk(linear(), jnp.asarray(X[:, :2])), ASKS_FOR_ONE),
    "ntk: features, oracle": (
        lambda: ntt.ntk(linear(), jnp.asarray(X[:, :2]), implementation="jacobian"),
        ASKS_FOR_ONE,
    ),
    "ntk: no axis": (lambda: ntt.ntk(linear(), jnp.ones(())), "ntk: x1: .*got a scalar float32"),
    "ntk: a list": (lambda: ntt.ntk(linear(), [[1.0, 2.0, 3.0]]), "ntk: x1: .*got list"),
    "ntk: second a list": (lambda: ntt.ntk(linear(), jnp.asarray(X), [1]), "ntk: x2: .*got list"),
    "ntk: batches": (lambda: ntt.ntk(Batched(), jnp.asarray(X)), ASKS_FOR_ONE),
    "ntk: key": (lambda: ntt.ntk(NeedsKey(), jnp.asarray(X)), HOLDS_THEM),
    "ntk: state": (lambda: ntt.ntk(NeedsState(), jnp.asarray(X)), HOLDS_THEM),
    "ntk: state, oracle": (
        lambda: ntt.ntk(ReturnsState(), jnp.asarray(X), implementation="ntk_vector_products"),
        "module that returns the outputs alone",
    ),
    "ntk: budget of text": (
        lambda: ntt.ntk(linear(), jnp.asarray(X), max_bytes="1G"),
        "max_bytes must be positive, got 1G",
    ),
    # weights and optimisers
    "init: nan": (lambda: start(broken(np.nan)), r"ntt_init: model\.bias has NaN or infinite"),
    "init: inf": (lambda: start(broken(np.inf)), r"ntt_init: model\.bias has NaN or infinite"),
    "init: no weights": (lambda: start(eqx.nn.Lambda(jnp.tanh)), "no prunable weight in Lambda"),
    "init: no model": (lambda: start(3), "no prunable weight in int; pass `where=`"),
    "init: features": (
        lambda: ntt.ntt_init(
            linear(), ntt.NTTConfig(0.5, initial_mask="logit_snip"), SGD, x=X[:, :2]
        ),
        "LogitSnip: the model fails on one sample",
    ),
    "init: nan inputs": (
        lambda: ntt.ntt_init(
            linear(), ntt.NTTConfig(0.5, initial_mask="logit_snip"), SGD, x=X * np.nan
        ),
        "LogitSnip: x has NaN or infinite",
    ),
    "init: a rate for an optimiser": (
        lambda: ntt.ntt_init(linear(), CONFIG, 0.1),
        "must be an optax transformation, such as optax.adam.1e-3., got float",
    ),
    "transfer: nan rate": (
        lambda: run(X, optimizer=optax.adam(math.nan)),
        "transfer: the optimizer's first step made model.weight NaN or infinite",
    ),
    "transfer: infinite rate": (
        lambda: run(X, optimizer=optax.sgd(math.inf)),
        "transfer: the optimizer's first step made model.weight NaN or infinite",
    ),
    "train: nan rate": (
        lambda: learn((X, Y), optimizer=hyper(math.nan)),
        "train: the optimizer's first step made weight NaN or infinite.*learning rate",
    ),
    "train: nan schedule": (
        lambda: learn((X, Y), optimizer=optax.adam(lambda step: math.inf)),
        "train: the optimizer's first step made weight NaN",
    ),
    "train: no optimiser": (
        lambda: learn((X, Y), optimizer=None),
        "must be an optax transformation.*got NoneType",
    ),
    "train: nan weights": (lambda: learn((X, Y), broken(np.nan)), r"model\.bias has NaN"),
    # masks
    "mask: floats": (
        lambda: start(mask=jax.tree.map(lambda m: m.astype(jnp.float32), mask())),
        r"mask\.weight must be a boolean array",
    ),
    "mask: integers": (
        lambda: ntt.SparseModel(linear(), jax.tree.map(lambda m: m.astype(jnp.int32), mask())),
        r"mask\.weight must be a boolean array",
    ),
    "mask: another layer's": (lambda: start(mask=mask(linear(4, 2))), "structure of Linear"),
    "mask: another model's": (
        lambda: start(mask=mask(eqx.nn.MLP(3, 2, 2, 1, key=jax.random.key(0)))),
        "does not have the structure of Linear",
    ),
    "mask: of the bias, too long": (
        lambda: ntt.SparseModel(
            linear(use_bias=True), eqx.tree_at(lambda m: m.bias, mask(), jnp.ones(3, bool),
                                               is_leaf=lambda m: m is None)  # fmt: skip
        ),
        r"mask\.bias has shape \(3,\) but the weight has shape \(2,\)",
    ),
    "reinitialise: another model": (
        lambda: ntt.reinitialise(
            ntt.sparsify(linear()), jax.random.key(0), lambda key: eqx.nn.Linear(4, 2, key=key)
        ),
        "the mask does not have the structure of Linear",
    ),
    # scores and densities
    "make_mask: numbers": (lambda: ntt.make_mask({"w": 1.0}, 0.5), "got float"),
    "make_mask: text": (lambda: ntt.make_mask({"w": "abc"}, 0.5), "got str"),
    "make_mask: complex": (lambda: ntt.make_mask({"w": jnp.ones(3, complex)}, 0.5), "got complex"),
    "make_mask: density of text": (
        lambda: ntt.make_mask({"w": jnp.ones(3)}, "0.5"),
        r"density must be a number in \(0, 1\], got '0.5'",
    ),
    "make_mask: an array of densities": (
        lambda: ntt.make_mask({"w": jnp.ones(3)}, np.array([0.5, 0.1])),
        r"density must be a number in \(0, 1\]",
    ),
    "make_mask: other layers": (
        lambda: ntt.make_mask({"w": jnp.ones(3)}, {"w": 0.5}),
        r"missing \[\"\['w'\]\"\], unknown \['w'\]",
    ),
    "prune: density": (
        lambda: ntt.prune(linear(), scores.Magnitude(), 1.5),
        r"prune: density must be a number in \(0, 1\], got 1.5",
    ),
    "prune: no labels": (lambda: ntt.prune(linear(), scores.Snip(), 0.5, X), r"a tuple \(x, y\)"),
    "score: features": (lambda: scores.LogitSnip()(linear(), X[:, :2]), ASKS_FOR_ONE),
    "score: batches": (lambda: scores.LogitSnip()(Batched(), X), ASKS_FOR_ONE),
    "score: key": (lambda: scores.PathExclusion()(NeedsKey(), X), HOLDS_THEM),
    "score: labels": (lambda: scores.GraSP()(linear(), (X, Y + 1)), r"must lie in \[0, 2\)"),
    "score: not logits": (lambda: scores.Snip()(Grid(), (X, Y)), "to a vector of logits"),
    # settings
    "config: density of text": (lambda: ntt.NTTConfig("0.5"), r"density must be a number in"),
    "config: density true": (lambda: ntt.NTTConfig(True), "density must be a number in"),
    "config: no density": (lambda: ntt.NTTConfig(None), "density must be a number in"),
    "config: weight of text": (
        lambda: ntt.NTTConfig(0.5, kernel_weight="1"),
        "kernel_weight must be finite and >= 0, got '1'",
    ),
    "config: weight true": (lambda: ntt.NTTConfig(0.5, l2_weight=True), "l2_weight must be fin"),
    "config: fraction of a step": (
        lambda: ntt.NTTConfig(0.5, mask_every=2.5),
        "mask_every must be an integer of at least 1 or None, got 2.5",
    ),
    "config: no sketch": (
        lambda: ntt.NTTConfig(0.5, sketch_size=None),
        "sketch_size must be an integer of at least 1, got None",
    ),
    "config: sketch by an oracle": (
        lambda: ntt.NTTConfig(0.5, outputs="sketch", implementation="jacobian"),
        "a sketch needs implementation='factors'",
    ),
    "config: unknown choice": (lambda: ntt.NTTConfig(0.5, kernel=None), "kernel must be one of"),
    "train config: text": (
        lambda: ntt.TrainConfig(l2_weight="1e-8"),
        "l2_weight must be finite and >= 0",
    ),
    # labelled data
    "train: features": (lambda: learn((X[:, :2], Y)), ASKS_FOR_ONE),
    "train: key": (lambda: learn((X, Y), NeedsKey()), HOLDS_THEM),
    "train: state": (lambda: learn((X, Y), NeedsState()), HOLDS_THEM),
    "train: returns state": (lambda: learn((X, Y), ReturnsState()), "returns the outputs alone"),
    "train: batches": (lambda: learn((X, Y), Batched()), ASKS_FOR_ONE),
    "train: labels of rank 2": (lambda: learn((X, Y[:, None])), "need integer labels of shape"),
    "train: one-hot labels": (lambda: learn((X, np.eye(2)[Y])), "need integer labels of shape"),
    "train: objective": (
        lambda: learn((X, Y), objective="cross-entropy"),
        "TrainConfig: the objective must be a function .model, batch, key. -> loss",
    ),
    "train: three parts": (lambda: learn([X, Y, Y]), r"a tuple \(x, y\)"),
    "train: words": (lambda: learn((X, ["a"])), r"batch\[1\]\[0\] must be an array, got str"),
    "train: steps": (
        lambda: ntt.train(linear(), iter([(X, Y)]), SGD, num_steps=1.5),
        "num_steps must be at least 0, got 1.5",
    ),
    "evaluate: label": (lambda: test_with((X, Y + 1)), r"evaluate: labels must lie in \[0, 2\)"),
    "evaluate: negative label": (lambda: test_with((X, -Y)), r"labels must lie in .*got -1 to 0"),
    "evaluate: nan": (lambda: test_with((X * np.nan, Y)), "evaluate: x has NaN or infinite"),
    "evaluate: features": (lambda: test_with((X[:, :2], Y)), ASKS_FOR_ONE),
    "evaluate: not logits": (lambda: test_with((X, Y), Grid()), "to a vector of logits"),
    "evaluate: key": (lambda: test_with((X, Y), NeedsKey()), HOLDS_THEM),
    "evaluate: no data": (lambda: test_with(None), "evaluate: all arrays of a batch must have"),
    "evaluate: no batches": (lambda: test_with(iter([])), "evaluate: there is no batch"),
    "evaluate: lists": (lambda: test_with(([[1.0]], [0])), "all arrays of a batch must have"),
    "evaluate: three parts": (lambda: test_with((X, Y, Y)), r"evaluate: needs .* a tuple \(x, y\)"),
    "evaluate: no axis": (lambda: test_with((X[0, 0], Y)), "all arrays of a batch must have"),
    "evaluate: pixels": (
        lambda: test_with((np.zeros((4, 3), np.uint8), Y)),
        r"got uint8; standardise it first, .*ntt\.data\.as_batch",
    ),
    "evaluate: batch size": (lambda: test_with((X, Y), batch_size=2.0), "batch_size must be at"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def unchecked(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name):
    call, message = CASES[name]
    with pytest.raises(ValueError, match=f"(?s){message}") as caught:
        call()
    assert type(caught.value) is ValueError
    assert len(str(caught.value)) < 1000


def test_float64_inputs_are_not_computed_with_in_silence(x64):
    """Under the default promotion the whole model would turn to float64."""
    x = jnp.asarray(X, jnp.float64)
    model = jax.tree.map(lambda w: w.astype(jnp.float32), linear())
    message = "the inputs are float64, but the model's weights are float32; cast one of them"
    with jax.numpy_dtype_promotion("standard"):
        for call in (
            lambda: ntt.ntk(model, x),
            lambda: ntt.ntk(model, x, implementation="jacobian"),
            lambda: run(x, model),
            lambda: learn((x, Y), model),
            lambda: test_with((x, Y), model),
            lambda: scores.LogitSnip()(model, x),
        ):
            with pytest.raises(ValueError, match=message):
                call()


def test_what_cannot_be_judged_beforehand_passes():
    """Traced values, and optimisers that want weights of a certain structure."""
    shapes = eqx.filter_eval_shape(lambda model: start(model).student, linear())
    assert shapes.model.weight.shape == (2, 3)
    labels = {"weight": "decayed", "bias": "plain"}
    by_name = optax.multi_transform(
        {"decayed": optax.adamw(0.1), "plain": SGD},
        lambda model: eqx.tree_at(
            lambda m: (m.model.weight, m.model.bias), model, tuple(labels.values())
        ),
    )
    assert int(ntt.ntt_init(linear(), CONFIG, by_name).step) == 0


def test_an_error_inside_a_model_is_kept_as_the_cause():
    class Failing(Wrapped):
        def __call__(self, x):
            raise RuntimeError("the reason")

    with pytest.raises(
        ValueError, match=r"fails on one sample.*RuntimeError: the reason"
    ) as caught:
        ntt.ntk(Failing(), jnp.asarray(X))
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_the_table_covers_every_entry():
    rooms = {name.split(":")[0] for name in CASES}
    assert rooms >= {"transfer", "loss", "ntk", "init", "train", "evaluate", "make_mask", "score"}
    assert len(CASES) >= 90
