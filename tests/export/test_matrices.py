"""Sparse arrays of JAX and SciPy, put to work by their own libraries."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ntt_eqx as ntt
from ntt_eqx.export import to_bcoo, to_csr


def test_bcoo_holds_every_kept_weight(network):
    arrays = to_bcoo(network)
    dense = network.to_dense()
    for name, array in arrays.items():
        weight = getattr(dense, name.split(".")[0]).weight
        assert array.shape == weight.shape and array.nse == round(0.03 * weight.size)
        np.testing.assert_array_equal(array.todense(), weight)


def test_csr_holds_every_kept_weight(network):
    matrices = to_csr(network)
    dense = network.to_dense()
    assert len(matrices) == len(jax.tree.leaves(network.mask))
    for name, matrix in matrices.items():
        weight = np.asarray(getattr(dense, name.split(".")[0]).weight)
        assert matrix.nnz == round(0.03 * weight.size) and matrix.has_sorted_indices
        np.testing.assert_array_equal(matrix.toarray(), weight.reshape(len(weight), -1))


def test_a_network_of_bcoo_weights_gives_the_same_logits(sparse_networks, images):
    sparse = sparse_networks["lenet-300-100"]
    arrays = to_bcoo(sparse)
    weights = lambda m: [m.hidden1.weight, m.hidden2.weight, m.output.weight]
    model = eqx.tree_at(weights, sparse.to_dense(), list(arrays.values()))
    run = eqx.filter_jit(lambda m, x: jax.vmap(m)(x))
    np.testing.assert_allclose(run(model, images), jax.vmap(sparse)(images), atol=1e-5)


def test_scipy_computes_the_same_logits(sparse_networks, images):
    sparse = sparse_networks["lenet-300-100"]
    csr, model = to_csr(sparse), sparse.model
    h = np.asarray(images).reshape(len(images), -1).T
    for name in ("hidden1", "hidden2", "output"):
        h = csr[f"{name}.weight"] @ h + np.asarray(getattr(model, name).bias)[:, None]
        h = h if name == "output" else np.maximum(h, 0)
    np.testing.assert_allclose(h.T, jax.vmap(sparse)(images), atol=1e-5)


def test_scipy_computes_the_same_convolution(sparse_networks, images):
    conv = sparse_networks["lenet-5"].to_dense().conv1
    matrix = to_csr(sparse_networks["lenet-5"])["conv1.weight"]
    image = np.asarray(images[0])
    windows = np.lib.stride_tricks.sliding_window_view(image, (1, 5, 5)).reshape(24 * 24, 25)
    found = (matrix @ windows.T).reshape(20, 24, 24) + np.asarray(conv.bias)
    np.testing.assert_allclose(found, conv(images[0]), atol=1e-5)


def test_entries_of_zero_and_empty_rows_are_kept_as_they_are(small):
    sparse, _ = small
    kept = int(sparse.mask.layers[0].weight.sum())
    assert to_bcoo(sparse)["layers.0.weight"].nse == kept
    csr = to_csr(sparse)["layers.0.weight"]
    assert csr.nnz == kept and csr[[5]].nnz == 0 and csr[[2]].nnz >= 1
    one = ntt.SparseModel(jnp.arange(3.0), jnp.array([True, False, True]))
    np.testing.assert_array_equal(to_csr(one)[""].toarray(), [[0, 0, 2]])


@pytest.mark.parametrize("function", [to_bcoo, to_csr])
def test_a_plain_model_is_refused(function, small):
    sparse, _ = small
    with pytest.raises(ValueError, match=f"^{function.__name__}: needs a SparseModel, got MLP"):
        function.__wrapped__(sparse.model)  # past the types of the tests
