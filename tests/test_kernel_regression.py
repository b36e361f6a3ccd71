"""Matrix, spectrum and regression of kernels against NumPy and training in weight space."""

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

import ntt_eqx as ntt

pytestmark = pytest.mark.usefixtures("x64")


@pytest.fixture
def rng():
    return np.random.default_rng(3)


@pytest.fixture
def task(getkey):
    """A small sparse model with training samples, new samples and targets, all in float64."""
    mlp = eqx.nn.MLP(5, 3, 16, depth=1, activation=jnp.tanh, dtype=jnp.float64, key=getkey())
    sparse = ntt.SparseModel(mlp, ntt.make_mask(ntt.scores.Magnitude()(mlp), 0.5))
    x, new = (jax.random.normal(getkey(), (n, 5), jnp.float64) for n in (7, 4))
    return sparse, x, new, jax.random.normal(getkey(), (7, 3), jnp.float64)


def gram(rng, n, features, *outputs):
    """A kernel of n samples with itself, `[n, n, *outputs]`, and what it is the product of."""
    if len(outputs) == 2:
        half = rng.normal(size=(n, outputs[0], features))
        return np.einsum("nkp,mlp->nmkl", half, half), half
    half = rng.normal(size=(n, features, *outputs))
    return np.einsum("np...,mp...->nm...", half, half), half


def tangents(sparse, x):
    """`[N, K, P]` over the kept weights and the biases, by JAX's Jacobian of one flat vector."""
    trainable = jax.tree.map(jnp.isfinite, eqx.filter(sparse.model, eqx.is_array))
    masks = jax.tree.map(
        lambda m, ones: ones if m is None else m,
        sparse.mask,
        trainable,
        is_leaf=lambda leaf: leaf is None,
    )
    flat, rebuild = jax.flatten_util.ravel_pytree(eqx.filter(sparse.to_dense(), eqx.is_array))
    kept, _ = jax.flatten_util.ravel_pytree(masks)
    static = eqx.filter(sparse.model, eqx.is_array, inverse=True)
    run = lambda theta, x: eqx.combine(rebuild(theta), static)(x)
    jacobian = jax.vmap(jax.jacobian(run), (None, 0))(flat, x)
    return np.asarray(jacobian)[..., np.asarray(kept)]


def test_the_matrix_has_samples_before_outputs(rng):
    theta = rng.normal(size=(2, 4, 3, 5))
    matrix = ntt.kernel_matrix(jnp.asarray(theta))
    assert matrix.shape == (6, 20)
    for n, m, k, l in np.ndindex(*theta.shape):
        assert matrix[n * 3 + k, m * 5 + l] == theta[n, m, k, l]
    diagonal = theta[..., 0]
    matrix = np.asarray(ntt.kernel_matrix(jnp.asarray(diagonal))).reshape(2, 3, 4, 3)
    for n, k, m, l in np.ndindex(*matrix.shape):
        assert matrix[n, k, m, l] == (diagonal[n, m, k] if k == l else 0)
    trace = theta[..., 0, 0]
    np.testing.assert_array_equal(ntt.kernel_matrix(jnp.asarray(trace)), trace)


def test_eigenvalues_are_the_squared_singular_values_of_the_tangents(task):
    sparse, x, _, _ = task
    found = ntt.kernel_eigenvalues(ntt.ntk(sparse, x), jitter=0)
    expected = np.linalg.svd(tangents(sparse, x).reshape(21, -1), compute_uv=False) ** 2
    np.testing.assert_allclose(found, expected, rtol=1e-9)


@pytest.mark.parametrize("outputs", [(), (3,), (3, 3)])
def test_eigenvalues_and_their_jitter(rng, outputs):
    theta, _ = gram(rng, 6, 2, *outputs)  # of rank 2 or less a block: most are zero
    matrix = np.asarray(ntt.kernel_matrix(jnp.asarray(theta)))
    expected = np.linalg.eigvalsh(matrix)[::-1]
    raw = ntt.kernel_eigenvalues(jnp.asarray(theta), jitter=0.0)
    np.testing.assert_allclose(raw, expected, atol=1e-12 * expected[0])
    assert np.all(np.diff(raw) <= 0)
    lifted = ntt.kernel_eigenvalues(jnp.asarray(theta))
    np.testing.assert_allclose(lifted - raw, np.finfo(float).eps * np.trace(matrix), rtol=0.5)
    assert np.all(lifted > 0)
    given = ntt.kernel_eigenvalues(jnp.asarray(theta), jitter=0.25)
    np.testing.assert_allclose(given - raw, 0.25, rtol=1e-12)


