"""What `train`, `evaluate` and their settings refuse."""

import math

import equinox as eqx
import numpy as np
import optax
from helpers.arbitrary import ANYTHING, arrays, examples, explore, labels, refused
from helpers.refusals import (
    ASKS_FOR_ONE,
    HOLDS_THEM,
    Batched,
    Grid,
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


def learn(batch, model=None, optimizer=SGD, **options):
    return ntt.train(linear() if model is None else model, iter([batch]), optimizer, num_steps=1,
                     **options)  # fmt: skip


def look_at(data, model=None, **options):
    return ntt.evaluate(linear() if model is None else model, data, **options)


def begun(**options):
    return ntt.train_init(linear(), ntt.TrainConfig(**options), SGD)


def take(batch, **options):
    return eqx.filter_jit(ntt.train_step)(begun(**options), batch)


def hyper(rate):
    return optax.inject_hyperparams(optax.sgd)(learning_rate=rate)


test_refusals = refusals(
    {
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
        "train config: text": (
            lambda: ntt.TrainConfig(l2_weight="1e-8"),
            "l2_weight must be finite and >= 0",
        ),
        "train: features": (lambda: learn((X[:, :2], Y)), ASKS_FOR_ONE),
        "train: key": (lambda: learn((X, Y), NeedsKey()), HOLDS_THEM),
        "train: state": (lambda: learn((X, Y), NeedsState()), HOLDS_THEM),
        "train: returns state": (
            lambda: learn((X, Y), ReturnsState()),
            "paired with its state by",
        ),
        "train: batches": (lambda: learn((X, Y), Batched()), ASKS_FOR_ONE),
        "train: labels of rank 2": (lambda: learn((X, Y[:, None])), "need integer labels of shape"),
        "train: one-hot labels": (lambda: learn((X, np.eye(2)[Y])), "need integer labels of shape"),
        "train: objective": (
            lambda: learn((X, Y), objective="cross-entropy"),
            "TrainConfig: the objective must be a function .model, batch, key. -> loss",
        ),
        "train: three parts": (lambda: learn([X, Y, Y]), r"a tuple \(x, y\)"),
        "train: words": (lambda: learn((X, ["a"])), r"batch\[1\]\[0\] must be an array, got str"),
        "train: an optimiser not called": (
            lambda: learn((X, Y), optimizer=optax.adam),
            "must be an optax transformation.*got function",
        ),
        "train: another state": (
            lambda: ntt.train_steps(linear(), [(X, Y)], num_steps=1),
            "train: the state must be a TrainState, as train_init makes one, got Linear",
        ),
        "train: a second batch of other labels": (
            lambda: ntt.train(linear(), [(X, Y), (X, Y[:3])], SGD, num_steps=2),
            r"train: 4 inputs need integer labels of shape \(4,\), got int32 of shape \(3,\)",
        ),
        "train: a second batch of pixels": (
            lambda: ntt.train(linear(), [(X, Y), (X.astype(np.uint8), Y)], SGD, num_steps=2),
            "train: x must be floats, got uint8",
        ),
        "train: wide labels": (
            lambda: learn((X, Y.astype(np.int64) + 2**32)),
            r"train: batch\[1\] holds int64 numbers from 4294967296 .* would wrap to int32",
        ),
        "train: wider labels": (
            lambda: learn((X, Y.astype(np.uint64) + 2**40)),
            r"train: batch\[1\] holds uint64 numbers .* would wrap",
        ),
        "evaluate: wide labels": (
            lambda: look_at((X, Y.astype(np.int64) + 2**32)),
            "evaluate: .*would wrap to int32",
        ),
        "train: an objective not called": (
            lambda: learn((X, Y), objective=ntt.CrossEntropy),
            r"TrainConfig: the objective must be .* a Module such as CrossEntropy\(\), got <class",
        ),
        "train: targets of a list": (
            lambda: learn((X, X.tolist()), objective=ntt.SquaredError()),
            r"train: y must be an array, got list",
        ),
        "train: too many steps": (
            lambda: ntt.train(linear(), iter([(X, Y)]), SGD, num_steps=10**20),
            r"train: num_steps must be at most 2\*\*31 - 1, for it counts in int32, got 1000",
        ),
        "evaluate: too large a batch": (
            lambda: look_at((X, Y), batch_size=10**20),
            "evaluate: batch_size must be at most",
        ),
        "init: no config": (
            lambda: ntt.train_init(linear(), 1e-8, SGD),
            r"train_init: the second argument must be a TrainConfig, got float; write",
        ),
        "fit: a state without a step": (
            lambda: ntt.fit(lambda state, batch: (state, {}), 0.0, [X], num_steps=1),
            "fit: the state has no `step`; give `start`",
        ),
        "fit: no batches": (
            lambda: ntt.fit(lambda state, batch: (state, {}), 0.0, 3, num_steps=1, start=0),
            "fit: batches must be something that yields batches.*got int",
        ),
        "step: short": (
            lambda: take((X, Y[:3])),
            r"train_step: 4 inputs need integer labels of shape \(4,\), got int32 of shape \(3,\)",
        ),
        "step: a column": (lambda: take((X, Y[:, None])), r"train_step: .*\(4, 1\).*\[:, 0\]"),
        "step: one-hot": (
            lambda: take((X, np.eye(2, dtype=np.float32)[Y])),
            r"train_step: .*float32 of shape \(4, 2\). Of one-hot labels take argmax\(axis=1\)",
        ),
        "step: none": (lambda: take((X, None)), "train_step: .*need integer labels.*got NoneType"),
        "step: words": (
            lambda: take((X, ["a", "b", "a", "b"])),
            r"train_step: batch\[1\]\[0\] must be an array, got str",
        ),
        "step: a list": (
            lambda: take((X, [0, 1, 1, 0])),
            "train_step: .*need integer labels.*got list. np.asarray",
        ),
        "step: floats": (
            lambda: take((X, 0.9 * Y.astype(np.float32))),
            "train_step: .*got float32 of shape",
        ),
        "step: nan": (
            lambda: take((X, np.full(4, np.nan, np.float32))),
            "train_step: .*integer labels.*got float32 of shape",
        ),
        "step: booleans": (lambda: take((X, Y > 0)), "train_step: .*got bool of shape"),
        "step: pixels": (lambda: take((X.astype(np.uint8), Y)), "train_step: x must be floats"),
        "step: features": (lambda: take((X[:, :2], Y)), f"train_step: .*{ASKS_FOR_ONE}"),
        "step: inputs alone": (lambda: take(X), "train_step: needs labelled examples"),
        "step: nothing": (lambda: take(None), "train_step: needs labelled .*got NoneType"),
        "step: other keys": (
            lambda: take({"a": X, "b": Y}),
            "train_step: a batch that is a dict must have one of the keys x, image.*has a, b",
        ),
        "step: another state": (
            lambda: ntt.train_step(linear(), (X, Y)),
            "train_step: the state must be a TrainState",
        ),
        "step: targets": (
            lambda: take((X, Y), objective=ntt.SquaredError()),
            r"train_step: the model's outputs .*\(4, 2\).*got int32 of shape",
        ),
        "step, not compiled: label": (
            lambda: ntt.train_step(begun(), (X, Y - 1)),
            r"train_step: labels must lie in \[0, 2\), got -1 to 0",
        ),
        "step, not compiled: wide label": (
            lambda: ntt.train_step(begun(), (X, Y.astype(np.int64) + 2**40)),
            "train_step: .*would wrap to int32",
        ),
        "train: steps": (
            lambda: ntt.train(linear(), iter([(X, Y)]), SGD, num_steps=1.5),
            "num_steps must be an integer of at least 0, got 1.5",
        ),
        "evaluate: label": (lambda: look_at((X, Y + 1)), r"evaluate: labels must lie in \[0, 2\)"),
        "evaluate: negative label": (lambda: look_at((X, -Y)), r"labels must lie in .*got -1 to 0"),
        "evaluate: nan": (lambda: look_at((X * np.nan, Y)), "evaluate: x has NaN or infinite"),
        "evaluate: features": (lambda: look_at((X[:, :2], Y)), ASKS_FOR_ONE),
        "evaluate: not logits": (lambda: look_at((X, Y), Grid()), "to a vector of logits"),
        "evaluate: key": (lambda: look_at((X, Y), NeedsKey()), HOLDS_THEM),
        "evaluate: no data": (
            lambda: look_at(None),
            "evaluate: data must be one batch.*got NoneType",
        ),
        "evaluate: no batches": (lambda: look_at(iter([])), "evaluate: there is no batch"),
        "evaluate: lists": (
            lambda: look_at(([[1.0]], [0])),
            "needs labelled examples.*got list of 1",
        ),
        "evaluate: three parts": (
            lambda: look_at((X, Y, Y)),
            r"evaluate: needs .* a tuple \(x, y\)",
        ),
        "evaluate: no axis": (lambda: look_at((X[0, 0], Y)), "all arrays of a batch must have"),
        "evaluate: pixels": (
            lambda: look_at((np.zeros((4, 3), np.uint8), Y)),
            r"got uint8; standardise it first, .*ntt\.data\.as_batch",
        ),
        "evaluate: batch size": (
            lambda: look_at((X, Y), batch_size=2.0),
            "batch_size must be an integer",
        ),
    }
)


@examples(50, 1000)
def test_arbitrary_training_batches(examples):
    model = linear()

    def holds(x, y):
        run = lambda: ntt.train(model, iter([(x, y)]), SGD, num_steps=1)
        done = refused(run, ValueError, ntt.DivergenceError, begins="train")
        assert done is None or np.isfinite(done[1][0]["train"]["loss"])

    x = st.one_of(arrays([(2, 3), (4, 3)], ["f4"]), ANYTHING)
    explore(holds, examples, x=x, y=st.one_of(labels(2, 4), ANYTHING))


@examples(50, 1000)
def test_arbitrary_test_sets(examples):
    model = linear()

    def holds(x, y):
        run = lambda: ntt.evaluate(model, (x, y))
        found = refused(run, ValueError, begins="evaluate")
        assert found is None or 0.0 <= found["accuracy"] <= 1.0

    x = st.one_of(arrays([(2, 3)], ["f4", "u1"]), ANYTHING)
    explore(holds, examples, x=x, y=st.one_of(labels(2), ANYTHING))
