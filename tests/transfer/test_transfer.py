"""A run: what it says, when it stops, and that it can be repeated."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
import pytest
from helpers.students import DENSITY, batches, same, start
from helpers.torch_stand_in import Tensor

import ntt_eqx as ntt

pytestmark = pytest.mark.usefixtures("gathers")


def test_the_kernel_comes_closer_and_the_teacher_stays(getkey):
    config = ntt.NTTConfig(0.5, num_steps=100, mask_every=20, kernel_weight=1.0)
    wide = eqx.nn.MLP(6, 2, 40, 1, jax.nn.tanh, key=getkey())
    state = ntt.ntt_init(wide, config, optax.adam(1e-2))
    teacher = jax.tree.map(lambda l: jnp.copy(l) if eqx.is_array(l) else l, state.teacher)
    validation = next(batches((16, 6), seed=1))
    state, history = ntt.transfer(state, batches((16, 6)), validation=validation, log_every=50)
    first, last = history[0]["validation"], history[-1]["validation"]
    assert last["kernel_distance"] < 0.3 * first["kernel_distance"]
    assert last["loss"] < 0.5 * first["loss"]
    assert same(state.teacher, teacher)
    assert not same(state.student.model, teacher)


def test_batches_of_tensors(getkey):
    """As a `DataLoader` of torch gives them: a list of inputs and labels, gone through again."""
    state, seen = start(getkey), [x for x, _ in zip(batches(), range(3), strict=False)]
    tensors = [[Tensor(x), Tensor([0, 1, 0, 1])] for x in seen]
    found, _ = ntt.transfer(state, tensors, num_steps=6)
    expected, _ = ntt.transfer(state, seen, num_steps=6)
    assert same(found, expected) and not same(found, state)


def test_no_tracer_outlives_its_trace(getkey):
    with jax.checking_leaks():
        state, _ = ntt.transfer(start(getkey), batches(), num_steps=1)
    assert int(state.step) == 1


def test_history(getkey):
    logged = []
    pairs = ((x, jnp.zeros(4, jnp.int32)) for x in batches())
    state, history = ntt.transfer(
        start(getkey),
        pairs,
        validation=next(batches(seed=1)),
        log_every=4,
        on_log=lambda state, row: logged.append((int(state.step), row)),
    )
    assert [row["step"] for row in history] == [0, 4, 8, 12]
    assert [(row["step"], row) for row in history] == logged
    fields = ["loss", "kernel_distance", "target_distance", "weight_norm", "density"]
    for row in history:
        parts = ["validation"] if row["step"] == 0 else ["train", "validation"]
        assert list(row) == ["step", *parts]
        for part in parts:
            assert list(row[part]) == fields
            assert all(isinstance(value, float) for value in row[part].values())
    assert int(state.step) == 12
    unseen = ntt.transfer(start(getkey), batches(), num_steps=2)[1]
    assert [list(row) for row in unseen] == [["step", "train"]]


def test_a_row_every_hundred_steps_where_nothing_else_is_said(getkey):
    _, history = ntt.transfer(start(getkey), batches(), num_steps=101)
    assert [row["step"] for row in history] == [100, 101]


def test_a_run_takes_no_more_batches_than_it_has_steps(getkey):
    taken = batches()
    ntt.transfer(start(getkey), taken, num_steps=5)
    fresh = batches()
    for _ in range(5):
        next(fresh)
    assert same(next(taken), next(fresh))


def test_a_run_needs_an_end(getkey):
    state = start(getkey, ntt.NTTConfig(DENSITY))
    with pytest.raises(ValueError, match="give `num_steps` here or in NTTConfig"):
        ntt.transfer(state, batches())


@pytest.mark.parametrize("validation", [False, True])
def test_divergence_stops_the_run_and_names_the_step(getkey, validation):
    state = start(getkey, optimizer=optax.sgd(1e20))
    samples = next(batches(seed=1)) if validation else None
    with pytest.raises(ntt.DivergenceError, match=r"loss became (nan|inf) at step \d+") as caught:
        ntt.transfer(state, batches(), validation=samples, log_every=1)
    assert 1 <= caught.value.step <= 12
    assert caught.value.phase == "transfer"


def test_the_same_seed_gives_the_same_bits(getkey):
    state = start(getkey)
    one, rows = ntt.transfer(state, batches(), num_steps=6)
    two, rows_again = ntt.transfer(state, batches(), num_steps=6)
    assert same(one, two)
    assert [r["train"]["loss"] for r in rows] == [r["train"]["loss"] for r in rows_again]
    other, _ = ntt.transfer(state, batches(seed=1), num_steps=6)
    assert not same(one.student, other.student)


def test_a_run_resumed_from_a_file_gives_the_same_bits(getkey, tmp_path):
    state = start(getkey)
    whole, _ = ntt.transfer(state, batches(), num_steps=6)
    data = batches()
    half, _ = ntt.transfer(state, data, num_steps=3)
    eqx.tree_serialise_leaves(tmp_path / "state.eqx", half)

    like = jax.tree.map(lambda l: jnp.zeros_like(l) if eqx.is_array(l) else l, state)
    again = eqx.tree_deserialise_leaves(tmp_path / "state.eqx", like)
    assert same(again, half) and int(again.step) == 3
    resumed, history = ntt.transfer(again, data, num_steps=6)
    assert same(resumed, whole)
    assert [row["step"] for row in history] == [6]


def test_the_state_is_a_tree_of_arrays(getkey):
    state = start(getkey)
    named = jtu.tree_leaves_with_path(eqx.filter(state, eqx.is_array))
    paths = [jtu.keystr(path) for path, _ in named]
    assert ".student.masks[0]" in paths and ".step" in paths
    masks = [leaf for _, leaf in named if leaf.dtype == bool]
    assert [m.shape for m in masks] == [(5, 6), (3, 5)]


def sizes(*counts):
    """Batches of these numbers of samples."""
    return (next(batches((size, 6), seed=size)) for size in counts)


def test_an_odd_batch_does_not_stop_a_run(getkey):
    """The last batch of an epoch may be odd: one sample is left out, and said once."""
    with pytest.warns(UserWarning, match="batch of step 2 has 5 samples.*one sample is left out"):
        state, _ = ntt.transfer(start(getkey), sizes(4, 5, 4, 5), num_steps=4, log_every=9)
    data = list(sizes(4, 5, 4, 5))
    expected = start(getkey)
    with pytest.warns(UserWarning) as told:
        again, _ = ntt.transfer(expected, data, num_steps=4, log_every=9)
    even, _ = ntt.transfer(expected, [x[:4] for x in data], num_steps=4, log_every=9)
    assert same(again, even) and len(told) == 1 and int(state.step) == 4


def test_a_single_sample_is_passed_over(getkey):
    state = start(getkey)
    with pytest.warns(UserWarning, match="batch of step 2 has 1 samples"):
        one, _ = ntt.transfer(state, sizes(4, 1, 4), num_steps=2)
    two, _ = ntt.transfer(state, sizes(4, 4), num_steps=2)
    assert same(one, two)
    with (
        pytest.warns(UserWarning),
        pytest.raises(ValueError, match="even number of samples, got 1"),
    ):
        ntt.transfer(state, sizes(4, 1, 1), num_steps=2)