def test_float32_eigenvalues_of_a_singular_kernel_are_positive(rng):
    theta, _ = gram(rng, 40, 3)
    assert np.all(ntt.kernel_eigenvalues(jnp.asarray(theta, jnp.float32)) > 0)


@pytest.mark.parametrize("ridge", [0.0, 0.3])
@pytest.mark.parametrize("outputs", [(), (3,), (3, 3)])
def test_predictions_are_those_of_numpy(rng, outputs, ridge):
    theta, half = gram(rng, 6, 40, *outputs)
    new_half = rng.normal(size=(4, *half.shape[1:]))
    between = (
        np.einsum("mkp,nlp->mnkl", new_half, half)
        if len(outputs) == 2
        else np.einsum("mp...,np...->mn...", new_half, half)
    )
    y = rng.normal(size=(6, 3))
    fitted = ntt.fit_kernel_ridge(jnp.asarray(theta), jnp.asarray(y), ridge=ridge, jitter=0.0)
    found = fitted(jnp.asarray(between))
    if not outputs:
        expected = between @ np.linalg.solve(theta + ridge * np.eye(6), y)
    elif len(outputs) == 1:
        solve = lambda k: np.linalg.solve(theta[..., k] + ridge * np.eye(6), y[:, k])
        expected = np.stack([between[..., k] @ solve(k) for k in range(3)], axis=1)
    else:
        square = theta.transpose(0, 2, 1, 3).reshape(18, 18) + ridge * np.eye(18)
        dual = np.linalg.solve(square, y.reshape(18)).reshape(6, 3)
        expected = np.einsum("mnkl,nl->mk", between, dual)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-11)


def test_the_prediction_is_that_of_the_linearised_model_trained_to_the_end(task):
    ridge = 0.5
    sparse, x, new, y = task
    f, f_new = jax.vmap(sparse)(x), jax.vmap(sparse)(new)
    fitted = ntt.fit_kernel_ridge(ntt.ntk(sparse, x), y - f, ridge=ridge, jitter=0.0)
    found = f_new + fitted(ntt.ntk(sparse, new, x))

    # In weight space, where no kernel is formed: J change = y - f by least squares with a penalty.
    j, j_new = tangents(sparse, x), tangents(sparse, new)
    flat, gap = j.reshape(21, -1), np.asarray(y - f).reshape(21)
    change = np.linalg.solve(flat.T @ flat + ridge * np.eye(flat.shape[1]), flat.T @ gap)
    np.testing.assert_allclose(found, np.asarray(f_new) + j_new @ change, rtol=1e-9, atol=1e-9)

    # And by gradient descent on the linearised model itself.
    moved = np.zeros_like(change)
    rate = 1 / (np.linalg.norm(flat, 2) ** 2 + ridge)
    for _ in range(int(25 / (rate * ridge))):
        moved -= rate * (flat.T @ (flat @ moved - gap) + ridge * moved)
    np.testing.assert_allclose(found, np.asarray(f_new) + j_new @ moved, rtol=1e-8, atol=1e-8)


def test_without_a_ridge_the_training_targets_are_met(task):
    sparse, x, _, y = task
    theta = ntt.ntk(sparse, x)
    assert np.linalg.cond(np.asarray(ntt.kernel_matrix(theta))) < 1e8
    np.testing.assert_allclose(ntt.fit_kernel_ridge(theta, y)(theta), y, atol=1e-6)


