"""The driver: which rows there are, what is in them, and how a run ends."""

import math

import equinox as eqx
import jax.numpy as jnp
import pytest

import ntt_eqx as ntt


class State(eqx.Module):
    step: int
    total: float


def add(state, batch):
    state = State(state.step + 1, state.total + batch)
    return state, {"loss": jnp.float32(batch), "nested": {"total": jnp.float32(state.total)}}


START = State(0, 0.0)
NUMBERS = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
look = {"seen": lambda state: {"total": state.total}}


def test_rows_are_means_since_the_row_before():
    logged = []
    log = lambda state, row: logged.append((state.step, row))
    state, rows = ntt.fit(
        add, START, iter(NUMBERS), num_steps=7, log_every=3, observe=look, on_log=log
    )
    assert state == State(7, 28.0)
    assert rows == [
        {"step": 0, "seen": {"total": 0.0}},
        {"step": 3, "train": {"loss": 2.0, "total": 10 / 3}, "seen": {"total": 6.0}},
        {"step": 6, "train": {"loss": 5.0, "total": 46 / 3}, "seen": {"total": 21.0}},
        {"step": 7, "train": {"loss": 7.0, "total": 28.0}, "seen": {"total": 28.0}},
    ]
    assert logged == [(row["step"], row) for row in rows]


@pytest.mark.parametrize(("every", "steps"), [(None, [7]), (100, [7]), (7, [7]), (5, [5, 7])])
def test_the_last_step_has_a_row(every, steps):
    _, rows = ntt.fit(add, START, NUMBERS, num_steps=7, log_every=every)
    assert [row["step"] for row in rows] == steps
    assert all(set(row) == {"step", "train"} for row in rows)


@pytest.mark.parametrize("cut", range(1, 7))
def test_a_run_cut_anywhere_has_the_rows_of_an_uncut_one(cut):
    """By what `on_step` sees, also between two rows."""
    whole, rows = ntt.fit(add, START, NUMBERS, num_steps=7, log_every=3, observe=look)
    source, kept = iter(NUMBERS), {}

    class Stop(Exception):
        pass

    def stop(progress):
        if progress.step == cut:
            kept.update(state=progress.state, window=progress.window(), row=progress.row)
            raise Stop

    first = []
    with pytest.raises(Stop):
        ntt.fit(add, START, source, num_steps=7, log_every=3, observe=look, on_step=stop,
                on_log=lambda state, row: first.append(row))  # fmt: skip
    assert kept["row"] == first[-1]
    state, second = ntt.fit(
        add, kept["state"], source, num_steps=7, log_every=3, observe=look, window=kept["window"]
    )
    assert state == whole and first + second == rows


def test_what_can_be_gone_through_again_is():
    state, _ = ntt.fit(add, START, NUMBERS[:3], num_steps=7)
    assert state.total == 1 + 2 + 3 + 1 + 2 + 3 + 1
    for spent, after in ((iter(NUMBERS[:3]), 3), ([], 0), (iter([]), 0)):
        with pytest.raises(ValueError, match=f"run: the batches ran out after step {after} of 7"):
            ntt.fit(add, START, spent, num_steps=7, name="run")


def test_takes_a_batch_a_step_and_none_more():
    source = iter(NUMBERS)
    ntt.fit(add, START, source, num_steps=3)
    assert next(source) == 4.0
    state, rows = ntt.fit(add, State(3, 0.0), source, num_steps=3, observe=look)
    assert state == State(3, 0.0) and rows == [] and next(source) == 5.0


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_loss_that_is_not_finite_is_named_with_its_step_and_value(value):
    numbers = [1.0, 2.0, 3.0, 4.0, value, 6.0]
    saved = []
    save = lambda progress: saved.append((progress.step, progress.window()))
    for on_step, steps in ((None, []), (save, [1, 2, 3, 4])):
        with pytest.raises(ntt.DivergenceError, match="run: the loss .* at step 5") as caught:
            ntt.fit(add, START, numbers, num_steps=6, on_step=on_step, name="run")
        assert (caught.value.phase, caught.value.step) == ("run", 5)
        assert caught.value.value == value or math.isnan(value) and math.isnan(caught.value.value)
        assert [step for step, _ in saved] == steps


def test_an_observed_loss_stops_the_run_too():
    rows = []
    observe = {"test": lambda state: {"loss": math.nan if state.step == 4 else 0.0}}
    with pytest.raises(ntt.DivergenceError, match="at step 4"):
        ntt.fit(add, START, NUMBERS, num_steps=7, log_every=2, observe=observe,
                on_log=lambda state, row: rows.append(row["step"]))  # fmt: skip
    assert rows == [0, 2]


def test_a_long_run_does_not_wait_for_its_row_to_find_a_bad_loss():
    with pytest.raises(ntt.DivergenceError, match="at step 500"):
        made = []

        def numbers():
            for i in range(1, 10_001):
                made.append(i)
                yield math.nan if i == 500 else 0.0

        ntt.fit(add, START, numbers(), num_steps=10_000, log_every=None)
    assert made[-1] == 1000


def test_bad_counts_are_refused():
    for options, message in (
        (dict(num_steps=-1), "num_steps must be an integer of at least 0"),
        (dict(num_steps=1, log_every=0), "log_every must be an integer of at least 1 or None"),
    ):
        with pytest.raises(ValueError, match=f"^fit: {message}"):
            ntt.fit(add, START, NUMBERS, **options)
