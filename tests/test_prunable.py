"""What is pruned and what is not is said: in a table, and in a warning where nobody chose."""

import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest
from helpers.tiers import FAMILIES, default_only

import ntt_eqx as ntt
from ntt_eqx.models import MODELS, make_model


class Spline(eqx.Module):
    """A layer whose weights have names of their own."""

    layer: eqx.nn.Linear
    norm: eqx.nn.LayerNorm
    conv: eqx.nn.Conv2d
    spline_weight: jax.Array
    A: jax.Array
    positions: jax.Array
    gain: jax.Array

    def __init__(self, key):
        self.layer = eqx.nn.Linear(4, 3, key=key)
        self.norm = eqx.nn.LayerNorm((3, 2))
        self.conv = eqx.nn.Conv2d(1, 2, 2, key=key)
        self.spline_weight = jnp.linspace(1.0, 2.0, 24).reshape(3, 4, 2)
        self.A = jnp.linspace(1.0, 2.0, 9).reshape(3, 3)
        self.positions = jnp.linspace(1.0, 2.0, 12).reshape(4, 3)
        self.gain = jnp.linspace(1.0, 2.0, 3).reshape(3, 1)

    def __call__(self, x):
        return self.A @ self.layer(x)


@pytest.fixture
def model(getkey):
    return Spline(getkey())


def test_every_array_is_listed_once(model):
    found = ntt.describe_prunable(model)
    assert found.pruned == {".layer.weight": (3, 4), ".conv.weight": (2, 1, 2, 2)}
    assert found.left_out == {".spline_weight": (3, 4, 2), ".A": (3, 3)}
    assert found.kept.keys() == {
        ".layer.bias", ".norm.weight", ".norm.bias", ".conv.bias", ".positions", ".gain"
    }  # fmt: skip
    rows = {tuple(line.split(maxsplit=2)) for line in str(found).splitlines()}
    assert (".A", "3x3", "left out") in rows and (".gain", "3x1", "kept dense") in rows
    chosen = ntt.describe_prunable(model, lambda path, owner, leaf: path == ".A")
    assert chosen.pruned == {".A": (3, 3)} and ".layer.weight" in chosen.left_out
    sparse = ntt.sparsify(model, lambda path, owner, leaf: path == ".A")
    assert ntt.describe_prunable(sparse) == chosen


def test_arrays_that_nobody_chose_to_leave_out_are_named_once(model):
    from ntt_eqx import _prunable

    _prunable._SEEN.clear()
    config = ntt.NTTConfig(0.5, num_steps=1)
    with pytest.warns(ntt.LeftOutWarning, match=r"Spline: \.spline_weight, \.A are left.*where="):
        ntt.ntt_init(model, config, optax.sgd(0.1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ntt.sparsify(model)  # said
        _prunable._SEEN.clear()
        matrices = lambda path, owner, leaf: leaf.ndim >= 2 and ".norm" not in path
        ntt.ntt_init(model, config, optax.sgd(0.1), where=matrices)
        ntt.sparsify(ntt.sparsify(model, lambda path, owner, leaf: path == ".A"))


@pytest.mark.parametrize("name", default_only(sorted(MODELS), *FAMILIES))
def test_the_models_of_the_library_need_no_choice(name):
    model = make_model(name, (3, 32, 32), 10, key=jax.random.key(0))
    assert ntt.describe_prunable(model).left_out == {}
