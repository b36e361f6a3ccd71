"""A phase that is cut anywhere gives the bits of one that is not; a bad loss stops it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntt_eqx import fit
from ntt_eqx.experiment._errors import Diverged, ExperimentError, Interrupted
from ntt_eqx.experiment.checkpoint import KEPT, Checkpoint, CheckpointStore
from ntt_eqx.experiment.loop import Phase, RunContext, StopRequest, run_phase
from ntt_eqx.experiment.metrics import MetricsFile, read_metrics
from ntt_eqx.experiment.progress import Display


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
    metrics = MetricsFile(folder / "metrics.jsonl")
    folder.mkdir(exist_ok=True)
    with open(folder / "log", "a") as log:
        context = RunContext(lambda name: None, Display(log), stop or StopRequest(), every)
        return run_phase(phase, folder / "c", metrics, context)


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
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "cut")]
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
    assert [row["phase"] for row in read_metrics(path)] == ["train"] * 4 + ["next"]


def test_a_bad_loss_stops_at_its_step_and_keeps_the_last_good_state(tmp_path):
    with pytest.raises(Diverged, match=r"nan at step 7 of 11; .* step 6, in .*Try less") as caught:
        run(make_phase(bad_at=7), tmp_path / "a", every=0.0)
    assert (caught.value.stage, caught.value.step) == ("train", 7)
    with pytest.raises(Diverged, match="step 7 of 11; there is no earlier checkpoint"):
        run(make_phase(bad_at=7), tmp_path / "b")


def test_a_bad_batch_is_named_in_place_of_the_advice(tmp_path):
    class Lost(Batches):
        def __next__(self):
            number = super().__next__()
            return np.float32(np.nan if number == 3 else number)

    phase = make_phase()
    phase.batches = Lost()
    with pytest.raises(Diverged, match="step 3 of 11; .*The batch of step 3 has NaN") as caught:
        run(phase, tmp_path / "a")
    assert "Try less" not in str(caught.value)


STATE = {"w": jnp.arange(3.0), "key": jax.random.key(2), "name": "w"}


def test_checkpoints_are_bounded_and_exact(tmp_path):
    store = CheckpointStore(tmp_path)
    for step in range(5):
        store.save(Checkpoint(step, STATE, {"step": step, "x": 0.1}))
    assert len(store.steps()) == KEPT
    found = store.latest(STATE)
    assert (found.step, found.record) == (4, {"step": 4, "x": 0.1})
    np.testing.assert_array_equal(found.state["w"], STATE["w"])
    assert found.state["name"] == "w"
    assert jnp.array_equal(*(jax.random.key_data(s["key"]) for s in (found.state, STATE)))
    store.close()


def test_a_damaged_checkpoint_is_passed_over(tmp_path):
    store = CheckpointStore(tmp_path)
    assert store.latest(STATE) is None
    store.save(Checkpoint(1, STATE, {}))
    store.save(Checkpoint(2, {**STATE, "w": jnp.ones(3)}, {}))
    store.close()
    damage(tmp_path / "2")
    store = CheckpointStore(tmp_path)
    assert store.latest(STATE).step == 1
    store.close()
    damage(tmp_path / "1")
    store = CheckpointStore(tmp_path)
    with pytest.raises(ExperimentError, match="no checkpoint there can be read.*remove this"):
        store.latest(STATE)
    store.close()


def damage(folder):
    for path in folder.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
