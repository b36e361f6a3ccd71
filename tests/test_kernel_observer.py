"""The kernel in the rows of a history is that of the model at that step."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ntt_eqx as ntt


def test_rows_of_a_training():
    model = eqx.nn.MLP(4, 3, 8, 1, jnp.tanh, key=jax.random.key(0))
    sparse = ntt.prune(model, ntt.scores.Magnitude(), 0.5)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(9, 4)).astype(np.float32), rng.integers(0, 3, 9)
    targets = np.eye(3, dtype=np.float32)[y]
    observer = ntt.KernelObserver(x, targets, num_eigenvalues=2)
    trained, history = ntt.train(
        sparse, (x, y), optax.adam(0.05), num_steps=6, log_every=3, observe={"kernel": observer}
    )
    assert [row["step"] for row in history] == [0, 3, 6]
    for model, row in ((sparse, history[0]), (trained, history[-1])):
        found, theta = row["kernel"], ntt.ntk(model, x)
        rates = ntt.kernel_eigenvalues(theta, jitter=0)
        assert found["trace"] == pytest.approx(float(rates.sum()), rel=1e-4)
        assert found["eigenvalue_1"] == pytest.approx(float(rates[0]), rel=1e-4)
        assert found["eigenvalue_2"] == pytest.approx(float(rates[1]), rel=1e-4)
        expected = ntt.kernel_alignment(ntt.ntk_operator(model, x), targets)
        assert found["alignment"] == pytest.approx(expected, rel=1e-4)
        compared = ntt.compare_kernels(model, model.to_dense(), x).effective_rank
        assert found["effective_rank"] == pytest.approx(compared, rel=1e-4)
    assert history[0]["kernel"]["alignment"] != history[-1]["kernel"]["alignment"]


def test_it_takes_the_student_of_a_transfer():
    teacher = eqx.nn.MLP(4, 3, 8, 1, key=jax.random.key(0))
    state = ntt.ntt_init(teacher, ntt.NTTConfig(density=0.5, num_steps=3), optax.adam(1e-3))
    x = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    found = ntt.KernelObserver(x)(state)
    trace = float(jnp.einsum("nnkk->", ntt.ntk(state.student, x)))
    assert found["trace"] == pytest.approx(trace, rel=1e-4)
    assert "alignment" not in found


def test_what_is_refused():
    x = np.ones((5, 4), np.float32)
    with pytest.raises(ValueError, match="num_eigenvalues"):
        ntt.KernelObserver(x, num_eigenvalues=0)
    with pytest.raises(ValueError, match="targets"):
        ntt.KernelObserver(x, np.full((5, 3), np.nan))
    model = eqx.nn.MLP(4, 3, 8, 1, key=jax.random.key(0))
    state = ntt.train_init(model, ntt.TrainConfig(), optax.adam(1e-3))
    with pytest.raises(ValueError, match=r"targets must be \[5, 3\]"):
        ntt.KernelObserver(x, np.ones((4, 3), np.float32))(state)
