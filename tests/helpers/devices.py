"""Models, batches, meshes and comparisons of these tests, in float64."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

import ntt_eqx as ntt


class MLP(eqx.Module):
    layers: list[eqx.nn.Linear]

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        sizes = (12, 20, 15, 4)
        self.layers = [
            eqx.nn.Linear(i, o, key=k) for i, o, k in zip(sizes, sizes[1:], keys, strict=False)
        ]

    def __call__(self, x):
        for layer in self.layers[:-1]:
            x = jax.nn.tanh(layer(x))
        return self.layers[-1](x)


class CNN(eqx.Module):
    conv: eqx.nn.Conv2d
    norm: eqx.nn.LayerNorm
    out: eqx.nn.Linear

    def __init__(self, key):
        one, two = jax.random.split(key)
        self.conv = eqx.nn.Conv2d(2, 4, 3, key=one)
        self.norm = eqx.nn.LayerNorm(64)
        self.out = eqx.nn.Linear(64, 3, key=two)

    def __call__(self, x):
        return self.out(self.norm(jax.nn.relu(self.conv(x)).reshape(-1)))


MODELS = {"mlp": (MLP, (12,)), "cnn": (CNN, (2, 6, 6))}


def model_and_samples(name, *sizes, density=None):
    """A model, masked to a density if one is given, and batches of these sizes."""
    kind, shape = MODELS[name]
    model = kind(jax.random.key(0))
    if density is not None:
        model = ntt.prune(model, ntt.scores.Magnitude(), density)
    rng = np.random.default_rng(1)
    return model, *(jnp.asarray(rng.normal(size=(size, *shape))) for size in sizes)


def mesh_of(shape, names, kind=AxisType.Auto):
    """The first devices as a mesh."""
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return Mesh(devices, names, axis_types=(kind,) * len(names))


def close(one, two, rtol=1e-12):
    """Equal up to `rtol` of the largest entry."""
    scale = float(np.max(np.abs(two))) or 1.0
    np.testing.assert_allclose(np.asarray(one), np.asarray(two), rtol=0, atol=rtol * scale)
