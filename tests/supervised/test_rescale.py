"""Weights divided by the root of their layer's density."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from ntt_eqx import SparseModel, rescale_by_density


def test_rescale_divides_by_the_root_of_each_density(sparse):
    rescaled = rescale_by_density(sparse)
    assert eqx.tree_equal(rescaled.mask, sparse.mask)
    for layer in ("first", "second"):
        kept = np.asarray(getattr(sparse.mask, layer).weight)
        before = np.asarray(getattr(sparse.to_dense(), layer).weight)
        after = np.asarray(getattr(rescaled.to_dense(), layer).weight)
        np.testing.assert_allclose(after, before / np.sqrt(kept.mean()), rtol=1e-6)
        np.testing.assert_array_equal(
            getattr(rescaled.model, layer).bias, getattr(sparse.model, layer).bias
        )


def test_rescale_leaves_an_empty_layer_alone(sparse):
    mask = eqx.tree_at(lambda m: m.first.weight, sparse.mask, jnp.zeros((16, 6), bool))
    rescaled = rescale_by_density(SparseModel(sparse.model, mask))
    np.testing.assert_array_equal(rescaled.model.first.weight, sparse.model.first.weight)
