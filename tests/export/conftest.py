"""Networks at 3 % with test images, as one would export them."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

import ntt_eqx as ntt

NETWORKS = {"lenet-300-100": ntt.models.LeNet300100, "lenet-5": ntt.models.LeNet5}


@pytest.fixture(scope="session")
def images():
    """32 standardised test images."""
    data = ntt.data.load_dataset("fashion-mnist-mini")
    return next(ntt.data.batches(data.test, 32, seed=0, mean=data.mean, std=data.std)).x


@pytest.fixture(scope="session")
def sparse_networks():
    """Both LeNets at 3 %; the biases are those of a trained network, not zero."""
    made = {}
    for name, kind in NETWORKS.items():
        model = kind(key=jax.random.key(0))
        made[name] = ntt.SparseModel(model, ntt.make_mask(ntt.scores.Magnitude()(model), 0.03))
    return made


@pytest.fixture(params=list(NETWORKS))
def network(request, sparse_networks):
    return sparse_networks[request.param]


@pytest.fixture
def small(getkey):
    """A sparse model in which a kept weight is exactly zero."""
    mlp = eqx.nn.MLP(4, 3, 8, depth=1, key=getkey())
    mlp = eqx.tree_at(lambda m: m.layers[0].weight, mlp, replace_fn=lambda w: w.at[2, 1].set(0.0))
    sparse = ntt.sparsify(mlp)
    keep = jax.random.bernoulli(getkey(), 0.4, (8, 4)).at[2, 1].set(True).at[5].set(False)
    mask = eqx.tree_at(lambda m: m.layers[0].weight, sparse.mask, keep)
    return sparse.with_mask(mask), jnp.ones((2, 4))
