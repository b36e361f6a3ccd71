"""Losses against their equations, with metrics, sketches and the gradient of pruned weights."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.refusals import unchecked
from helpers.students import ADAM, Tiny, moved

import ntt_eqx as ntt
from ntt_eqx._ntk import kernel_spec
from ntt_eqx._transfer import _kernels
from ntt_eqx.kernels import Device


@pytest.fixture
def pair(getkey, x64):
    """A student that has moved, in float64, its teacher and a batch."""
    state = ntt.ntt_init(Tiny(getkey()), ntt.NTTConfig(0.3), ADAM)
    return moved(state.student, getkey()), state.teacher, jax.random.normal(getkey(), (6, 6))


def step_info(student):
    return ntt.StepInfo(jnp.int32(3), jax.random.key(5), 0.3)


def theta(model, x, **options):
    return np.asarray(ntt.ntk(model, x[:3], x[3:], implementation="jacobian", **options))


@pytest.mark.parametrize("kernel", ["active", "ambient"])
def test_alignment_is_its_equation(pair, kernel):
    student, teacher, x = pair
    loss = ntt.KernelMatching(
        kernel=kernel, kernel_weight=0.7, l2_weight=0.1, kernel_distance=ntt.Alignment()
    )
    found, terms = eqx.filter_jit(loss)(student, teacher, x, step_info(student))
    one, two = (theta(m, x, kernel=kernel) for m in (student, teacher))
    C = np.eye(3) - 1 / 3
    one, two = (np.einsum("an,nmkl,mb->abkl", C, t, C) for t in (one, two))
    alignment = np.sum(one * two) / np.linalg.norm(one.ravel()) / np.linalg.norm(two.ravel())
    np.testing.assert_allclose(terms["kernel_term"], 1 - alignment, rtol=1e-10)
    rest = terms["target_distance"] + 0.1 / 0.3 * terms["weight_norm"]
    np.testing.assert_allclose(found, rest + 0.7 * (1 - alignment), rtol=1e-10)


def test_alignment_does_not_see_the_scale(pair):
    student, teacher, x = pair
    full = ntt.sparsify(jax.tree.map(lambda w: 1.0 * w, teacher))
    twice = eqx.tree_at(lambda s: s.model.second, full, replace_fn=lambda layer: layer)
    loss = ntt.KernelMatching(kernel_distance=ntt.Alignment())
    term = lambda model: float(loss(model, teacher, x, step_info(model))[1]["kernel_term"])
    assert term(twice) == pytest.approx(0, abs=1e-12) and term(student) > 0.001


class Huber(ntt.AbstractDistance):
    """A distance of one's own."""

    def __call__(self, student, teacher):
        return jnp.mean(optax.losses.huber_loss(student, teacher, delta=0.1))


def test_own_distances_take_the_place_of_the_squares(pair):
    student, teacher, x = pair
    loss = ntt.KernelMatching(
        kernel_weight=0.7, l2_weight=0.0, kernel_distance=Huber(), output_distance=Huber()
    )
    found, terms = eqx.filter_jit(loss)(student, teacher, x, step_info(student))
    huber = lambda one, two: np.mean(
        np.where(abs(one - two) < 0.1, 0.5 * (one - two) ** 2, 0.1 * (abs(one - two) - 0.05))
    )
    one, two = theta(student, x), theta(teacher, x)
    f = [np.asarray(jax.vmap(m)(x)) for m in (student, teacher)]
    np.testing.assert_allclose(terms["kernel_term"], huber(one, two), rtol=1e-10)
    np.testing.assert_allclose(terms["output_term"], huber(*f), rtol=1e-10)
    np.testing.assert_allclose(found, huber(*f) + 0.7 * huber(one, two), rtol=1e-10)
    np.testing.assert_allclose(terms["kernel_distance"], np.mean((one - two) ** 2), rtol=1e-10)


@pytest.mark.parametrize("probe", [ntt.Full(), ntt.Diagonal(), ntt.Sketch(2)])
def test_a_metric_weighs_the_parameters_of_both_kernels(pair, probe):
    student, teacher, x = pair
    draw = lambda w: jnp.abs(jnp.sin(3 * w)) if eqx.is_inexact_array(w) else None
    metric = jax.tree.map(draw, teacher)
    loss = ntt.KernelMatching(metric=metric, probe=probe)
    _, terms = eqx.filter_jit(loss)(student, teacher, x, step_info(student))
    outputs, directions = probe.view(step_info(student).key, 3)
    views = [theta(m, x, metric=metric, outputs=outputs) for m in (student, teacher)]
    if directions is not None:
        V, W = map(np.asarray, directions)
        views = [V @ t @ W.T for t in views]
    expected = np.mean((views[0] - views[1]) ** 2)
    np.testing.assert_allclose(terms["kernel_distance"], expected, rtol=1e-6)
    plain = ntt.KernelMatching(probe=probe)(student, teacher, x, step_info(student))[1]
    assert abs(float(plain["kernel_distance"]) / expected - 1) > 0.01


