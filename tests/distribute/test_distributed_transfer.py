"""Transfers, training, evaluation and scores over eight devices are those of one."""

import contextlib

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.devices import close, mesh_of, model_and_samples
from helpers.tiers import slow
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import ntt_eqx as ntt
from ntt_eqx import _primitives

pytestmark = pytest.mark.usefixtures("x64", "gathers")


def transferred(name, config, steps):
    model, x = model_and_samples(name, 32)
    state = ntt.ntt_init(model, config, optax.adam(1e-2), key=jax.random.key(3))
    step = eqx.filter_jit(ntt.ntt_step)
    losses = []
    for _ in range(steps):
        state, metrics = step(state, jnp.asarray(x))
        losses.append(float(metrics.loss))
    return state, losses


@pytest.mark.parametrize(
    "name, options, exchange",
    [
        slow("mlp", {"density": 0.1}, True),
        ("mlp", {"density": 0.1, "kernel": "ambient"}, False),
        slow("mlp", {"density": 0.1, "outputs": "sketch", "sketch_size": 2}, None),
        slow("cnn", {"density": 0.1}, False),
        slow("cnn", {"density": 0.5, "scope": "global"}, True),
    ],
)
def test_steps_with_refreshes(name, options, exchange):
    config = ntt.NTTConfig(mask_every=4, num_steps=12, **options)
    one, losses = transferred(name, config, 10)
    with ntt.distribute(exchange=exchange):
        many, found = transferred(name, config, 10)
    np.testing.assert_allclose(found, losses, rtol=1e-10)
    same = lambda a, b: np.array_equal(np.asarray(a), np.asarray(b))
    assert all(jax.tree.leaves(jax.tree.map(same, one.student.mask, many.student.mask)))
    leaves = jax.tree.leaves(eqx.filter(many, eqx.is_array))
    assert all(len(leaf.sharding.device_set) == 8 for leaf in leaves)
    assert all(leaf.sharding.is_fully_replicated for leaf in leaves)


def test_step_compiles_once():
    traces = 0

    def step(state, x):
        nonlocal traces
        traces += 1
        return ntt.ntt_step(state, x)

    model, x = model_and_samples("mlp", 32)
    with ntt.distribute():
        state = ntt.ntt_init(model, ntt.NTTConfig(density=0.1), optax.adam(1e-2))
        step = eqx.filter_jit(step)
        for _ in range(3):
            state, _ = step(state, x)
    assert traces == 1


@pytest.mark.parametrize(("name", "classes"), [slow("mlp", 4), slow("cnn", 3)])
def test_train_and_evaluate(name, classes, monkeypatch):
    monkeypatch.setattr(_primitives, "_FEWEST", 0)  # the small network's convolution, too
    model, x = model_and_samples(name, 48, density=0.3)
    y = np.arange(48) % classes
    batches = [(x[i : i + 16], y[i : i + 16]) for i in range(0, 48, 16)]

    def run():
        trained, history = ntt.train(model, batches, optax.adam(1e-2), num_steps=6, log_every=2)
        return trained, history, ntt.evaluate(trained, (x[:45], y[:45]), batch_size=20)

    one, rows, result = run()
    with ntt.distribute():
        many, found, spread = run()
    jax.tree.map(
        close, eqx.filter(many, eqx.is_inexact_array), eqx.filter(one, eqx.is_inexact_array)
    )
    assert spread == pytest.approx(result, rel=1e-12)
    assert [row["train"] for row in found] == [
        pytest.approx(row["train"], rel=1e-12) for row in rows
    ]


@pytest.mark.parametrize(
    "score", [ntt.scores.Snip(), ntt.scores.GraSP(), ntt.scores.LogitSnip(), ntt.scores.Wanda()]
)
def test_scores(score):
    model, x = model_and_samples("mlp", 16)
    y = np.arange(16) % 4
    batch = x if isinstance(score, ntt.scores.AbstractLabelFreeScore) else (x, y)
    one = score(model, batch)
    with ntt.distribute():
        jax.tree.map(close, score(model, batch), one)