def test_kernels_of_another_kind_than_the_fitted_one_are_refused(rng):
    """The coefficients of one kind fit the shapes of all kinds."""
    model = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))
    x, new = (jnp.asarray(rng.normal(size=(n, 3))) for n in (5, 4))
    y = jnp.ones((5, 2))
    kinds = ("full", "diagonal", "trace")
    full, diagonal, trace = (ntt.ntk(model, x, outputs=kind) for kind in kinds)
    between = {kind: ntt.ntk(model, new, x, outputs=kind) for kind in kinds}
    of_trace = ntt.fit_kernel_ridge_nystrom(model, (x, y), x, ridge=0.1, outputs="trace")
    operators = [ntt.ntk_operator(model, *given) for given in ((x,), (new, x))]
    half = lambda f: 0.5 * jnp.sum((f - y) ** 2)
    for fitted, kind in (
        (ntt.fit_kernel_ridge(full, y, ridge=0.1), "full"),
        (ntt.fit_kernel_ridge(diagonal, y, ridge=0.1), "diagonal"),
        (ntt.fit_kernel_ridge(trace, y, ridge=0.1), "trace"),
        (ntt.fit_kernel_ridge_cg(operators[0], y, ridge=0.1), "full"),
        (of_trace, "trace"),
        (ntt.mse_path(diagonal, y)(1.0), "diagonal"),
        (ntt.loss_path(trace, 0 * y, half, step_size=0.1, num_steps=1), "trace"),
        (ntt.loss_path(operators[0], 0 * y, half, step_size=0.1, num_steps=1), "full"),
    ):
        for other, theta in (*between.items(), ("full", operators[1])):
            if other == kind:
                assert fitted(theta).shape == (4, 2)
            else:
                message = f'KernelRidge: fitted to a kernel with outputs="{kind}".* got .*{other}'
                with pytest.raises(ValueError, match=message):
                    fitted(theta)
    process = ntt.fit_kernel_gp(trace, y, noise=0.1)
    with pytest.raises(ValueError, match='KernelRidge: fitted to a kernel with outputs="trace"'):
        process(between["full"], ntt.ntk(model, new))
    one = eqx.nn.MLP(3, 1, 4, 1, key=jax.random.key(0))  # of which all kinds are the same
    fitted = ntt.fit_kernel_ridge(ntt.ntk(one, x, outputs="trace"), y[:, :1], ridge=0.1)
    assert fitted(ntt.ntk(one, new, x)).shape == (4, 1)


def test_it_compiles_and_differentiates(task):
    sparse, x, new, y = task

    @eqx.filter_jit
    @eqx.filter_value_and_grad
    def loss(sparse):
        fitted = ntt.fit_kernel_ridge(ntt.ntk(sparse, x), y, ridge=0.1)
        return jnp.sum(fitted(ntt.ntk(sparse, new, x)) ** 2)

    value, slope = loss(sparse)
    step = 1e-6
    direction = jax.tree.map(jnp.cos, eqx.filter(sparse, eqx.is_inexact_array))
    along = lambda t: loss(eqx.apply_updates(sparse, jax.tree.map(lambda d: t * d, direction)))[0]
    numeric = (along(step) - along(-step)) / (2 * step)
    products = jax.tree.map(lambda a, b: jnp.sum(a * b), slope, direction)
    np.testing.assert_allclose(sum(jax.tree.leaves(products)), numeric, rtol=1e-5)
    assert np.isfinite(value)


def test_what_does_not_fit_is_refused_by_name(rng):
    theta, _ = (jnp.asarray(a) for a in gram(rng, 4, 9, 2, 2))
    y = jnp.ones((4, 2))
    skew = theta.at[0, 1, 0, 1].add(0.1)
    refused = [
        ("kernel_matrix: theta must be", lambda: ntt.kernel_matrix(theta[None])),
        (
            "kernel_eigenvalues: needs the kernel of a batch",
            lambda: ntt.kernel_eigenvalues(theta[:3]),
        ),
        ("kernel_eigenvalues: theta is not symmetric", lambda: ntt.kernel_eigenvalues(skew)),
        (
            "kernel_eigenvalues: jitter must be",
            lambda: ntt.kernel_eigenvalues(theta, jitter=-1.0),
        ),
        ("fit_kernel_ridge: theta is not symmetric", lambda: ntt.fit_kernel_ridge(skew, y)),
        ("fit_kernel_ridge: theta has NaN", lambda: ntt.fit_kernel_ridge(theta * jnp.nan, y)),
        ("fit_kernel_ridge: targets has NaN", lambda: ntt.fit_kernel_ridge(theta, y * jnp.nan)),
        ("fit_kernel_ridge: targets must be", lambda: ntt.fit_kernel_ridge(theta, y[:, 0])),
        ("fit_kernel_ridge: a kernel of shape", lambda: ntt.fit_kernel_ridge(theta, y[:3])),
        ("fit_kernel_ridge: ridge must be", lambda: ntt.fit_kernel_ridge(theta, y, ridge=-1.0)),
        (
            "fit_kernel_ridge: the kernel is not positive",
            lambda: ntt.fit_kernel_ridge(-theta, y, jitter=0.0),
        ),
        (
            "KernelRidge: fitted to 4 samples of 2 outputs",
            lambda: ntt.fit_kernel_ridge(theta, y)(theta[:, :3]),
        ),
    ]
    for message, call in refused:
        with pytest.raises(ValueError, match=f"^{message}"):
            call()


def test_kernels_of_no_samples_are_refused():
    empty = np.zeros((0, 0), np.float32)
    for use in (
        ntt.kernel_eigenvalues,
        lambda k: ntt.fit_kernel_ridge(k, np.zeros((0, 2), np.float32)),
    ):
        with pytest.raises(ValueError, match="of no samples"):
            use(empty)
