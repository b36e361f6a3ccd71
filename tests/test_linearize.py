"""Linearised models and their training, against explicit Jacobians and explicit training."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
import numpy as np
import optax
import pytest
from helpers.comparison import random_mask, relative_error
from helpers.refusals import unchecked

import ntt_eqx as ntt

EXACT = 1e-10  # float64


def numbers(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def small(masked, seed=0):
    model = eqx.nn.MLP(3, 2, 5, 1, jnp.tanh, key=jax.random.key(seed), dtype=jnp.float64)
    if not masked:
        return model
    sparse = ntt.sparsify(model)
    return sparse.with_mask(random_mask(sparse.mask, 0.5))


def moved(model, seed=1):
    """The linearised model with other parameters, and their change under the mask."""
    linear = ntt.linearize(model)
    kept = model.mask if isinstance(model, ntt.SparseModel) else None
    dense = linear.model if isinstance(model, ntt.SparseModel) else linear
    params = eqx.filter(dense.model, eqx.is_inexact_array)
    leaves, treedef = jax.tree.flatten(params)
    change = treedef.unflatten([numbers(*w.shape, seed=seed + n) for n, w in enumerate(leaves)])
    where = lambda m: m.model.model if kept is not None else m.model
    linear = eqx.tree_at(where, linear, eqx.apply_updates(dense.model, change))
    if kept is None:
        return linear, change
    is_none = lambda leaf: leaf is None
    cut = lambda m, c: c if m is None or c is None else jnp.where(m, c, jnp.zeros_like(c))
    return linear, jax.tree.map(cut, kept, change, is_leaf=is_none)


def jacobians(model, x):
    """By `jax.jacrev` of the plain model with the mask multiplied in: a tree of `[N, K, ...]`."""
    plain = model.to_dense() if isinstance(model, ntt.SparseModel) else model
    params, static = eqx.partition(plain, eqx.is_inexact_array)
    one = jax.jacrev(lambda p, x: eqx.combine(p, static)(x))
    return jax.vmap(one, (None, 0))(params, x)


@pytest.mark.parametrize("masked", [False, True])
def test_values_are_those_of_explicit_jacobians(masked, x64):
    model, x = small(masked), numbers(4, 3)
    linear, change = moved(model)
    jacobian = jacobians(model, x)
    terms = jax.tree.map(lambda j, c: j.reshape(*j.shape[:2], -1) @ c.reshape(-1), jacobian, change)
    expected = jax.vmap(model)(x) + sum(jax.tree.leaves(terms))
    assert relative_error(jax.vmap(linear)(x), expected) < EXACT
    assert relative_error(jax.vmap(ntt.linearize(model))(x), jax.vmap(model)(x)) < 1e-14


@pytest.mark.parametrize("masked", [False, True])
def test_its_kernel_is_the_models_wherever_it_is(masked, x64):
    model, x = small(masked), numbers(4, 3)
    linear, _ = moved(model)
    for kernel in ("active", "ambient"):
        expected = ntt.ntk(model, x, kernel=kernel)
        assert relative_error(ntt.ntk(linear, x, kernel=kernel), expected) < EXACT
    size = lambda tree: sum(p.size for p in jax.tree.leaves(tree))
    explained = ntt.explain(linear, x).parameters
    assert len(explained) == len(jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array)))
    if masked:
        assert [m.size for m in jax.tree.leaves(linear.mask)] == [
            m.size for m in jax.tree.leaves(model.mask)
        ]
        assert size(linear.mask) == size(model.mask)


def trained(linear, x, loss, rate, steps):
    """Gradient descent on the parameters of a linearised model, by its definition."""
    params, static = eqx.partition(linear, eqx.is_inexact_array)
    gradient = jax.jit(jax.grad(lambda p: loss(jax.vmap(eqx.combine(p, static))(x))))
    for _ in range(steps):
        params = jax.tree.map(lambda p, g: p - rate * g, params, gradient(params))
    return eqx.combine(params, static)


@pytest.mark.parametrize("masked", [False, True])
def test_steps_on_squared_error_are_those_of_training(masked, x64):
    model, x, new, y = small(masked), numbers(4, 3), numbers(3, 3, seed=1), numbers(4, 2, seed=2)
    theta, f, _ = ntt.ntk_and_outputs(model, x)
    cross, g, _ = ntt.ntk_and_outputs(model, new, x)
    largest = float(ntt.kernel_eigenvalues(theta)[0])
    for rate in (0.3 / largest, 1.7 / largest):  # the second makes 1 - eta lambda negative
        path = ntt.mse_path(theta, y - f, learning_rate=rate)
        for steps in (0, 1, 7):
            half = lambda f: 0.5 * jnp.sum((f - y) ** 2)
            after = trained(ntt.linearize(model), x, half, rate, steps)
            assert relative_error(f + path(steps)(theta), jax.vmap(after)(x)) < EXACT
            assert relative_error(g + path(steps)(cross), jax.vmap(after)(new)) < EXACT


def test_origin_is_never_trained(x64):
    model, x = small(True), numbers(4, 3)
    after = trained(ntt.linearize(model), x, lambda f: jnp.sum(f**2), 0.1, 3)
    before = ntt.linearize(model)
    assert eqx.tree_equal(after.model.origin, before.model.origin)
    assert not eqx.tree_equal(after.model.model, before.model.model)
    before = jax.tree.leaves(eqx.filter(before.model.model, eqx.is_inexact_array))
    moved = jax.tree.leaves(eqx.filter(after.model.model, eqx.is_inexact_array))
    for m, one, two in zip(jax.tree.leaves(after.masks), before[::2], moved[::2], strict=True):
        assert bool(jnp.all((one == two) | m)) and not bool(jnp.all(one == two))


def test_train_runs_on_it(x64):
    model, x = small(True), np.asarray(numbers(8, 3))
    rule = optax.sgd(0.1, momentum=0.9)
    state = ntt.train_init(ntt.linearize(model), ntt.TrainConfig(), rule)
    y = np.arange(8) % 2
    state, _ = ntt.train_step(state, (jnp.asarray(x), jnp.asarray(y)))
    assert eqx.tree_equal(state.model.model.origin, ntt.linearize(model).model.origin)
    assert not jnp.allclose(jax.vmap(state.model)(x), jax.vmap(model)(x))


@pytest.mark.parametrize("form", ["full", "diagonal", "trace"])
def test_gradient_flow_is_the_exponential_of_the_matrix(form, x64):
    model, x, new, y = small(True), numbers(4, 3), numbers(3, 3, seed=1), numbers(4, 2, seed=2)
    theta, cross = (ntt.ntk(model, a, x, outputs=form) for a in (x, new))
    path = ntt.mse_path(theta, y, learning_rate=None)
    wide = lambda t: t if t.ndim > 2 else jnp.stack([t, t], axis=2)
    a, b = ntt.kernel_matrix(wide(theta)), ntt.kernel_matrix(wide(cross))
    for time in (0.0, 0.3, 5.0):
        left = jnp.eye(8) - jsl.expm(-a * time)
        expected = (left @ y.reshape(-1)).reshape(4, 2)
        assert jnp.allclose(path(time)(theta), expected, atol=1e-9)
        # the integral of exp(-a s) to this time, without an inverse (Van Loan 1978)
        eye, none = jnp.eye(8), jnp.zeros((8, 8))
        integral = jsl.expm(jnp.block([[-a, eye], [none, none]]) * time)[:8, 8:]
        weights = integral @ y.reshape(-1)
        assert jnp.allclose(path(time)(cross), (b @ weights).reshape(3, 2), atol=1e-9)
    jitted = jax.jit(lambda time: path(time).dual)(0.3)
    assert relative_error(jitted, path(0.3).dual) < EXACT


def test_directions_that_the_kernel_does_not_see(x64):
    """A sample twice, and a kernel of zeros: nothing divides by zero."""
    x, y = jnp.tile(numbers(1, 3), (2, 1)), numbers(2, 2, seed=2)
    theta = ntt.ntk(small(False), x)
    found = ntt.mse_path(theta, y)(50.0)(theta)
    assert relative_error(found, jnp.tile(y.mean(0), (2, 1))) < 1e-3
    zeros = jnp.zeros((2, 2))
    for rate, time in ((None, 2.0), (0.5, 4)):
        assert (
            relative_error(ntt.mse_path(zeros, y, learning_rate=rate)(time).dual, 2.0 * y) < EXACT
        )


@pytest.mark.parametrize("rate", [None, 0.01])
def test_rounding_errors_do_not_grow_with_time(rate):
    """More rows than parameters: float32 finds eigenvalues around 0 on both sides of it."""
    cast = lambda a: jnp.asarray(np.asarray(a), jnp.float32)
    model = eqx.nn.MLP(3, 2, 4, 1, jnp.tanh, key=jax.random.key(0), dtype=jnp.float32)
    x, new, y = cast(numbers(40, 3)), cast(numbers(6, 3, seed=1)), cast(numbers(40, 2, seed=2))
    theta, cross = ntt.ntk(model, x), ntt.ntk(model, new, x)
    assert ntt.kernel_eigenvalues(theta, jitter=0)[-1] < 0
    path = ntt.mse_path(theta, y, learning_rate=rate)
    pinv = np.linalg.pinv(np.float64(ntt.kernel_matrix(theta)), 1e-6, hermitian=True)
    end = np.float64(ntt.kernel_matrix(cross)) @ pinv @ np.float64(y).reshape(-1)
    for time in (10**7, 10**9, 1e20):  # the last is more steps than 32 bits count
        assert relative_error(path(time)(cross).reshape(-1), end) < 0.05


def test_more_steps_than_32_bits_count(x64):
    path = ntt.mse_path(jnp.eye(1), jnp.ones((1, 1)), learning_rate=1e-9)
    for steps in (3 * 10**9, 5e9):
        assert jnp.allclose(path(steps).dual, -jnp.expm1(steps * jnp.log1p(-1e-9)))


def cross_entropy(f):
    return optax.softmax_cross_entropy_with_integer_labels(f, jnp.arange(len(f)) % 2).sum()


def test_steps_on_any_loss_are_those_of_training(x64):
    model, x, new = small(True), numbers(4, 3), numbers(3, 3, seed=1)
    theta, f, _ = ntt.ntk_and_outputs(model, x)
    cross, g, _ = ntt.ntk_and_outputs(model, new, x)
    after = trained(ntt.linearize(model), x, cross_entropy, 0.05, 5)
    for kernel in (theta, ntt.ntk_operator(model, x)):
        how = dict(step_size=0.05, num_steps=5, method="sgd")
        change = ntt.loss_path(kernel, f, cross_entropy, **how)
        assert relative_error(f + change(theta), jax.vmap(after)(x)) < EXACT
        assert relative_error(g + change(cross), jax.vmap(after)(new)) < EXACT


def test_integration_is_of_fourth_order(x64):
    theta, y = ntt.ntk(small(True), numbers(4, 3)), numbers(4, 2, seed=2)
    exact = ntt.mse_path(theta, y)(1.0)(theta)
    half = lambda f: 0.5 * jnp.sum((f - y) ** 2)
    start = jnp.zeros_like(y)
    errors = [
        relative_error(
            ntt.loss_path(theta, start, half, step_size=1 / n, num_steps=n)(theta), exact
        )
        for n in (64, 128)
    ]
    assert errors[0] < 1e-3 and 12 < errors[0] / errors[1] < 20


@pytest.mark.parametrize("form", ["full", "diagonal", "trace"])
def test_a_gaussian_process(form, x64):
    model, x, new, y = small(True), numbers(4, 3), numbers(3, 3, seed=1), numbers(4, 2, seed=2)
    theta, cross, prior = (
        np.asarray(ntt.ntk(model, a, b, outputs=form)) for a, b in ((x, x), (new, x), (new, new))
    )
    mean, covariance = ntt.fit_kernel_gp(theta, y, noise=0.1, jitter=0)(cross, prior)
    wide = lambda t: t if t.ndim > 2 else np.stack([t, t], axis=2)
    k, c, p = (np.asarray(ntt.kernel_matrix(wide(t))) for t in (theta, cross, prior))
    solve = np.linalg.solve(k + 0.1 * np.eye(8), np.concatenate([c.T, y.reshape(-1, 1)], axis=1))
    assert relative_error(mean, (c @ solve[:, -1]).reshape(3, 2)) < EXACT
    assert covariance.shape == prior.shape
    found = ntt.kernel_matrix(wide(np.asarray(covariance)))
    assert relative_error(found, p - c @ solve[:, :-1]) < EXACT


@pytest.mark.parametrize(("rate", "time"), [(None, -1.0), (0.1, 2.5), (0.1, -3)])
def test_a_traced_time_that_cannot_be_gives_nan(rate, time):
    path = ntt.mse_path(jnp.eye(3), jnp.ones((3, 2)), learning_rate=rate)
    assert jnp.isnan(jax.jit(lambda t: path(t).dual)(time)).all()


def test_what_is_refused():
    theta, y = jnp.eye(3), jnp.ones((3, 2))
    for call, message in (
        (lambda: ntt.linearize(jnp.tanh), r"linearize: .*eqx\.Partial"),
        (lambda: ntt.mse_path(theta, y[:2]), "mse_path: residuals"),
        (lambda: ntt.mse_path(theta, y, learning_rate=0.0), "mse_path: learning_rate"),
        (lambda: ntt.mse_path(theta, y)(-1.0), "MSEPath: time must be >= 0 and finite, got -1"),
        (lambda: ntt.mse_path(theta, y)(jnp.inf), "MSEPath: time must be >= 0 and finite"),
        (lambda: ntt.mse_path(theta, y, learning_rate=0.1)(2.5), "a number of steps, got 2.5"),
        (lambda: ntt.top_eigenpairs(theta, 1), "top_eigenpairs: needs a kernel as an operator"),
        (lambda: ntt.kernel_alignment(theta, y), "kernel_alignment: needs a kernel as an operat"),
        (lambda: ntt.mse_path(theta.at[0, 1].set(5.0), y), "not symmetric"),
        (lambda: ntt.loss_path(theta, y, jnp.sum, step_size=-1, num_steps=1), "step_size"),
        (lambda: ntt.loss_path(theta, y, jnp.sum, step_size=1, num_steps=-1), "num_steps"),
        (lambda: ntt.fit_kernel_gp(theta, y, noise=-1.0), "fit_kernel_gp: noise"),
        (lambda: ntt.fit_kernel_gp(theta, y)(theta, jnp.eye(2)), "KernelGP: cross and prior"),
    ):
        with unchecked(), pytest.raises(ValueError, match=message):
            call()