@pytest.mark.slow
def test_steps_on_a_mesh_of_explicit_axes():
    config = ntt.NTTConfig(density=0.1, mask_every=4, num_steps=12)
    one, losses = transferred("mlp", config, 6)
    mesh = mesh_of((2, 4), ("a", "b"), AxisType.Explicit)
    with jax.set_mesh(mesh):
        alone, found = transferred("mlp", config, 6)
        with ntt.distribute(mesh):
            many, spread = transferred("mlp", config, 6)
    np.testing.assert_allclose([found, spread], [losses, losses], rtol=1e-10)
    same = lambda state: jax.tree.map(np.array_equal, state.student.mask, one.student.mask)
    assert all(jax.tree.leaves([same(alone), same(many)]))


@pytest.mark.slow
def test_a_state_of_eight_devices_goes_on_on_others(tmp_path):
    model, x = model_and_samples("mlp", 32)
    config = ntt.NTTConfig(density=0.1, mask_every=4, num_steps=12)
    begin = lambda: ntt.ntt_init(model, config, optax.adam(1e-2), key=jax.random.key(3))
    arrays = lambda state: jax.tree.leaves(eqx.filter(state, eqx.is_array))

    def on(devices, path, steps):
        """The state that is in a file after some steps on so many devices, and their losses."""
        with ntt.distribute(mesh_of((devices,), ("a",))):
            state = eqx.tree_deserialise_leaves(path, begin())
            read = [np.asarray(leaf) for leaf in arrays(state)]
            losses = []
            for _ in range(steps):
                state, metrics = eqx.filter_jit(ntt.ntt_step)(state, x)
                losses.append(float(metrics.loss))
        return read, losses

    with ntt.distribute():
        state, _ = transferred("mlp", config, 5)
        path = tmp_path / "state.eqx"
        eqx.tree_serialise_leaves(path, state)
        written = [np.asarray(leaf) for leaf in arrays(state)]
    _, losses = on(8, path, 5)
    for devices in (1, 4):
        read, found = on(devices, path, 5)
        assert all(map(np.array_equal, read, written))
        np.testing.assert_allclose(found, losses, rtol=1e-10)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:transfer. no path:ntt_eqx.LayerCollapseWarning")
@pytest.mark.parametrize("kind, in_use", [("Auto", False), ("Explicit", False), ("Explicit", True)])
def test_sharded_weights_stay_sharded(kind, in_use):
    """Over an axis that samples are not spread over, from the teacher to the trained network."""
    teacher, x = model_and_samples("mlp", 32)
    y = np.arange(32) % 4
    mesh = mesh_of((2, 2, 2), ("rows", "columns", "model"), AxisType[kind])
    spec = lambda leaf: P("model") if leaf.shape[0] % 2 == 0 else P()
    put = lambda leaf: jax.device_put(leaf, NamedSharding(mesh, spec(leaf)))

    def run(teacher, places):
        scored = ntt.prune(teacher, ntt.scores.Snip(), 0.3, (x, y))
        config = ntt.NTTConfig(density=0.1, mask_every=4, num_steps=12)
        state = ntt.ntt_init(teacher, config, optax.adam(1e-2), key=jax.random.key(3))
        for _ in range(2):
            state, _ = eqx.filter_jit(ntt.ntt_step)(state, x)
        state, rows = ntt.transfer(state, [x] * 8, num_steps=10)
        trained, _ = ntt.train(scored, [(x, y)] * 3, optax.adam(1e-2), num_steps=3)
        for model in (state.teacher, state.student.model, state.student.mask, trained.model):
            places.append(
                [leaf.sharding for leaf in jax.tree.leaves(eqx.filter(model, eqx.is_array))]
            )
        places.append([leaf.sharding for leaf in jax.tree.leaves(state.opt_state[0].mu)])
        return state.student, trained, rows[-1]["train"]["loss"], ntt.evaluate(trained, (x, y))

    one, two, loss, result = run(teacher, [])
    places = []
    with jax.set_mesh(mesh) if in_use else contextlib.nullcontext(), ntt.distribute(mesh):
        many, found, spread, judged = run(jax.tree.map(put, teacher), places)
    same = lambda a, b: np.testing.assert_allclose(
        np.asarray(a), np.asarray(b), rtol=1e-9, atol=1e-12
    )
    arrays = lambda tree: eqx.filter(tree, eqx.is_array)
    jax.tree.map(same, arrays((many, found)), arrays((one, two)))
    assert (spread, judged) == (pytest.approx(loss, rel=1e-9), pytest.approx(result, rel=1e-9))
    for shardings in places:
        assert all(set(sharding.mesh.axis_names) >= {"model"} for sharding in shardings)
        assert any(sharding.spec[:1] == ("model",) for sharding in shardings)
