"""A phase that is cut anywhere gives the bits of one that is not; a bad loss stops it."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ntt_eqx as ntt
from ntt_eqx import fit
from ntt_eqx.data import load_dataset
from ntt_eqx.experiment._errors import ExperimentError, Interrupted, NetworkFailed
from ntt_eqx.experiment.cells import Cell
from ntt_eqx.experiment.checkpoint import KEPT, Checkpoint, CheckpointStore
from ntt_eqx.experiment.loop import Phase, RunContext, StopRequest, run_phase
from ntt_eqx.experiment.metrics import MetricsFile, read_metrics
from ntt_eqx.experiment.phases import training_phase
from ntt_eqx.experiment.progress import Display
from ntt_eqx.experiment.settings import TrainingSettings

from .conftest import DATASET, TwoLayers
from .fabricated import held


class Batches:
    def __init__(self):
        self.n = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.n += 1
        return self.n

    def get_state(self):
        return {"n": self.n}

    def set_state(self, state):
        self.n = state["n"]


@jax.jit
def update(state, batch):
    key, noise = jax.random.split(state["key"])
    w = state["w"] * 0.9 + jax.random.normal(noise, (3,)) * batch
    return {"key": key, "w": w, "n": state["n"] + 1}, jnp.sum(w)


def run_steps(step, state, batches, **how):
    look = {"test": lambda state: {"norm": float(jnp.sum(state["w"] ** 2))}}
    return fit(step, state, batches, start=int(state["n"]), observe=look, **how)


def make_phase(bad_at=None, stop_at=None, stop=None):
    def step(state, batch):
        state, loss = update(state, jnp.float32(batch))
        if stop_at == batch:
            stop.asked = True
        return state, {"loss": jnp.float32(jnp.nan) if batch == bad_at else loss}

    return Phase(
        name="train",
        title="toy",
        num_steps=11,
        log_every=4,
        state={"key": jax.random.key(1), "w": jnp.zeros(3), "n": jnp.array(0)},
        batches=Batches(),
        run=functools.partial(run_steps, step),
        shown=lambda row: row["train"],
        advice="Try less.",
    )


def run(phase, folder, stop=None, every=1e9):
    here = held(folder)
    metrics = MetricsFile(here)
    with open(folder / "log", "a") as log:
        context = RunContext(lambda name: None, Display(log), stop or StopRequest(), every)
        return run_phase(phase, here, metrics, context)


@pytest.mark.parametrize("cut", [1, 4, 6, 10])
def test_a_cut_run_gives_the_same_bits(tmp_path, cut):
    whole = run(make_phase(), tmp_path / "whole")
    stop = StopRequest()
    with pytest.raises(Interrupted):
        run(make_phase(stop_at=cut, stop=stop), tmp_path / "cut", stop)
    again = run(make_phase(), tmp_path / "cut")
    np.testing.assert_array_equal(whole.state["w"], again.state["w"])
    assert jnp.array_equal(
        jax.random.key_data(whole.state["key"]), jax.random.key_data(again.state["key"])
    )
    assert again.row == whole.row and again.seconds > 0
    rows = [read_metrics(tmp_path / name) for name in ("whole", "cut")]
    assert rows[0] == rows[1]
    assert [row["step"] for row in rows[0]] == [0, 4, 8, 11]


def test_a_finished_phase_is_not_run_again(tmp_path):
    first = run(make_phase(), tmp_path / "a")
    phase = make_phase()
    phase.run = functools.partial(run_steps, lambda *_: pytest.fail("a step was made"))
    again = run(phase, tmp_path / "a")
    np.testing.assert_array_equal(first.state["w"], again.state["w"])


def test_a_finished_phase_leaves_the_rows_of_the_next(tmp_path):
    run(make_phase(), tmp_path / "a")
    path = tmp_path / "a" / "metrics.jsonl"
    path.write_text(path.read_text() + '{"phase": "next"}\n')
    run(make_phase(), tmp_path / "a")
    assert [row["phase"] for row in read_metrics(path.parent)] == ["train"] * 4 + ["next"]


def test_a_bad_loss_stops_at_its_step_and_keeps_the_last_good_state(tmp_path):
    with pytest.raises(
        NetworkFailed, match=r"nan at step 7 of 11; .* step 6, in .*Try less"
    ) as caught:
        run(make_phase(bad_at=7), tmp_path / "a", every=0.0)
    assert (caught.value.stage, caught.value.step) == ("train", 7)
    with pytest.raises(NetworkFailed, match="step 7 of 11; there is no earlier checkpoint"):
        run(make_phase(bad_at=7), tmp_path / "b")


def test_a_bad_batch_is_named_in_place_of_the_advice(tmp_path):
    class Lost(Batches):
        def __next__(self):
            number = super().__next__()
            return np.float32(np.nan if number == 3 else number)

    phase = make_phase()
    phase.batches = Lost()
    with pytest.raises(
        NetworkFailed, match="step 3 of 11; .*The batch of step 3 has NaN"
    ) as caught:
        run(phase, tmp_path / "a")
    assert "Try less" not in str(caught.value)


STATE = {
    "w": jnp.arange(3.0),
    "b": jnp.ones(2, jnp.bfloat16),
    "key": jax.random.key(2),
    "name": "w",
}


def test_checkpoints_are_bounded_and_exact(tmp_path):
    store = CheckpointStore(held(tmp_path), "train")
    for step in range(5):
        store.save(Checkpoint(step, STATE, {"step": step, "x": 0.1}))
    assert store.steps() == [3, 4] and len(store.steps()) == KEPT
    assert len(list((tmp_path / "checkpoints").iterdir())) == KEPT
    found = store.latest(STATE)
    assert (found.step, found.record) == (4, {"step": 4, "x": 0.1})
    np.testing.assert_array_equal(found.state["w"], STATE["w"])
    assert found.state["name"] == "w" and found.state["b"].dtype == jnp.bfloat16
    assert jnp.array_equal(*(jax.random.key_data(s["key"]) for s in (found.state, STATE)))


def test_a_damaged_checkpoint_is_passed_over(tmp_path):
    store = CheckpointStore(held(tmp_path), "train")
    assert store.latest(STATE) is None
    store.save(Checkpoint(1, STATE, {}))
    store.save(Checkpoint(2, {**STATE, "w": jnp.ones(3)}, {}))
    one, two = sorted((tmp_path / "checkpoints").iterdir())
    two.write_bytes(two.read_bytes()[: two.stat().st_size // 2])
    assert store.latest(STATE).step == 1
    store.save(Checkpoint(2, STATE, {}))
    assert store.latest(STATE).step == 2
    for path in (one, two):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    with pytest.raises(ExperimentError, match="no checkpoint there can be read.*remove this"):
        store.latest(STATE)


def test_a_checkpoint_of_another_network_is_none(tmp_path):
    store = CheckpointStore(held(tmp_path), "train")
    store.save(Checkpoint(1, STATE, {}))
    with pytest.raises(ExperimentError, match="its arrays are not those of this network"):
        store.latest({**STATE, "w": jnp.arange(4.0)})


def test_a_checkpoint_that_is_not_the_runs_is_neither_read_nor_removed(tmp_path):
    store = CheckpointStore(held(tmp_path), "train")
    for step in (3, 4):
        store.save(Checkpoint(step, STATE, {}))
    own, foreign = (tmp_path / "checkpoints" / f"train-00000000{step}" for step in (4, 9))
    foreign.write_bytes(own.read_bytes())
    assert store.latest(STATE).step == 4
    with pytest.raises(ExperimentError, match="not this run's file"):
        store.save(Checkpoint(9, STATE, {}))
    run = held(tmp_path)
    run.remove(run.names("checkpoints/"))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [foreign.name]


def test_a_checkpoint_that_cannot_be_written_is_one_sentence(tmp_path, monkeypatch, capfd):
    store = CheckpointStore(held(tmp_path), "train")
    store.save(Checkpoint(1, STATE, {}))

    def fail(*_):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", fail)
        with pytest.raises(
            ExperimentError, match=r"step 2 cannot be written \(Input/output error\); older ones"
        ):
            store.save(Checkpoint(2, STATE, {}))
    assert store.latest(STATE).step == 1
    assert capfd.readouterr() == ("", "")


def test_the_kernel_of_more_logits_than_classes_is_watched():
    images, watched = load_dataset(DATASET), TrainingSettings(batch_size=8, kernel_images=6)
    start = ntt.sparsify(TwoLayers(num_classes=5, key=jax.random.key(0)))
    cell = Cell(DATASET, "tiny", "random", "layer", 0.5, 0, None, None, watched)
    phase = training_phase(cell, start, images, "")
    found = phase.run.keywords["observe"]["kernel"](phase.state)["alignment"]

    x, y = ntt.data.as_batch(images.test[:6], mean=images.mean, std=images.std)
    theta = np.asarray(ntt.ntk(start, x), np.float64).transpose(0, 2, 1, 3)  # n, k, m, l
    theta -= theta.mean(0)
    theta -= theta.mean(2, keepdims=True)
    targets = np.eye(5)[np.asarray(y)]
    targets -= targets.mean(0)
    wanted = np.einsum("nk,nkml,ml", targets, theta, targets)
    wanted /= np.linalg.norm(theta) * np.sum(targets**2)
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
