"""Dtypes and degenerate points: no silent float64, all is finite, with x64 on and off."""

import contextlib

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.models import Dropping

import ntt_eqx as ntt
from ntt_eqx import scores
from ntt_eqx.data import Split, as_batch

ADAM = optax.adam(1e-2)
KEY = jax.random.key(0)
HALF = ntt.NTTConfig(0.5, num_steps=4, mask_every=1, kernel_weight=0.1)


def network(dtype=jnp.float32, activation="relu"):
    return Dropping((5, 4, 3), KEY, activation=activation, dtype=dtype)


def examples(dtype=jnp.float32):
    draw = np.random.default_rng(0)
    x = jnp.asarray(draw.normal(size=(4, 5)), dtype)
    return x, jnp.asarray([0, 1, 2, 0], jnp.int32)


def float_dtypes(tree):
    return {str(w.dtype) for w in jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array))}


def finite(tree):
    return all(bool(jnp.isfinite(w).all()) for w in jax.tree.leaves(tree))


@pytest.fixture(params=[False, True], ids=["x64 off", "x64 on"])
def wide(request):
    with jax.enable_x64(True) if request.param else contextlib.nullcontext():
        yield request.param


DTYPES = {  # of the model -> of kernels, losses and scores
    "bfloat16": "float32",
    "float16": "float32",
    "float32": "float32",
    "float64": "float64",
}


