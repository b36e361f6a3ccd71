"""What `explain` says of a model: which way each parameter takes, and its cost by hand."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ntt_eqx as ntt

pytestmark = pytest.mark.usefixtures("gathers")

X1, X2 = jnp.ones((2, 20)), jnp.ones((3, 20))


class Mixed(eqx.Module):
    """A layer, a matrix that no layer knows, and a scalar."""

    layer: eqx.nn.Linear
    bent: jax.Array
    scale: jax.Array

    def __init__(self):
        self.layer = eqx.nn.Linear(20, 4, key=jax.random.key(0))
        self.bent = jnp.ones((3, 4))
        self.scale = jnp.asarray(2.0)

    def __call__(self, x):
        return self.scale * (jnp.tanh(self.bent) @ jnp.tanh(self.layer(x)))


class Conv(eqx.Module):
    """A convolution at 25 positions, summed to few outputs."""

    conv: eqx.nn.Conv2d

    def __init__(self, use_bias=True):
        self.conv = eqx.nn.Conv2d(3, 4, 2, use_bias=use_bias, key=jax.random.key(0))

    def __call__(self, x):
        return jnp.tanh(self.conv(x)).sum(axis=(1, 2))[:2]


def linear():
    return eqx.nn.Linear(20, 4, key=jax.random.key(0))


def with_entries(model, count):
    """The model with that many weights of its only prunable matrix, at random places."""
    sparse = ntt.sparsify(model)
    (full,) = jax.tree.leaves(sparse.mask)
    kept = np.zeros(full.size, bool)
    kept[np.random.default_rng(0).permutation(full.size)[:count]] = True
    mask = jax.tree.map(lambda m: jnp.asarray(kept.reshape(m.shape)), sparse.mask)
    return sparse.with_mask(mask)


@pytest.mark.parametrize(
    ("model", "options", "expected"),
    [
        # u of 20 inputs for 2 x 3 pairs of samples, then 4 x 4 pairs of outputs of 4 features
        (linear(), {}, ("factors", 80, 2 * 6 * (20 + 16 * 4))),
        (linear(), {"outputs": "diagonal"}, ("factors", 80, 2 * 6 * (20 + 4 * 4))),
        (linear(), {"outputs": "trace"}, ("factors", 80, 2 * 6 * (20 + 4 * 4))),
        (with_entries(linear(), 8), {}, ("gathered factors", 8, 2 * 6 * (8 + 16 * 4))),
        (with_entries(linear(), 8), {"kernel": "ambient"}, ("factors", 80, 2 * 6 * (20 + 64))),
    ],
)
def test_a_dense_layer_by_hand(model, options, expected):
    found = ntt.explain(model, X1, X2, **options)
    assert (found.n, found.m, found.num_outputs) == (2, 3, 4)
    (cost,) = found.parameters
    assert (cost.path, cost.kept, cost.flops) == expected
    assert cost.name.endswith(".weight + .bias") and cost.shape == (4, 20)
    assert cost.layer_flops == 2 * 80
    ones = cost.path == "factors"  # a gathered metric adds the bias itself
    assert cost.bytes == (2 + 3) * (4 * 4 + 20 + ones) * 4  # cotangents, activations, float32
    assert found.slow == ()


def test_a_whole_mask_costs_what_all_weights_do():
    (cost,) = ntt.explain(with_entries(linear(), 40), X1, X2).parameters
    assert (cost.path, cost.flops) == ("factors", 2 * 6 * (80 + 16 * 4))


def test_one_batch_is_both():
    found = ntt.explain(linear(), X2)
    assert (found.n, found.m) == (3, 3)
    assert found.parameters[0].flops == 2 * 9 * (20 + 16 * 4)


@pytest.mark.parametrize(("outputs", "pairs"), [("full", 9), ("diagonal", 3)])
def test_what_no_layer_holds_takes_its_jacobian(outputs, pairs):
    found = ntt.explain(Mixed(), X1, X2, outputs=outputs)
    layer, bent, scale = found.parameters
    assert layer.path == "factors"
    assert (bent.name, bent.path, bent.kept) == (".bent", "jacobian", 12)
    assert bent.flops == 2 * 6 * pairs * 12 and bent.bytes == (2 + 3) * 3 * 12 * 4
    assert (scale.name, scale.path, scale.kept, scale.layer_flops) == (".scale", "jacobian", 1, 0)
    assert found.slow == (bent,)


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_at_many_positions(bias):
    x = jnp.ones((2, 3, 6, 6))
    (whole,) = ntt.explain(Conv(bias), x).parameters
    assert (whole.path, whole.kept, whole.shape) == ("tangents", 48, (4, 3, 2, 2))
    assert whole.layer_flops == 2 * 48 * 25
    (few,) = ntt.explain(with_entries(Conv(bias), 5), x).parameters
    assert (few.path, few.kept) == ("gathered tangents", 5)
    assert few.name.endswith(".conv.weight + .conv.bias" if bias else ".conv.weight")
    # A chunk of 16 for each row, one more for indices that fill up the support, and the biases.
    entries = 5 * 16 + (4 if bias else 0)
    assert few.flops == 2 * (2 + 2) * 2 * entries * 25 + 2 * 2 * 2 * 2 * 2 * entries
    assert few.bytes == (2 + 2) * 2 * entries * 4


def test_many_outputs_keep_factors_of_a_layer_at_many_positions():
    class Wide(Conv):
        def __call__(self, x):
            return self.conv(x).reshape(-1)

    x = jnp.ones((2, 3, 3, 3))  # 4 positions, 16 outputs
    (cost,) = ntt.explain(Wide(), x).parameters
    (ambient,) = ntt.explain(with_entries(Wide(), 24), x).parameters
    assert cost.path == ambient.path == "tangents" and cost.layer_flops == 2 * 48 * 4
    assert cost.flops >= 2 * 2 * 2 * 16 * 16 * 48


def test_the_table():
    lines = str(ntt.explain(Mixed(), X1, X2)).splitlines()
    assert lines[0] == "kernel between 2 and 3 samples, 3 outputs"
    assert lines[1].split() == ["parameter", "shape", "pruned", "kept", "path", "MFLOP", "MB"]
    assert set(lines[2]) == set(lines[-4]) == {"-"}
    assert lines[3].split() == [".layer.weight", "+", ".layer.bias", "4x20", "yes", "80", "factors",
                                "0.0", "0.00"]  # fmt: skip
    assert lines[5].split()[:5] == [".scale", "scalar", "no", "1", "jacobian"]
    assert lines[-3].split()[:2] == ["all", "93"]
    assert lines[-2] == "slow path (explicit Jacobian of a matrix): .bent"
    assert lines[-1] == "not pruned (choose by `where=` of sparsify or ntt_init): .bent"
    large = eqx.nn.Linear(1000, 50, key=jax.random.key(0))
    text = str(ntt.explain(large, jnp.ones((10, 1000)))).splitlines()
    row = [".weight", "+", ".bias", "50x1000", "yes", "50,000", "factors", "25.2", "0.28"]
    assert text[3].split() == row
    assert not text[-1].startswith("slow")
