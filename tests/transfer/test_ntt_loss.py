"""The loss is its definition, whatever the outputs and the kernel."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.students import (
    ADAM,
    CONFIG,
    DENSITY,
    GATHERED,
    Noisy,
    Tiny,
    batches,
    evaluated,
    key_of,
    loss_in,
    loss_of,
    moved,
    same,
    start,
    step,
)
from helpers.tiers import slow

import ntt_eqx as ntt

pytestmark = pytest.mark.usefixtures("gathers")


def definition(student, teacher, x, config):
    """The equation, term by term, on explicit Jacobians."""
    half = len(x) // 2
    theta = lambda model: ntt.ntk(
        model, x[:half], x[half:], kernel=config.kernel, implementation="jacobian"
    )
    dense = student.to_dense()
    target = np.mean((np.asarray(jax.vmap(dense)(x)) - np.asarray(jax.vmap(teacher)(x))) ** 2)
    kernel = np.mean((np.asarray(theta(student)) - np.asarray(theta(teacher))) ** 2)
    norm = np.sum(np.asarray(dense.first.weight) ** 2) + np.sum(
        np.asarray(dense.second.weight) ** 2
    )
    loss = target + config.kernel_weight * kernel + config.l2_weight / config.density * norm
    return {"loss": loss, "kernel_distance": kernel, "target_distance": target, "weight_norm": norm}


@pytest.mark.parametrize(
    "kernel, density", [("active", DENSITY), ("active", GATHERED), ("ambient", DENSITY)]
)
def test_loss_is_its_definition(getkey, x64, kernel, density):
    config = ntt.NTTConfig(density, kernel=kernel, kernel_weight=0.3, l2_weight=0.02)
    state = start(getkey, config)
    student = moved(state.student, getkey())
    x = jax.random.normal(getkey(), (6, 6))
    assert x.dtype == jnp.float64
    assert (jax.tree.leaves(state.support) != []) == (density == GATHERED)

    loss, terms = loss_in(state, student, x)

    expected = definition(student, state.teacher, x, config)
    assert loss.dtype == jnp.float64
    np.testing.assert_allclose(loss, expected["loss"], rtol=1e-12)
    for name in terms:
        np.testing.assert_allclose(terms[name], expected[name], rtol=1e-12, err_msg=name)
    also, metrics = loss_of(student, state.teacher, x, config)
    np.testing.assert_allclose(also, expected["loss"], rtol=1e-12)
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(metrics, name), value, rtol=1e-6, err_msg=name)
    kept = round(density * 30) + round(density * 15)
    assert metrics.density == jnp.float32(kept / 45)


@pytest.mark.parametrize("density", [DENSITY, slow(GATHERED)])
@pytest.mark.parametrize("kernel", ["active", "ambient"])
def test_fewer_outputs_compare_the_diagonal_and_its_mean(getkey, x64, kernel, density):
    state = start(getkey, ntt.NTTConfig(density, kernel=kernel))
    student, x = moved(state.student, getkey()), jax.random.normal(getkey(), (6, 6))
    apart = lambda model: np.asarray(
        ntt.ntk(model, x[:3], x[3:], kernel=kernel, implementation="jacobian")
    )
    difference = apart(student) - apart(state.teacher)
    diagonal = np.einsum("nmkk->nmk", difference)
    expected = {"diagonal": diagonal, "trace": diagonal.mean(axis=-1), "full": difference}
    found = {}
    for outputs, compared in expected.items():
        for implementation in ("factors", "jacobian"):
            config = ntt.NTTConfig(
                density, kernel=kernel, outputs=outputs, implementation=implementation
            )
            again = ntt.ntt_init(state.teacher, config, ADAM)
            metrics = evaluated(eqx.tree_at(lambda s: s.student, again, student), x)
            loss = float(metrics.loss)
            found[outputs] = float(metrics.kernel_distance)
            assert found[outputs] == pytest.approx(np.mean(compared**2), rel=1e-6)
            rest = metrics.target_distance + 1e-4 / density * metrics.weight_norm
            assert loss == pytest.approx(float(rest) + 1e-3 * found[outputs], rel=1e-6)
    assert len(set(found.values())) == 3


def test_all_directions_of_a_sketch_are_the_full_kernel(getkey):
    state = start(getkey)
    student, x = moved(state.student, getkey()), next(batches())
    distance = {}
    for outputs in ("full", "sketch"):
        config = ntt.NTTConfig(DENSITY, outputs=outputs, sketch_size=3)
        metrics = loss_of(student, state.teacher, x, config)[1]
        distance[outputs] = metrics.kernel_distance
        assert metrics.target_distance > 0
    np.testing.assert_allclose(distance["sketch"], distance["full"], rtol=1e-4)


@pytest.mark.parametrize("size", [1, 2])
def test_a_sketch_is_right_on_average_with_other_directions_at_every_step(getkey, size):
    state = start(getkey)
    student, x = moved(state.student, getkey()), next(batches())
    config = ntt.NTTConfig(DENSITY, outputs="sketch", sketch_size=size)

    @eqx.filter_jit
    def sketched(steps):
        one = lambda step: ntt.ntt_loss(student, state.teacher, x, config, key=key_of(step))[1]
        return jax.vmap(one)(steps)

    steps = jnp.arange(2000, dtype=jnp.int32)
    metrics = sketched(steps)
    distance = np.asarray(metrics.kernel_distance, np.float64)
    full = loss_of(student, state.teacher, x, ntt.NTTConfig(DENSITY))[1]
    assert distance.std() > 0.1 * distance.mean() and len(np.unique(distance)) > 1900
    error = abs(distance.mean() - float(full.kernel_distance))
    assert error < 4 * distance.std() / np.sqrt(len(distance))
    np.testing.assert_allclose(metrics.target_distance, full.target_distance, rtol=1e-5)
    np.testing.assert_array_equal(sketched(steps).kernel_distance, metrics.kernel_distance)


def test_a_sketch_of_more_directions_varies_less(getkey):
    state = start(getkey)
    student, x = moved(state.student, getkey()), next(batches())
    spread = []
    for size in (1, 2):
        config = ntt.NTTConfig(DENSITY, outputs="sketch", sketch_size=size)
        one = lambda step, config=config: (
            ntt.ntt_loss(student, state.teacher, x, config, key=key_of(step))[1].kernel_distance
        )
        spread.append(float(jax.jit(jax.vmap(one))(jnp.arange(500, dtype=jnp.int32)).std()))
    assert spread[0] > 1.5 * spread[1]


def test_a_dense_student_is_its_teacher_through_any_sketch(getkey):
    config = ntt.NTTConfig(1.0, outputs="sketch", sketch_size=2)
    state = start(getkey, config)
    metrics = loss_of(state.student, state.teacher, next(batches()), config)[1]
    assert metrics.kernel_distance < 1e-12 and metrics.target_distance < 1e-12


def test_a_step_draws_the_directions_of_its_number(getkey):
    config = ntt.NTTConfig(DENSITY, outputs="sketch", sketch_size=1)
    state, x = start(getkey, config), next(batches())
    seen = []
    for number in range(3):
        at = eqx.tree_at(lambda s: s.step, state, jnp.asarray(number, jnp.int32))
        expected = loss_of(state.student, state.teacher, x, config, key=key_of(number))[1]
        after, metrics = step(at, x)
        seen.append(float(metrics.kernel_distance))
        np.testing.assert_allclose(seen[-1], expected.kernel_distance, rtol=1e-4)
        assert after.step == number + 1
    assert len(set(seen)) == 3


def test_more_directions_than_outputs_are_refused(getkey):
    config = ntt.NTTConfig(DENSITY, outputs="sketch", sketch_size=4)
    state = start(getkey, config)
    with pytest.raises(ValueError, match="is 4, but the model has 3 outputs"):
        ntt.ntt_loss(state.student, state.teacher, next(batches()), config)


def test_the_two_kernels_differ_once_there_is_a_mask(getkey):
    x = jax.random.normal(getkey(), (4, 6))
    state = start(getkey)
    distance = {}
    for kernel in ("active", "ambient"):
        config = ntt.NTTConfig(DENSITY, kernel=kernel)
        distance[kernel] = loss_of(state.student, state.teacher, x, config)[1].kernel_distance
    assert distance["active"] != distance["ambient"]


@pytest.mark.parametrize("kernel", ["active", "ambient"])
def test_a_dense_student_at_the_start_is_its_teacher(getkey, kernel):
    config = ntt.NTTConfig(1.0, kernel=kernel, l2_weight=0.5)
    state = start(getkey, config)
    loss, metrics = loss_of(state.student, state.teacher, next(batches()), config)
    assert metrics.target_distance == 0
    assert metrics.kernel_distance < 1e-12  # the teacher's kernel is summed in another order
    np.testing.assert_allclose(loss, 0.5 * metrics.weight_norm, rtol=1e-6)


@pytest.mark.parametrize("kernel", ["active", "ambient"])
def test_gradient_is_that_of_finite_differences(getkey, x64, kernel):
    config = ntt.NTTConfig(DENSITY, kernel=kernel, kernel_weight=0.3, l2_weight=0.02)
    state = start(getkey, config)
    params, static = eqx.partition(moved(state.student, getkey()), eqx.is_inexact_array)
    x = jax.random.normal(getkey(), (4, 6))

    @jax.jit
    def loss(params):
        return ntt.ntt_loss(eqx.combine(params, static), state.teacher, x, config)[0]

    gradient = jax.jit(jax.grad(loss))(params)
    dot = lambda a, b: sum(jnp.vdot(u, v) for u, v in zip(*map(jax.tree.leaves, (a, b))))
    for _ in range(4):
        direction = jax.tree.map(lambda p: jax.random.normal(getkey(), p.shape, p.dtype), params)
        ahead, behind = (
            loss(jax.tree.map(lambda p, d: p + e * d, params, direction)) for e in (1e-5, -1e-5)
        )
        np.testing.assert_allclose(dot(gradient, direction), (ahead - behind) / 2e-5, rtol=1e-7)


@pytest.mark.parametrize("kernel", ["active", "ambient"])
def test_what_lies_under_the_mask_gets_no_gradient_and_does_no_harm(getkey, kernel):
    config = ntt.NTTConfig(DENSITY, kernel=kernel)
    state = start(getkey, config)
    hidden = lambda m, w, value: jnp.where(m, w, jnp.full_like(w, value))
    weights = lambda s: (s.model.first.weight, s.model.second.weight)
    masks = jax.tree.leaves(state.student.mask)
    x = next(batches())

    @eqx.filter_jit
    @eqx.filter_value_and_grad
    def gradient(student):
        return ntt.ntt_loss(student, state.teacher, x, config)[0]

    loss, slopes = gradient(state.student)
    for value in (jnp.nan, jnp.inf, 1e30):
        poisoned = eqx.tree_at(
            weights,
            state.student,
            [hidden(m, w, value) for m, w in zip(masks, weights(state.student), strict=True)],
        )
        again, slopes_again = gradient(poisoned)
        assert same(loss, again) and same(slopes, slopes_again)
        for m, w in zip(masks, weights(poisoned.with_mask(poisoned.mask)), strict=True):
            assert not bool(jnp.isfinite(jnp.where(m, jnp.zeros_like(w), w)).all()) or value == 1e30
    for m, g in zip(masks, weights(slopes), strict=True):
        assert np.all(np.asarray(g)[~np.asarray(m)] == 0.0)
        assert np.all(np.asarray(g)[np.asarray(m)] != 0.0)


def test_dropout_is_off_in_student_and_teacher(getkey):
    config = ntt.NTTConfig(0.5)
    model, x = Noisy(getkey()), next(batches((4, 1, 3, 3)))
    states = [ntt.ntt_init(m, config, ADAM) for m in (model, eqx.nn.inference_mode(model))]
    training, inference = (loss_of(s.student, s.teacher, x, config)[0] for s in states)
    assert same(training, inference)
    assert not states[0].student.model.dropout.inference  # and still on for training afterwards


def test_bfloat16_models_keep_their_dtype_and_lose_no_sums(getkey):
    model = jax.tree.map(
        lambda w: w.astype(jnp.bfloat16) if eqx.is_inexact_array(w) else w, Tiny(getkey())
    )
    state = ntt.ntt_init(model, ntt.NTTConfig(DENSITY), ADAM)
    x = next(batches()).astype(jnp.bfloat16)
    loss, _ = loss_of(state.student, state.teacher, x, state.method)
    assert loss.dtype == jnp.float32
    state, metrics = step(state, x)
    floats = jax.tree.leaves(eqx.filter(state.student, eqx.is_inexact_array))
    assert {w.dtype for w in floats} == {jnp.dtype(jnp.bfloat16)}
    assert jnp.isfinite(metrics.loss)


@pytest.mark.parametrize("size", [0, 1, 3])
def test_a_batch_that_has_no_halves_is_an_error(getkey, size):
    state = start(getkey)
    x = jnp.zeros((size, 6))
    calls = [
        lambda: ntt.ntt_loss(state.student, state.teacher, x, CONFIG),
        lambda: step(state, x),
        lambda: ntt.transfer(state, iter([x]), num_steps=1),
    ]
    for call in calls[: 2 if size == 3 else 3]:
        with pytest.raises(ValueError, match=f"even number of samples, got {size}"):
            call()