# Dtypes


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_transfer_keeps_the_dtype_of_the_model(dtype, wide):
    x, _ = examples(dtype)
    state = ntt.ntt_init(network(dtype), HALF, ADAM)
    state, metrics = eqx.filter_jit(ntt.ntt_step)(state, x)
    assert float_dtypes((state.teacher, state.student)) == {dtype}
    assert float_dtypes(metrics) == {"float32"} and finite(metrics.loss)
    assert state.step.dtype == jnp.int32
    assert not float_dtypes(state) & {"float64"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_training_keeps_the_dtype_of_the_model(dtype, wide):
    state = ntt.train_init(network(dtype), ntt.TrainConfig(1e-3), ADAM, key=KEY)
    state, metrics = eqx.filter_jit(ntt.train_step)(state, examples(dtype))
    assert float_dtypes(state.model) == {dtype}
    assert float_dtypes(metrics) == {"float32"} and finite(metrics)
    assert not float_dtypes(state) & {"float64"}
    found = ntt.evaluate(state.model, examples(dtype))
    assert np.isfinite(found["loss"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("implementation", ["factors", "jacobian"])
def test_kernels_are_wide_enough_and_no_wider(dtype, implementation, x64):
    model, (x, _) = eqx.nn.inference_mode(ntt.sparsify(network(dtype))), examples(dtype)
    theta = ntt.ntk(model, x[:2], implementation=implementation)
    assert theta.dtype == DTYPES[dtype] and finite(theta)


def test_kernels_without_x64_are_float32():
    for dtype in ("bfloat16", "float32"):
        model = eqx.nn.inference_mode(network(dtype))
        assert ntt.ntk(model, examples(dtype)[0][:2]).dtype == jnp.float32


SCORES = {
    "magnitude": scores.Magnitude(),
    "random": scores.Random(KEY),
    "logit_snip": scores.LogitSnip(),
    "snip": scores.Snip(),
    "synflow": scores.SynFlow(),
    "path_exclusion": scores.PathExclusion(),
    "wanda": scores.Wanda(),
    "weighted_random": scores.WeightedRandom(KEY),
}


@pytest.mark.parametrize("name", SCORES)
def test_scores_of_float32_models_are_float32(name, x64):
    batch = examples()
    seen = batch if isinstance(SCORES[name], scores.AbstractSupervisedScore) else batch[0]
    found = SCORES[name](network(), seen)
    assert float_dtypes(found) == {"float32"}
    sparse = ntt.sparsify(network()).with_mask(ntt.make_mask(found, 0.5))
    assert sparse.density().dtype == jnp.float32
    assert float_dtypes(ntt.rescale_by_density(sparse)) == {"float32"}
    assert float_dtypes(ntt.reinitialise(sparse, KEY)) == {"float32"}


def test_data_and_sketches_are_float32(x64):
    split = Split(np.random.default_rng(0).normal(size=(4, 3)), np.zeros(4, np.int32))
    assert split.x.dtype == np.float64
    batch = as_batch(split)
    assert (batch.x.dtype, batch.y.dtype) == (jnp.float32, jnp.int32)
    assert {d.dtype for d in ntt.sketch_directions(KEY, 2, 3)} == {jnp.dtype("float32")}


def test_float64_inputs_are_not_computed_with_in_silence(x64):
    """Under the default promotion the whole model would turn to float64."""
    model, (x, y) = network(), examples(jnp.float64)
    state = ntt.ntt_init(model, HALF, ADAM)
    message = "the inputs are float64, but the model's weights are float32; cast one of them"
    with jax.numpy_dtype_promotion("standard"):
        for call in (
            lambda: ntt.ntk(model, x),
            lambda: ntt.ntk(model, x, implementation="jacobian"),
            lambda: ntt.transfer(state, [x]),
            lambda: ntt.train(model, [(x, y)], ADAM, num_steps=1),
            lambda: ntt.evaluate(model, (x, y)),
            lambda: scores.LogitSnip()(model, x),
        ):
            with pytest.raises(ValueError, match=message):
                call()


def test_bfloat16_kernels_lose_no_more_than_their_inputs():
    """The sums are taken in float32: the error is that of rounding weights and inputs, not more."""
    short, (x, _) = eqx.nn.inference_mode(network("bfloat16", "tanh")), examples("bfloat16")
    exact = jax.tree.map(lambda w: w.astype(jnp.float32) if eqx.is_inexact_array(w) else w, short)
    theta = np.asarray(ntt.ntk(short, x))
    expected = np.asarray(ntt.ntk(exact, x.astype(jnp.float32)))
    assert np.abs(theta - expected).max() < 0.03 * np.abs(expected).max()


# Degenerate points


def sparse_net(activation="relu", keep=None):
    net = network(activation=activation)
    if keep is None:
        return ntt.sparsify(net).with_mask(ntt.make_mask(scores.Random(KEY)(net), 0.5))
    full = ntt.sparsify(net)
    return full.with_mask(jax.tree.map(lambda m: jnp.full_like(m, keep), full.mask))


def dead(student):
    """No unit of the first layer fires, whatever the input."""
    return eqx.tree_at(lambda s: s.model.first.bias, student, jnp.full(4, -100.0))


def at_zero(student):
    return jax.tree.map(lambda w: jnp.zeros_like(w) if eqx.is_inexact_array(w) else w, student)


POINTS = {
    "a kink in every unit": lambda: (at_zero(sparse_net()), examples()[0]),
    "zero inputs": lambda: (sparse_net(), jnp.zeros((4, 5))),
    "zero inputs and no biases": lambda: (at_zero(sparse_net()), jnp.zeros((4, 5))),
    "dead units": lambda: (dead(sparse_net()), examples()[0]),
    "an empty mask": lambda: (sparse_net(keep=False), examples()[0]),
    "an empty mask and zero inputs": lambda: (sparse_net(keep=False), jnp.zeros((4, 5))),
    "one sample four times": lambda: (sparse_net(), jnp.ones((4, 5))),
    "large inputs": lambda: (sparse_net(), 1e4 * examples()[0]),
    "tiny inputs": lambda: (sparse_net(), 1e-30 * examples()[0]),
}


@eqx.filter_jit
def loss_and_slopes(student, teacher, x, config):
    params, static = eqx.partition(student, eqx.is_inexact_array)
    loss = lambda params: ntt.ntt_loss(eqx.combine(params, static), teacher, x, config)[0]
    return jax.value_and_grad(loss)(params)


@pytest.mark.parametrize("kernel", ["active", "ambient"])
@pytest.mark.parametrize("name", POINTS)
def test_the_transfer_loss_and_its_gradient_are_finite(name, kernel):
    student, x = POINTS[name]()
    loss, slopes = loss_and_slopes(student, network(), x, ntt.NTTConfig(0.5, kernel=kernel))
    assert finite(loss) and finite(slopes)
    for m, g in zip(jax.tree.leaves(student.mask), slopes_of_weights(slopes), strict=True):
        assert np.all(np.asarray(g)[~np.asarray(m)] == 0.0)


def slopes_of_weights(slopes):
    return slopes.model.first.weight, slopes.model.second.weight


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "gelu"])
def test_activations_at_their_kinks(activation):
    student = at_zero(sparse_net(activation))
    loss, slopes = loss_and_slopes(student, network(activation=activation), examples()[0], HALF)
    assert finite(loss) and finite(slopes)


@pytest.mark.parametrize("name", POINTS)
def test_supervised_gradients_are_finite(name):
    student, x = POINTS[name]()
    state = ntt.train_init(student, ntt.TrainConfig(1e-3), optax.sgd(0.1))
    state, metrics = eqx.filter_jit(ntt.train_step)(state, (x, examples()[1]))
    assert finite(metrics) and finite(eqx.filter(state.model, eqx.is_inexact_array))


def test_a_run_from_an_empty_mask_goes_on():
    """With nothing kept there is no gradient for weights, and no refresh that could keep that."""
    net = network()
    nothing = jax.tree.map(jnp.zeros_like, ntt.sparsify(net).mask)
    with pytest.raises(ValueError, match="the given mask keeps no weight of layer"):
        ntt.ntt_init(net, ntt.NTTConfig(0.5, mask_every=2), ADAM, mask=nothing)
    state = ntt.ntt_init(net, ntt.NTTConfig(0.5, mask_every=None), ADAM, mask=nothing)
    for _ in range(2):
        state, metrics = eqx.filter_jit(ntt.ntt_step)(state, examples()[0])
        assert finite(metrics.loss)
    assert float(state.student.density()) == 0.0


def test_rescaling_and_densities_of_an_empty_layer():
    empty = sparse_net(keep=False)
    assert float(empty.density()) == 0.0
    assert eqx.tree_equal(ntt.rescale_by_density(empty), empty)