@pytest.mark.parametrize("kernel", ["active", "ambient"])
def test_the_dense_gradient_is_the_slope_by_weights_that_are_pruned(pair, kernel):
    """By finite differences of the definition, whose active kernel counts by a mask that stays."""
    student, teacher, x = pair
    loss = ntt.KernelMatching(kernel=kernel, kernel_weight=0.3, l2_weight=0.05)
    view = ntt.RefreshView(student, teacher, x, step_info(student), loss)
    slopes = eqx.filter_jit(lambda view: view.dense_gradient())(view)
    metric = student.mask if kernel == "active" else None

    def definition(dense):
        target = np.mean((np.asarray(jax.vmap(dense)(x)) - np.asarray(jax.vmap(teacher)(x))) ** 2)
        one = theta(dense, x, kernel="ambient", metric=metric)
        distance = np.mean((one - theta(teacher, x)) ** 2)
        weights = (dense.first.weight, dense.second.weight)
        return target + 0.3 * distance + 0.05 / 0.3 * sum(float(jnp.sum(w**2)) for w in weights)

    dense = student.to_dense()
    for at in (lambda m: m.first.weight, lambda m: m.second.weight):
        mask = np.asarray(at(student.mask))
        for index in (tuple(np.argwhere(~mask)[1]), tuple(np.argwhere(mask)[0])):
            ahead, behind = (
                definition(eqx.tree_at(at, dense, at(dense).at[index].add(e)))
                for e in (1e-5, -1e-5)
            )
            slope = float(at(slopes)[index])
            assert slope == pytest.approx((ahead - behind) / 2e-5, rel=1e-5, abs=1e-9)
        assert (np.abs(np.asarray(at(slopes))[~mask]) > 1e-6).any()
    assert slopes.first.bias is None


def test_settings_that_cannot_work_are_refused():
    for make, message in (
        (lambda: ntt.KernelMatching(kernel_weight=-1.0), "kernel_weight must be finite and >= 0"),
        (lambda: ntt.KernelMatching(l2_weight=float("nan")), "l2_weight must be finite"),
        (lambda: ntt.KernelMatching(kernel_distance=jnp.square), "must be an AbstractDistance"),
        (lambda: ntt.KernelMatching(precision="half"), "precision must be one of .* got 'half'"),
        (
            lambda: ntt.KernelMatching(probe=ntt.Sketch(2), implementation="jacobian"),
            "a sketch needs implementation='factors'",
        ),
        (lambda: ntt.Sketch(0), "size must be an integer of at least 1"),
        (lambda: ntt.MagnitudeRefresh(every=0), "MagnitudeRefresh: every must be an integer"),
        (lambda: ntt.RigLRefresh(fraction=1.0), r"fraction must be in \(0, 1\)"),
    ):
        with unchecked(), pytest.raises(ValueError, match=message):
            make()


def test_what_frees_the_teachers_factors_changes_nothing(pair, monkeypatch):
    """On an accelerator the student waits for the teacher's kernel."""
    student, teacher, x = pair
    config = ntt.NTTConfig(density=0.3)

    def found():
        loss = lambda student: ntt.ntt_loss(student, teacher, x, config)[0]
        text = str(jax.make_jaxpr(lambda x: ntt.ntt_loss(student, teacher, x, config)[0])(x))
        return "optimization_barrier" in text, eqx.filter_value_and_grad(loss)(student)

    free, plain = found()
    gpu = Device("gpu", "an accelerator")
    monkeypatch.setattr(
        _kernels, "kernel_spec", lambda *a: dataclasses.replace(kernel_spec(*a), device=gpu)
    )
    waits, ordered = found()
    assert waits and not free
    assert jax.tree.all(jax.tree.map(np.array_equal, plain, ordered))


WAVY = lambda shape: jnp.sin(jnp.arange(16.0)).reshape(shape)
CONSTANT = {
    "both": (lambda shape: jnp.full(shape, 0.1), lambda shape: jnp.full(shape, 3.0)),
    "both zero": (jnp.zeros, jnp.zeros),
    "rows alone": (
        lambda shape: jnp.full(shape, 1e-25),
        lambda shape: jnp.arange(16.0).reshape(shape),
    ),
    "tiny": (lambda shape: 1e-30 * jnp.arange(16.0).reshape(shape) ** 2, jnp.ones),
}


@pytest.mark.parametrize("case", CONSTANT)
def test_kernels_without_a_shape_have_no_alignment_and_no_slope(case):
    one, two = (make((2, 2, 2, 2)) for make in CONSTANT[case])
    distance = lambda one, two: ntt.Alignment()(one, two)
    with jax.debug_nans(True):
        value, slopes = jax.value_and_grad(distance, argnums=(0, 1))(one, two)
    assert value == 1.0
    assert all((slope == 0).all() for slope in slopes)


def test_the_alignment_of_kernels_of_any_size():
    """Squares of the entries under- and overflow; the shape is the same."""
    theta = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3, 2, 2)), jnp.float32)
    for scale in (1e-25, 1.0, 1e25):
        value, slope = jax.value_and_grad(lambda one: ntt.Alignment()(one, theta))(scale * theta)
        assert abs(value) < 1e-6 and jnp.abs(scale * slope).max() < 1e-6
