"""What users hand over: which form is one batch, which is many, and where the labels are."""

import collections
import dataclasses

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.refusals import linear, unchecked
from helpers.torch_stand_in import DataLoader, Tensor, TensorDataset

import ntt_eqx as ntt
from ntt_eqx._batch import INPUTS, TARGETS, as_stream, is_batch, pair

X = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
Y = np.array([0, 1, 0, 1, 1, 0, 1, 0], np.int32)
SGD = optax.sgd(0.1)
Named = collections.namedtuple("Named", ["x", "y"])


@dataclasses.dataclass
class Fields:
    x: np.ndarray
    y: np.ndarray


@dataclasses.dataclass
class Loader:
    """A dataclass that yields batches is no batch."""

    batches: list

    def __iter__(self):
        return iter(self.batches)


LOADER = DataLoader(TensorDataset(Tensor(X), Tensor(Y)), batch_size=4, shuffle=True, drop_last=True)
ONE = {
    "tuple": (X, Y),
    "list": [X, Y],
    "jax": (jnp.asarray(X), jnp.asarray(Y)),
    "tensors": [Tensor(X), Tensor(Y)],
    "named tuple": Named(X, Y),
    "dataclass": Fields(X, Y),
    "dict": {"x": X, "y": Y},
    "hugging face": {"image": X, "label": Y},
    "hugging face, processed": {"pixel_values": X, "labels": Y},
    "of torch's names": {"input": X, "target": Y},
    "with another column": {"img": X, "label": Y, "index": np.arange(8)},
}
MANY = {
    "list": [(X[:4], Y[:4]), (X[4:], Y[4:])],
    "tuple": ((X[:4], Y[:4]), (X[4:], Y[4:])),
    "lists": [[X[:4], Y[:4]], [X[4:], Y[4:]]],
    "dicts": [{"image": X[:4], "label": Y[:4]}, {"image": X[4:], "label": Y[4:]}],
    "named tuples": [Named(X[:4], Y[:4]), Named(X[4:], Y[4:])],
    "dataclasses": [Fields(X[:4], Y[:4]), Fields(X[4:], Y[4:])],
    "loader": LOADER,
    "own loader": Loader([(X[:4], Y[:4]), (X[4:], Y[4:])]),
    "a batch alone": [(X, Y)],
}
STATE = ntt.ntt_init(linear(), ntt.NTTConfig(0.5, num_steps=2), SGD)


@pytest.fixture(autouse=True)
def as_users_run():
    with unchecked():
        yield


@pytest.mark.parametrize("form", [f"one {n}" for n in ONE] + [f"many {n}" for n in MANY])
def test_every_call_takes_every_form(form):
    count, name = form.split(" ", 1)
    data = (ONE if count == "one" else MANY)[name]
    expected = ntt.evaluate(linear(), (X, Y))
    assert ntt.evaluate(linear(), data) == pytest.approx(expected, rel=1e-6)
    rows = ntt.train(linear(), data, SGD, num_steps=2, test_set=data)[1]
    assert rows[0]["test"] == pytest.approx(expected, rel=1e-6)
    if name != "loader":  # it shuffles
        batches = [ONE["tuple"]] if count == "one" or name == "a batch alone" else MANY["list"]
        again = ntt.train(linear(), batches, SGD, num_steps=2, test_set=(X, Y))[1]
        assert rows[-1]["train"] == again[-1]["train"]
        rows = ntt.transfer(STATE, data, validation=data)[1]
        batches = [x for x, _ in batches]
        assert rows == ntt.transfer(STATE, batches, validation=batches)[1]


