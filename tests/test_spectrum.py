"""Spectra, alignments and solves by products alone, against dense float64."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.comparison import random_mask, relative_error
from helpers.tiers import default_only, slow

import ntt_eqx as ntt


class Matrix(ntt.AbstractNTKOperator):
    """Any symmetric matrix in the place of a kernel."""

    matrix: jax.Array

    @jax.jit
    def mv(self, v):
        return (self.matrix @ v.reshape(len(self.matrix), -1)).reshape(v.shape)

    def transpose(self):
        return self

    def in_structure(self):
        return jax.ShapeDtypeStruct((len(self.matrix) // 2, 2), self.matrix.dtype)

    def out_structure(self):
        return self.in_structure()

    @property
    def is_symmetric(self):
        return True


ROWS = 300  # above what is formed
SPECTRA = {
    "none": np.zeros(ROWS),
    "rank 1": np.r_[3.0, np.zeros(ROWS - 1)],
    "rank 3": np.r_[3.0, 2.0, 1e-2, np.zeros(ROWS - 3)],
    "rank N - 1": np.r_[np.linspace(1, 50, ROWS - 1)[::-1], 0.0],
    "all equal": np.full(ROWS, 2.0),
    "ten of each": np.repeat(2.0 ** -np.arange(ROWS // 10), 10),
    "twelve equal above a tail": np.r_[np.full(12, 5.0), np.linspace(4, 0, ROWS - 12)],
    "fast decay": 0.9 ** np.arange(ROWS),
}


def matrix_of(name, dtype, seed=0):
    basis = np.linalg.qr(np.random.default_rng(seed).normal(size=(ROWS, ROWS)))[0]
    values = SPECTRA[name]
    found = (basis * values) @ basis.T
    return Matrix(jnp.asarray((found + found.T) / 2, dtype)), values


QUICK = [("rank 1", jnp.float64), ("ten of each", jnp.float32)]
ALL = [(name, dtype) for name in SPECTRA for dtype in (jnp.float32, jnp.float64)]


@pytest.mark.parametrize("name, dtype", [c if c in QUICK else slow(*c) for c in ALL])
def test_the_largest_pairs(name, dtype, x64):
    """However many eigenvalues are equal or zero."""
    operator, values = matrix_of(name, dtype)
    for count in (1, 5, 25):
        pairs = ntt.top_eigenpairs(operator, count)
        exact = 1e-6 if dtype == jnp.float64 else 1e-4
        scale = values.max() or 1.0
        np.testing.assert_allclose(pairs.values, values[:count], atol=exact * scale)
        v = pairs.vectors.reshape(ROWS, count)
        np.testing.assert_allclose(v.T @ v, np.eye(count), atol=1e-10)
        left = np.asarray(operator.matrix, np.float64) @ v - v * pairs.values
        np.testing.assert_allclose(np.linalg.norm(left, axis=0), pairs.residuals, atol=1e-5 * scale)
        assert pairs.residuals.max() <= 10 * exact * scale


def test_a_stopped_call_goes_on_with_the_same_bits(tmp_path):
    """In the search, in its restarts, in the check and after the end."""
    operator, _ = matrix_of("twelve equal above a tail", jnp.float32)
    whole, file = ntt.top_eigenpairs(operator, 14), tmp_path / "state.npz"
    for most in (8, 100, whole.num_products - 10, whole.num_products - 1):
        with pytest.raises(RuntimeError, match="no convergence"):
            ntt.top_eigenpairs(operator, 14, max_products=most, checkpoint=file)
    for _ in range(2):
        found = ntt.top_eigenpairs(operator, 14, checkpoint=file)
        assert found.num_products == whole.num_products
        np.testing.assert_array_equal(found.values, whole.values)
        np.testing.assert_array_equal(found.vectors, whole.vectors)
        np.testing.assert_array_equal(found.residuals, whole.residuals)
    assert [path.name for path in tmp_path.iterdir()] == ["state.npz"]
    other, _ = matrix_of("twelve equal above a tail", jnp.float32, seed=1)
    for call in (
        lambda: ntt.top_eigenpairs(other, 14, checkpoint=file),
        lambda: ntt.top_eigenpairs(operator, 13, checkpoint=file),
        lambda: ntt.top_eigenpairs(operator, 14, seed=1, checkpoint=file),
    ):
        with pytest.raises(ValueError, match="another kernel, or of other settings"):
            call()
    for content in (b"", file.read_bytes()[:1000]):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="is no checkpoint"):
            ntt.top_eigenpairs(operator, 14, checkpoint=file)
    with pytest.raises(ValueError, match="there is no folder"):
        ntt.top_eigenpairs(operator, 14, checkpoint=tmp_path / "nowhere" / "state.npz")


@pytest.mark.parametrize("name", default_only(list(SPECTRA), "rank 3", "fast decay"))
def test_sums_over_the_spectrum(name, x64):
    operator, values = matrix_of(name, jnp.float64)
    density = ntt.spectral_density(operator, num_probes=12, num_steps=40)
    assert density.weights.sum() == pytest.approx(12 * ROWS)
    for function in (np.ones_like, lambda v: v, lambda v: v**2, lambda v: np.log(v + 0.5)):
        expected = np.sum(function(values))
        found, error = density.sum(function)
        assert abs(found - expected) <= 4 * error + 1e-6 * (1 + abs(expected))


@pytest.mark.parametrize("name", [slow("rank 3"), "ten of each", slow("fast decay")])
def test_known_pairs_count_exactly(name, x64):
    operator, values = matrix_of(name, jnp.float64)
    pairs = ntt.top_eigenpairs(operator, 60)
    density = ntt.spectral_density(operator, num_probes=4, num_steps=40, pairs=pairs)
    assert density.trace() == pytest.approx(values.sum(), rel=0.02)
    expected = np.log(values + 0.1).sum()
    assert density.log_determinant(0.1) == pytest.approx(expected, rel=1e-3)
    dimension = np.sum(values / (values + 0.1))
    assert density.effective_dimension(0.1) == pytest.approx(dimension, rel=0.01)
    shares = values[values > 0] / values.sum()
    rank = np.exp(-np.sum(shares * np.log(shares)))
    assert density.effective_rank() == pytest.approx(rank, rel=0.02)
    condition = (values.max() + 0.1) / (values.min() + 0.1)
    assert 0.9 * condition <= density.condition(0.1) <= condition * (1 + 1e-6)


def small(seed, density=0.5, width=9, outputs=3, samples=11, dtype=jnp.float64):
    model = eqx.nn.MLP(4, outputs, width, 2, jnp.tanh, key=jax.random.key(seed), dtype=dtype)
    sparse = ntt.sparsify(model)
    rng = np.random.default_rng(seed)
    return sparse.with_mask(random_mask(sparse.mask, density)), jnp.asarray(
        rng.normal(size=(samples, 4)), dtype
    )


@pytest.mark.parametrize(
    "seed, density, samples", [(0, 0.5, 11), (1, 0.0, 1), slow(2, 1.0, 4), slow(3, 0.1, 97)]
)
def test_masked_models(seed, density, samples, x64):
    sparse, x = small(seed, density, samples=samples)
    operator = ntt.ntk_operator(sparse, x, batch_size=5)
    theta = ntt.ntk(sparse, x, implementation="jacobian")
    matrix = np.asarray(ntt.kernel_matrix(theta))
    values = np.linalg.eigvalsh(matrix)[::-1]
    for count in {1, min(5, len(matrix)), len(matrix)}:
        pairs = ntt.top_eigenpairs(operator, count)
        np.testing.assert_allclose(pairs.values, values[:count], atol=1e-6 * (values[0] + 1e-9))
    diagonal = operator.diagonal()
    assert relative_error(diagonal.ravel(), np.diag(matrix)) < 1e-12
    rates = jax.tree.map(lambda w: jnp.full_like(w, 2), eqx.filter(sparse.model, eqx.is_array))
    how = dict(kernel="ambient", metric=rates)
    ambient = np.diag(np.asarray(ntt.kernel_matrix(ntt.ntk(sparse, x, **how))))
    assert relative_error(ntt.ntk_operator(sparse, x, **how).diagonal().ravel(), ambient) < 1e-12


def centred(theta, other):
    """By the other metric of alignment of the library."""
    return 1 - float(ntt.Alignment()(theta, other))


@pytest.mark.parametrize("tile", [3, slow(256)])
def test_alignment_is_that_of_the_formed_kernels(tile, x64):
    (one, x), (two, _) = small(0), small(1)
    y = jnp.asarray(np.random.default_rng(3).normal(size=(11, 3)))
    operators = [ntt.ntk_operator(model, x) for model in (one, two)]
    thetas = [ntt.ntk(model, x, implementation="jacobian") for model in (one, two)]
    found = ntt.kernel_alignment(*operators, tile=tile)
    assert found == pytest.approx(centred(*thetas), abs=1e-12)
    assert ntt.kernel_alignment(operators[0], operators[0], tile=tile) == pytest.approx(1)
    labels = jnp.einsum("nk,ml->nmkl", y, y)
    found = ntt.kernel_alignment(operators[0], y, tile=tile)
    assert found == pytest.approx(centred(thetas[0], labels), abs=1e-12)
    traces = [jnp.einsum("nmkk->nm", theta) for theta in thetas]
    found = ntt.kernel_alignment(*operators, outputs="trace", tile=tile)
    assert found == pytest.approx(centred(*traces), abs=1e-12)
    expected = ntt.compare_kernels(one, two.to_dense(), x)
    dense = ntt.ntk_operator(two.to_dense(), x)
    found = ntt.kernel_alignment(operators[0], dense, outputs="trace", tile=tile)
    assert found == pytest.approx(expected.kernel_alignment, abs=1e-9)
    found = ntt.kernel_alignment(operators[0], y, outputs="trace", tile=tile)
    assert found == pytest.approx(centred(traces[0], y @ y.T), abs=1e-12)


def test_alignment_with_nothing(x64):
    sparse, x = small(0)
    operator = ntt.ntk_operator(sparse, x)
    assert ntt.kernel_alignment(operator, jnp.ones((11, 3))) == 0.0  # constant over samples
    one = ntt.ntk_operator(sparse, x[:1])
    assert ntt.kernel_alignment(one, one) == 0.0


@pytest.mark.parametrize(
    "rank, density", [(0, 0.5), (7, 0.5), slow(33, 0.5), slow(0, 0.0), (7, 0.0), slow(33, 0.0)]
)
def test_conjugate_gradients(rank, density, x64):
    sparse, x = small(0, density)
    y = jnp.asarray(np.random.default_rng(3).normal(size=(11, 3)))
    new = jnp.asarray(np.random.default_rng(4).normal(size=(5, 4)))
    operator = ntt.ntk_operator(sparse, x, batch_size=4)
    fitted = ntt.fit_kernel_ridge_cg(operator, y, ridge=0.1, rank=rank, rtol=1e-12)
    exact = ntt.fit_kernel_ridge(ntt.ntk(sparse, x), y, ridge=0.1, jitter=0)
    assert relative_error(fitted.dual, exact.dual) < 1e-9
    cross = ntt.ntk(sparse, new, x, implementation="jacobian")
    for theta in (cross, ntt.ntk_operator(sparse, new, x)):
        assert relative_error(fitted(theta), exact(cross)) < 1e-9


def test_the_preconditioner_saves_steps(x64):
    operator, _ = matrix_of("fast decay", jnp.float64)
    y = jnp.asarray(np.random.default_rng(3).normal(size=operator.in_structure().shape))
    how = dict(ridge=1e-4, rtol=1e-8)
    ntt.fit_kernel_ridge_cg(operator, y, max_steps=40, rank=90, **how)
    with pytest.raises(RuntimeError, match="fit_kernel_ridge_cg: after .* raise rank"):
        ntt.fit_kernel_ridge_cg(operator, y, max_steps=40, **how)


@pytest.mark.parametrize("outputs", ["full", "trace"])
def test_landmarks(outputs, x64):
    """All samples as landmarks: kernel ridge. Fewer: the best function of their span."""
    sparse, x = small(0)
    y = jnp.asarray(np.random.default_rng(3).normal(size=(11, 3)))
    theta = ntt.ntk(sparse, x, outputs=outputs)
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    fit = lambda data, landmarks: ntt.fit_kernel_ridge_nystrom(
        sparse, data, landmarks, ridge=0.3, outputs=outputs
    )
    exact = ntt.fit_kernel_ridge(theta, y, ridge=0.3, jitter=0)
    assert relative_error(fit(iter(batches), x)(theta), exact(theta)) < 1e-8
    some = theta[:, :3]
    fitted = fit((x, y), x[:3])
    a, b = (np.asarray(ntt.kernel_matrix(t)) for t in (some, theta[:3, :3]))
    columns = np.asarray(y).reshape(len(a), -1)
    dual = np.linalg.lstsq(a.T @ a + 0.3 * b, a.T @ columns, rcond=1e-12)[0]
    assert relative_error(fitted(some), (a @ dual).reshape(11, 3)) < 1e-8


def test_streams(x64):
    sparse, x = small(0)
    y = np.zeros(11)
    stream = [(x[:4], y[:4]), (x[4:8], y[4:8]), (x[8:], y[8:])]
    other = [x[:5], x[5:7], x[7:9]]
    whole, streamed = ntt.ntk_operator(sparse, x), ntt.streamed_ntk_operator(sparse, stream)
    cross = ntt.ntk_operator(sparse, x, x[:9])
    between = ntt.streamed_ntk_operator(sparse, stream, other)
    rng = np.random.default_rng(3)
    for one, two in ((whole, streamed), (cross, between), (cross.T, between.T)):
        assert one.shape == two.shape and one.is_symmetric == two.is_symmetric
        for r in ((), (2,)):
            v = jnp.asarray(rng.normal(size=(*one.in_structure().shape, *r)))
            assert relative_error(two.mv(v), one.mv(v)) < 1e-12
    values = ntt.top_eigenpairs(streamed, 4).values
    np.testing.assert_allclose(values, ntt.top_eigenpairs(whole, 4).values, rtol=1e-9)
    targets = jnp.asarray(rng.normal(size=(11, 3)))
    dual = ntt.fit_kernel_ridge_cg(streamed, targets, ridge=0.1).dual
    assert relative_error(dual, ntt.fit_kernel_ridge_cg(whole, targets, ridge=0.1).dual) < 1e-6


class Shrinking:
    """A stream that lacks its last batch when it is read again."""

    def __init__(self, batches):
        self.batches, self.left = batches, len(batches)

    def __iter__(self):
        left, self.left = self.left, 1
        return iter(self.batches[:left])


def test_what_is_refused():
    sparse, x = small(0, dtype=jnp.float32)
    operator, between = ntt.ntk_operator(sparse, x), ntt.ntk_operator(sparse, x, x[:3])
    v = jnp.ones((11, 3))
    nan, _ = matrix_of("rank 1", jnp.float32)
    nan = Matrix(nan.matrix.at[0, 0].set(jnp.nan))
    for call, message in (
        (lambda: ntt.top_eigenpairs(between, 1), "top_eigenpairs: .* with itself"),
        (lambda: ntt.top_eigenpairs(operator, 34), "at most 33"),
        (lambda: ntt.top_eigenpairs(operator, 0), "num_pairs"),
        (lambda: ntt.top_eigenpairs(nan, 1), "NaN or infinite"),
        (lambda: ntt.spectral_density(between), "spectral_density: .* with itself"),
        (lambda: ntt.spectral_density(operator, num_probes=0), "num_probes"),
        (lambda: ntt.spectral_density(operator).log_determinant(0.0), "ridge must be above 0"),
        (lambda: ntt.kernel_alignment(operator, v[:4]), "as many samples"),
        (lambda: ntt.fit_kernel_ridge_cg(operator, v, ridge=0), "ridge must be above 0"),
        (lambda: ntt.fit_kernel_ridge_cg(operator, v[:4], ridge=1), "targets must be"),
        (lambda: ntt.fit_kernel_ridge_nystrom(sparse, (x, v[:4]), x, ridge=1), "targets must"),
        (lambda: ntt.fit_kernel_ridge_nystrom(sparse, [], x, ridge=1), "no batch"),
        (lambda: ntt.streamed_ntk_operator(sparse, iter([x])), "iterator"),
        (lambda: ntt.streamed_ntk_operator(sparse, []), "no batch"),
        (lambda: between.diagonal(), "batch with itself"),
        (lambda: ntt.streamed_ntk_operator(sparse, Shrinking([x, x])).mv(jnp.ones((22, 3))),
         "another number of samples"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()
    hard, _ = matrix_of("rank N - 1", jnp.float32)
    with pytest.raises(RuntimeError, match="top_eigenpairs: no convergence"):
        ntt.top_eigenpairs(hard, 5, max_products=12)
