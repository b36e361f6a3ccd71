"""Batches: determinism, resumption, coverage of the data, standardisation, refusals."""

import itertools
import json
import subprocess
import sys

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.refusals import unchecked
from hypothesis import given, settings, strategies as st

from ntt_eqx.data import Batch, BatchIterator, Split, as_batch, batches, load_dataset


def numbered(size, shape=(1, 2, 2)):
    """Samples whose pixels and label are all the number of the sample."""
    number = np.arange(size)
    x = np.broadcast_to(number.reshape(-1, *[1] * len(shape)), (size, *shape))
    return Split(np.ascontiguousarray(x, np.uint8), number.astype(np.int32))


def take(iterator, count):
    return [np.asarray(batch.y) for batch in itertools.islice(iterator, count)]


def test_a_batch_has_static_shape_and_types():
    iterator = batches(numbered(10), 4, seed=0)
    assert isinstance(iterator, grain.DatasetIterator) and isinstance(iterator, BatchIterator)
    for batch in itertools.islice(iterator, 7):
        assert isinstance(batch, Batch)
        assert isinstance(batch.x, jax.Array) and isinstance(batch.y, jax.Array)
        assert batch.x.shape == (4, 1, 2, 2) and batch.x.dtype == jnp.float32
        assert batch.y.shape == (4,) and batch.y.dtype == jnp.int32
        np.testing.assert_allclose(batch.x[:, 0, 0, 0] * 255, batch.y, atol=1e-5)


def test_types_stay_with_x64(x64):
    batch = next(batches(numbered(10), 4, seed=0))
    assert batch.x.dtype == jnp.float32 and batch.y.dtype == jnp.int32


@pytest.mark.parametrize("threads", [1, 3])
def test_the_same_seed_gives_the_same_batches_with_any_number_of_threads(threads):
    plain = take(batches(numbered(50), 8, seed=3), 40)
    threaded = take(batches(numbered(50), 8, seed=3, num_threads=threads), 40)
    np.testing.assert_array_equal(plain, threaded)


def test_seeds_and_epochs_have_orders_of_their_own():
    orders = [
        tuple(np.concatenate(take(batches(numbered(60), 60, seed=seed), 5))[60 * e : 60 * e + 60])
        for seed in range(5)
        for e in range(5)
    ]
    assert len(set(orders)) == 25
    assert all(sorted(order) == list(range(60)) for order in orders)


def test_every_sample_comes_once_per_epoch_also_across_batches():
    labels = np.concatenate(take(batches(numbered(10), 4, seed=1), 25)).reshape(10, 10)
    np.testing.assert_array_equal(np.sort(labels, axis=1), np.tile(np.arange(10), (10, 1)))


def test_a_number_of_epochs_ends_without_the_unfilled_batch():
    labels = np.concatenate(list(take(batches(numbered(10), 4, seed=1, num_epochs=3), 99)))
    assert len(labels) == 28
    assert np.bincount(labels, minlength=10).min() >= 2
    assert len(take(batches(numbered(8), 4, seed=1, num_epochs=2), 99)) == 4


def test_without_shuffling_the_order_is_kept():
    labels = np.concatenate(take(batches(numbered(5), 3, seed=0, shuffle=False), 5))
    np.testing.assert_array_equal(labels, np.tile(np.arange(5), 3))


@given(
    size=st.integers(2, 40),
    batch=st.integers(1, 40),
    before=st.integers(0, 30),
    seed=st.integers(0, 9),
)
@settings(max_examples=25, deadline=None)
def test_a_resumed_iterator_goes_on_where_it_stood(size, batch, before, seed):
    batch = min(batch, size)
    one = batches(numbered(size), batch, seed=seed)
    take(one, before)
    state = json.loads(json.dumps(one.get_state()))
    rest = take(one, 5)
    other = batches(numbered(size), batch, seed=seed)
    other.set_state(state)
    np.testing.assert_array_equal(take(other, 5), rest)
    one.set_state(state)
    np.testing.assert_array_equal(take(one, 5), rest)


def test_resumption_is_independent_of_threads():
    one = batches(numbered(40), 8, seed=2, num_threads=2)
    take(one, 7)
    other = batches(numbered(40), 8, seed=2)
    other.set_state(one.get_state())
    np.testing.assert_array_equal(take(other, 9), take(one, 9))


def test_standardised_to_mean_zero_and_deviation_one():
    data = load_dataset("fashion-mnist-mini")
    whole = as_batch(data.train, mean=data.mean, std=data.std)
    assert whole.x.shape == (6000, 1, 28, 28)
    assert abs(float(jnp.mean(whole.x))) < 1e-4 and abs(float(jnp.std(whole.x)) - 1) < 1e-4
    exact = (data.train.x[:64] / 255 - data.mean) / data.std
    np.testing.assert_allclose(whole.x[:64], exact, atol=1e-5)
    batch = next(batches(data.train, 64, seed=0, mean=data.mean, std=data.std, shuffle=False))
    np.testing.assert_array_equal(batch.x, whole.x[:64])
    np.testing.assert_array_equal(batch.y, data.train.y[:64])


def test_channels_are_standardised_apart(rng):
    x = rng.integers(0, 256, (6, 3, 4, 4), np.uint8)
    mean, std = (0.1, 0.2, 0.3), (1.0, 2.0, 4.0)
    batch = as_batch(Split(x, np.zeros(6, np.int32)), mean=mean, std=std)
    exact = (x / 255 - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    np.testing.assert_allclose(batch.x, exact, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_features_are_not_divided_by_255(rng, dtype):
    x = rng.normal(3, 2, (8, 5)).astype(dtype)
    batch = next(batches(Split(x, np.zeros(8, np.int32)), 8, seed=0, mean=3.0, std=2.0))
    np.testing.assert_allclose(np.sort(batch.x, 0), np.sort((x - 3.0) / 2.0, 0), atol=1e-2)
    assert batch.x.dtype == jnp.float32


@pytest.mark.parametrize(
    "change, message",
    [
        ({"batch_size": 0}, r"batch_size must lie in \[1, 10\].*got 0"),
        ({"batch_size": 11}, r"batch_size must lie in \[1, 10\].*got 11"),
        ({"seed": -1}, "seed must not be negative"),
        ({"num_epochs": 0}, "num_epochs must be an integer of at least 1 or None"),
        ({"num_epochs": 1.5}, "num_epochs must be an integer of at least 1 or None, got 1.5"),
        ({"batch_size": 2.5}, r"batch_size must lie in \[1, 10\].*got 2.5"),
        ({"batch_size": None}, r"batch_size must lie in \[1, 10\].*got None"),
        ({"seed": None}, "seed must not be negative, and a whole number, got None"),
        ({"num_threads": "2"}, "num_threads must not be negative.*got '2'"),
        ({"num_threads": -1}, "num_threads must not be negative"),
        ({"std": 0.0}, "std must be positive"),
        ({"std": -1.0}, "std must be positive"),
        ({"std": float("nan")}, "std must be finite"),
        ({"mean": float("inf")}, "mean must be finite"),
        ({"mean": (0.1, 0.2)}, "one per channel"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    arguments = {"batch_size": 4, "seed": 0} | change
    with unchecked(), pytest.raises(ValueError, match=message):
        batches(numbered(10), **arguments)


def test_importing_the_package_imports_no_optional_package():
    code = (
        "import sys, ntt_eqx.data, ntt_eqx.models;"
        "print([m for m in ('grain', 'pooch', 'orbax', 'scipy.io') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