ARRAYS = {  # one batch where labels are read, where they are not
    "array": (X, True, True),
    "two arrays, list": ([X, Y], True, True),
    "two arrays, tuple": ((X, Y), True, True),
    "alike, list": ([X, X], True, False),
    "alike, tuple": ((X, X), True, False),
    "three, list": ([X, X, X], False, False),
    "three, tuple": ((X, X, Y), True, True),
    "one, list": ([X], False, False),
    "tokens and labels": ((np.ones((8, 3), np.int32), Y), True, True),
    "targets of other width": ([X, X[:, :2]], True, True),
    "mixed": ((X, ["a"]), True, True),
    "none": ([], False, False),
    "iterator": (iter([X]), False, False),
    "a key and no batch": ({}, True, True),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_the_rule_for_arrays(name):
    data, labelled, unlabelled = ARRAYS[name]
    assert is_batch(data) == labelled
    assert is_batch(data, labels=False) == unlabelled


def test_a_dict_has_one_name_for_its_inputs_and_one_for_its_labels():
    for one in INPUTS:
        for two in TARGETS:
            assert pair("call", {one: 1, two: 2, "index": 3}) == (1, 2)
    assert pair("call", {"x": 1, "image": 3, "y": 2, "label": 4}) == (1, 2)
    for batch, message in (
        ({"image": 1, "img": 2, "label": 3}, "only one of the keys.*this one has image, img"),
        ({"image": 1, "label": 3, "target": 3}, "only one of the keys y, .*has label, target"),
        ({"image": 1}, "one of the keys y, label, .*this one has image"),
        ({}, "one of the keys x, .*this one has none"),
    ):
        with pytest.raises(ValueError, match=f"^call: a batch that is a dict must have {message}"):
            pair("call", batch)


@pytest.mark.parametrize("data", [None, 3, "images", lambda: 1, object()])
@pytest.mark.parametrize("what", ["batches", "test_set", "data", "validation", "transfer"])
def test_what_is_no_data_is_refused(what, data):
    if data is None and what in ("test_set", "validation"):
        return
    call, begins = {
        "batches": (lambda: ntt.train(linear(), data, SGD, num_steps=1), "train: batches"),
        "test_set": (
            lambda: ntt.train(linear(), [(X, Y)], SGD, num_steps=1, test_set=data),
            "train: test_set",
        ),
        "data": (lambda: ntt.evaluate(linear(), data), "evaluate: data"),
        "validation": (
            lambda: ntt.transfer(STATE, [X], validation=data),
            "transfer: validation",
        ),
        "transfer": (lambda: ntt.transfer(STATE, data), "transfer: batches"),
    }[what]
    with pytest.raises(ValueError, match=f"^{begins} must be one batch, or something that yields"):
        call()


@pytest.mark.parametrize("what", ["test_set", "validation"])
def test_an_iterator_is_refused_where_every_row_needs_it(what):
    """The second row found nothing left in it."""
    with pytest.raises(ValueError, match=f"{what} is an iterator.*only once"):
        if what == "test_set":
            ntt.train(linear(), [(X, Y)], SGD, num_steps=2, test_set=iter([(X, Y)]))
        else:
            ntt.transfer(STATE, [X], validation=iter([X]))
    assert ntt.evaluate(linear(), iter([(X, Y)])) == ntt.evaluate(linear(), (X, Y))


def test_validation_counts_batches_by_their_size():
    """Batches of an odd size lose a sample, and a last one of one sample counts for nothing."""
    look = lambda data: ntt.transfer(STATE, [X], validation=data)[1][0]["validation"]["loss"]
    one, two = look(X[:4]), look(X[4:6])
    assert look([X[:4], X[4:7], X[7:]]) == pytest.approx((4 * one + 2 * two) / 6, rel=1e-6)
    with pytest.raises(ValueError, match="transfer: validation: there is no batch"):
        look([])


def test_own_objectives_still_see_the_form_that_they_are_given():
    own = lambda model, batch, key: jnp.mean((batch["a"] - 1) ** 2) + 0 * model.weight[0, 0]
    assert ntt.evaluate(linear(), [{"a": X}, {"a": X}], own) == ntt.evaluate(
        linear(), {"a": X}, own
    )
    arrays = lambda model, batch, key: jnp.mean(batch) + 0 * model.weight[0, 0]
    found = ntt.evaluate(linear(), [X], arrays)
    assert found == ntt.evaluate(linear(), X, arrays) == ntt.evaluate(linear(), iter([X]), arrays)


def test_a_module_is_a_batch_and_a_loader_is_none():
    class Held(eqx.Module):
        x: np.ndarray
        y: np.ndarray

    assert is_batch(Held(X, Y)) and not is_batch(Loader([])) and not is_batch(LOADER)
    assert as_stream("call", LOADER, again=True) is LOADER
