"""What `transfer`, `ntt_loss` and `ntt_init` refuse."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from helpers.arbitrary import ANYTHING, arrays, examples, explore, refused
from helpers.refusals import (
    ASKS_FOR_ONE,
    HOLDS_THEM,
    Batched,
    NeedsKey,
    NeedsState,
    ReturnsState,
    X,
    Y,
    broken,
    linear,
    refusals,
)
from hypothesis import strategies as st

import ntt_eqx as ntt

SGD = optax.sgd(0.1)
CONFIG = ntt.NTTConfig(0.5, num_steps=2)


def start(teacher=None, optimizer=SGD, **options):
    return ntt.ntt_init(linear() if teacher is None else teacher, CONFIG, optimizer, **options)


def run(x, teacher=None, optimizer=SGD, **options):
    return ntt.transfer(start(teacher, optimizer), iter([x]), num_steps=1, **options)


def take(x):
    return eqx.filter_jit(ntt.ntt_step)(start(), x)


def mask(model=None):
    return ntt.sparsify(linear() if model is None else model).mask


test_refusals = refusals(
    {
        "transfer: features": (lambda: run(X[:, :2]), ASKS_FOR_ONE),
        "transfer: rank": (lambda: run(X[:, :, None]), ASKS_FOR_ONE),
        "transfer: one sample": (lambda: run(X[:1]), "even number of samples, got 1"),
        "transfer: no axis": (lambda: run(X[0, 0]), r"needs an array of inputs \[batch, ...\]"),
        "transfer: a list": (lambda: run([[1.0, 2.0]]), "needs an array of inputs.*got list"),
        "transfer: text": (lambda: run("images"), "needs an array of inputs.*got str"),
        "transfer: objects": (
            lambda: run(np.array([None] * 4)),
            "array of numbers, got one of object",
        ),
        "transfer: complex": (lambda: run(X.astype(complex)), "must be floats, got complex"),
        "transfer: pixels": (lambda: run(X.astype(np.uint8)), "uint8; standardise it first"),
        "transfer: nan": (lambda: run(X * np.nan), "transfer: x has NaN or infinite"),
        "transfer: inf": (lambda: run(np.full_like(X, np.inf)), "transfer: x has NaN or infinite"),
        "transfer: labels first": (lambda: run((Y, X)), ASKS_FOR_ONE),
        "transfer: odd validation": (lambda: run(X, validation=X[:3]), "validation: .*got 3"),
        "transfer: nan validation": (
            lambda: run(X, validation=X * np.nan),
            "validation: x has NaN",
        ),
        "transfer: other validation": (
            lambda: run(X, validation=X[:, :2]),
            "validation: the model",
        ),
        "transfer: no batches": (
            lambda: ntt.transfer(start(), iter(()), num_steps=3),
            "transfer: the batches ran out after step 0 of 3",
        ),
        "transfer: too few batches": (
            lambda: ntt.transfer(start(), iter([X]), num_steps=3),
            "transfer: the batches ran out after step 1 of 3",
        ),
        "transfer: negative steps": (
            lambda: ntt.transfer(start(), iter([X]), num_steps=-1),
            "num_steps must be an integer of at least 0, got -1",
        ),
        "transfer: steps of text": (
            lambda: ntt.transfer(start(), iter([X]), num_steps="3"),
            "num_steps must be an integer of at least 0, got '3'",
        ),
        "transfer: too many steps": (
            lambda: ntt.transfer(start(), iter([X]), num_steps=10**20),
            r"transfer: num_steps must be at most 2\*\*31 - 1",
        ),
        "transfer: another state": (
            lambda: ntt.transfer(linear(), iter([X]), num_steps=1),
            "transfer: the state must be an NTTState, as ntt_init makes one, got Linear",
        ),
        "transfer: a second batch of pixels": (
            lambda: ntt.transfer(start(), [(X, Y), (X.astype(np.uint8), Y)]),
            "transfer: x must be floats, got uint8",
        ),
        "transfer: a second batch of other features": (
            lambda: ntt.transfer(start(), [(X, Y), (X[:, :2], Y)]),
            f"transfer: .*{ASKS_FOR_ONE}",
        ),
        "transfer: wide tokens": (
            lambda: run(np.full((4, 3), 2**40)),
            "transfer: x holds int64 numbers .*would wrap to int32",
        ),
        "step: pixels": (lambda: take(X.astype(np.uint8)), "ntt_step: x must be floats.*uint8"),
        "step: complex": (lambda: take(X * 1j), "ntt_step: x must be floats, got complex"),
        "step: none": (lambda: take(None), "ntt_step: needs an array of inputs.*got NoneType"),
        "step: a pair": (lambda: take((X, Y)), "ntt_step: needs an array of inputs.*got tuple"),
        "step: features": (lambda: take(X[:, :2]), ASKS_FOR_ONE),
        "step: another state": (
            lambda: ntt.ntt_step(linear(), X),
            "ntt_step: the state must be an NTTState",
        ),
        "evaluate: pixels": (
            lambda: ntt.ntt_evaluate(start(), X.astype(np.uint8)),
            "ntt_evaluate: x must be floats",
        ),
        "evaluate: another state": (
            lambda: ntt.ntt_evaluate(linear(), X),
            "ntt_evaluate: the state must be",
        ),
        "loss: pixels": (
            lambda: ntt.ntt_loss(ntt.sparsify(linear()), linear(), X.astype(np.uint8), CONFIG),
            "ntt_loss: x must be floats, got uint8; standardise it first",
        ),
        "loss: none": (
            lambda: ntt.ntt_loss(ntt.sparsify(linear()), linear(), None, CONFIG),
            "ntt_loss: needs an array of inputs.*got NoneType",
        ),
        "init: a density": (
            lambda: ntt.ntt_init(linear(), 0.1, SGD),
            r"ntt_init: the second argument must be an NTTConfig.*got float; write NTTConfig\(",
        ),
        "config: too many steps": (
            lambda: ntt.NTTConfig(0.5, num_steps=10**20),
            r"NTTConfig: num_steps must be at most 2\*\*31 - 1",
        ),
        "config: refreshes too far apart": (
            lambda: ntt.NTTConfig(0.5, mask_every=2**31),
            "NTTConfig: mask_every must be at most",
        ),
        "method: too many steps": (
            lambda: ntt.NeuralTangentTransfer(sparsity=0.5, optimizer=SGD, num_steps=10**20),
            "NeuralTangentTransfer: num_steps must be at most",
        ),
        "refresh: too far apart": (
            lambda: ntt.MagnitudeRefresh(every=10**20),
            "MagnitudeRefresh: every must be at most",
        ),
        "refresh: until": (
            lambda: ntt.MagnitudeRefresh(until=10**20),
            "MagnitudeRefresh: until must be at most",
        ),
        "transfer: log_every 0": (
            lambda: run(X, log_every=0),
            "log_every must be an integer of at least 1 or None",
        ),
        "transfer: batches": (lambda: run(X, Batched()), ASKS_FOR_ONE),
        "transfer: key": (lambda: run(X, NeedsKey()), HOLDS_THEM),
        "transfer: state": (lambda: run(X, NeedsState()), HOLDS_THEM),
        "transfer: returns state": (
            lambda: run(X, ReturnsState()),
            "paired with its state by",
        ),
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
            r"size \(sketch_size of NTTConfig\) is 3, but the model has 2 outputs",
        ),
        "init: nan": (lambda: start(broken(np.nan)), r"ntt_init: model\.bias has NaN or infinite"),
        "init: inf": (lambda: start(broken(np.inf)), r"ntt_init: model\.bias has NaN or infinite"),
        "init: no weights": (
            lambda: start(eqx.nn.Lambda(jnp.tanh)),
            "no prunable weight in Lambda",
        ),
        "init: no model": (
            lambda: start(3),
            "no prunable weight in int; it has no parameters at all",
        ),
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
        "mask: floats": (
            lambda: start(mask=jax.tree.map(lambda m: m.astype(jnp.float32), mask())),
            r"mask\.weight must be a boolean array",
        ),
        "mask: another layer's": (lambda: start(mask=mask(linear(4, 2))), "structure of Linear"),
        "mask: another model's": (
            lambda: start(mask=mask(eqx.nn.MLP(3, 2, 2, 1, key=jax.random.key(0)))),
            "does not have the structure of Linear",
        ),
    }
)


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


@examples(50, 1000)
def test_arbitrary_batches(examples):
    state = start()

    def holds(x, labelled):
        batch = (x, None) if labelled else x
        run = lambda: ntt.transfer(state, iter([batch]), num_steps=1)
        done = refused(run, ValueError, ntt.DivergenceError, begins="transfer")
        if done is not None:
            assert int(done[0].step) == 1 and np.isfinite(done[1][0]["train"]["loss"])

    x = st.one_of(arrays([(2, 3), (4, 3)], ["f4"]), ANYTHING)
    explore(holds, examples, x=x, labelled=st.booleans())
