"""The three published architectures: sizes, initialisation, dropout, and transformations."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import ntt_eqx as ntt
from ntt_eqx.models import (
    MODELS,
    VGG11,
    Conv4,
    Conv6,
    LeNet5,
    LeNet300100,
    Perceptron,
    ResNet18,
    ResNet20,
    glorot_init,
    make_model,
)
from ntt_eqx.models._conv4 import _dropout

GREY, COLOUR, SMALL = (1, 28, 28), (3, 32, 32), (1, 16, 16)


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype"))


def test_parameter_counts_are_the_published_ones(getkey):
    shapes = lambda model: eqx.filter_eval_shape(model, key=getkey())
    assert count(shapes(LeNet300100)) == 266_610
    assert count(shapes(LeNet5)) == 431_080
    assert shapes(LeNet5).hidden.weight.shape == (500, 800)
    conv4 = shapes(Conv4)
    assert conv4.hidden.weight.shape == (512, 3200)
    convolutions = 9 * (3 * 64 + 64 * 64 + 64 * 128 + 128 * 128)
    biases = 64 + 64 + 128 + 128 + 512 + 10
    assert count(conv4) == convolutions + 3200 * 512 + 512 * 10 + biases
    weights = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree) if leaf.ndim in (2, 4))
    conv6 = eqx.filter(shapes(Conv6), lambda leaf: hasattr(leaf, "ndim"))
    assert (weights(conv6), weights(conv6.convs)) == (2_261_184, 1_144_512)  # "2.3M / 1.1M"
    wide = shapes(Perceptron)
    assert count(wide) == 784 * 1568 + 2 * 1568**2 + 1568 * 10 + 3 * 1568 + 10 == 6_166_954


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("resnet-20-bn", 269_722),  # He et al. (2016): 0.27M
        ("resnet-32-bn", 464_154),  # He et al. (2016): 0.46M
        ("resnet-18-bn", 11_173_962),  # the usual form for CIFAR-10: 11.17M
        ("vgg-16-bn", 14_724_042),  # with batch norm, one dense layer: 14.72M
        ("vgg-19-bn", 20_035_018),  # GraSP, after Liu et al. (2019): 20.04M
    ],
)
def test_networks_with_batch_norm_have_the_published_number_of_parameters(name, published, getkey):
    model = eqx.filter_eval_shape(MODELS[name], (3, 32, 32), 10, key=getkey())
    assert count(model.model) == published
    logits, _ = eqx.filter_eval_shape(ntt.forward, model, jnp.ones((2, 3, 32, 32)))
    assert logits.shape == (2, 10)


def test_the_shortcuts_of_resnet_18_are_three_convolutions(getkey):
    model = eqx.filter_eval_shape(ResNet18, key=getkey())
    shapes = [b.shortcut.weight.shape for b in model.blocks if b.shortcut is not None]
    assert shapes == [(128, 64, 1, 1), (256, 128, 1, 1), (512, 256, 1, 1)]
    small = ResNet18((1, 8, 8), 3, width=8, key=getkey())
    assert jnp.all(jnp.isfinite(small(jnp.ones((1, 8, 8)))))


@pytest.mark.parametrize(
    "name",
    [
        *("lenet-300-100", "lenet-5", "conv-4", "conv-4-dropout", "conv-6", "mlp-1568"),
        *("vgg-16", "vgg-19", "resnet-32", "resnet-18"),
    ],
)
@pytest.mark.parametrize("shape", [GREY, COLOUR])
@pytest.mark.parametrize("num_classes", [2, 100])
def test_any_image_shape_and_number_of_classes(name, shape, num_classes, getkey):
    def logits():
        return make_model(name, shape, num_classes, key=getkey())(jnp.ones(shape))

    logits = jax.eval_shape(logits)
    assert logits.shape == (num_classes,)
    assert logits.dtype == jnp.float32


@pytest.mark.parametrize("name", ["lenet-300-100", "lenet-5"])
def test_goes_through_jit_vmap_and_grad(name, getkey):
    model = make_model(name, SMALL, 3, key=getkey())
    x = jr.normal(getkey(), (2, *SMALL))

    @eqx.filter_jit
    @functools.partial(eqx.filter_value_and_grad, has_aux=True)
    def loss(model):
        logits = jax.vmap(model)(x)
        return jnp.sum(logits**2), (logits[0], model(x[0]))

    (_, (logits, alone)), gradient = loss(model)
    np.testing.assert_allclose(logits, alone, rtol=1e-4, atol=1e-5)
    assert all(bool(jnp.any(g != 0)) for g in jax.tree.leaves(gradient))


@pytest.mark.parametrize("model", [LeNet300100, LeNet5, Conv4])
def test_weights_are_glorot_normal_and_biases_small(model, getkey):
    layers = [
        node
        for node in jax.tree.leaves(
            model(key=getkey()), is_leaf=lambda n: isinstance(n, eqx.nn.Linear | eqx.nn.Conv)
        )
        if isinstance(node, eqx.nn.Linear | eqx.nn.Conv)
    ]
    assert len(layers) == {LeNet300100: 3, LeNet5: 4, Conv4: 6}[model]
    for layer in layers:
        out, into, *window = layer.weight.shape
        field = int(np.prod(window))
        std = np.sqrt(2 / (field * (into + out)))
        n = layer.weight.size
        # the standard error of a standard deviation is std / sqrt(2 n)
        assert abs(float(jnp.std(layer.weight)) - std) < 5 * std / np.sqrt(2 * n)
        assert abs(float(jnp.mean(layer.weight))) < 5 * std / np.sqrt(n)
        # 0.01 within five standard errors, and not all the same
        spread = float(jnp.sqrt(jnp.mean(layer.bias**2)))
        assert 0 < spread and abs(spread - 0.01) < 5 * 0.01 / np.sqrt(2 * layer.bias.size)


@pytest.mark.parametrize("model", [ResNet20, VGG11])
def test_weights_are_he_normal_and_biases_zero(model, getkey):
    is_layer = lambda n: isinstance(n, eqx.nn.Linear | eqx.nn.Conv)
    layers = filter(is_layer, jax.tree.leaves(model(key=getkey()), is_leaf=is_layer))
    spreads, farthest = [], []
    for layer in layers:
        std = np.sqrt(2 / np.prod(layer.weight.shape[1:]))
        assert abs(float(jnp.mean(layer.weight))) < 5 * std / np.sqrt(layer.weight.size)
        spreads.append(float(jnp.std(layer.weight)) / std * np.ones(layer.weight.size))
        farthest.append(float(jnp.max(jnp.abs(layer.weight))) / std)
        assert layer.bias is None or not np.any(layer.bias)
    spreads = np.concatenate(spreads)
    assert abs(spreads.mean() - 1) < 5 / np.sqrt(2 * spreads.size)
    assert max(farthest) > 3  # nothing is cut off


def test_layers_and_keys_draw_different_numbers(getkey):
    key = getkey()
    one, same, other = LeNet300100(key=key), LeNet300100(key=key), LeNet300100(key=getkey())
    assert eqx.tree_equal(one, same)
    assert not np.array_equal(one.hidden1.weight, other.hidden1.weight)
    assert not np.array_equal(one.hidden1.bias, other.hidden1.bias)
    stack = eqx.nn.MLP(4, 4, 4, 2, key=key)
    drawn = glorot_init(stack, key=key)
    assert not np.array_equal(drawn.layers[0].weight, drawn.layers[1].weight)


def test_glorot_init_keeps_other_leaves_and_dtypes(getkey):
    model = (
        eqx.nn.Linear(4, 3, use_bias=False, key=getkey(), dtype=jnp.bfloat16),
        eqx.nn.LayerNorm(3),
        eqx.nn.Embedding(5, 3, key=getkey()),
        "label",
    )
    drawn = glorot_init(model, key=getkey())
    assert drawn[0].weight.dtype == jnp.bfloat16
    assert not np.array_equal(drawn[0].weight, model[0].weight)
    assert eqx.tree_equal(drawn[1:], model[1:])


def test_glorot_init_follows_x64(x64):
    drawn = glorot_init(eqx.nn.Linear(50, 80, key=jr.key(0)), key=jr.key(1))
    assert drawn.weight.dtype == drawn.bias.dtype == np.float64
    assert np.any(np.asarray(drawn.weight) != np.asarray(drawn.weight, np.float32))
    assert LeNet300100((4,), 2, key=jr.key(0)).output.weight.dtype == np.float64


def test_glorot_init_goes_through_vmap_and_eval_shape(getkey):
    keys = jr.split(getkey(), 3)
    ensemble = eqx.filter_vmap(lambda key: LeNet300100((4,), 2, key=key))(keys)
    assert ensemble.hidden1.weight.shape == (3, 300, 4)
    one = LeNet300100((4,), 2, key=keys[1])
    np.testing.assert_allclose(ensemble.hidden1.weight[1], one.hidden1.weight, rtol=1e-5)


def test_dropout_needs_a_key_only_when_training(getkey):
    key = getkey()
    plain, dropping = Conv4(SMALL, key=key), Conv4(SMALL, dropout=True, key=key)
    x = jr.normal(getkey(), SMALL)
    call = eqx.filter_jit(lambda model, x, key: model(x, key=key))
    without = call(plain, x, None)
    np.testing.assert_array_equal(without, call(dropping, x, None))
    np.testing.assert_array_equal(without, call(plain, x, key))
    once, again, other = (call(dropping, x, k) for k in (key, key, getkey()))
    np.testing.assert_array_equal(once, again)
    assert not np.array_equal(once, other) and not np.array_equal(once, without)


def test_dropout_keeps_the_published_share_and_the_mean(getkey):
    assert Conv4(SMALL, dropout=True, key=getkey()).keep == (0.75, 0.75, 0.5)
    for keep in (0.75, 0.5):
        h = _dropout(jnp.ones(20_000), keep, getkey())
        assert abs(float(jnp.mean(h != 0)) - keep) < 0.02
        assert abs(float(jnp.mean(h)) - 1) < 0.03


@pytest.mark.parametrize("dropout", [(0.5, 0.5), (0.0, 0.5, 0.5), (0.5, 0.5, 1.5)])
def test_impossible_dropout_is_refused(dropout, getkey):
    with pytest.raises((ValueError, TypeError), match="dropout"):
        Conv4(dropout=dropout, key=getkey())


def test_inputs_of_another_shape_are_refused(getkey):
    model = LeNet300100(key=getkey())
    with pytest.raises(ValueError, match=r"takes one sample of shape \(1, 28, 28\).*jax.vmap"):
        model(jnp.ones((7, 1, 28, 28)))
    with pytest.raises(ValueError, match=r"got \(784,\)\.$"):
        model(jnp.ones(784))


@pytest.mark.parametrize("name", ["lenet-5", "conv-4"])
@pytest.mark.parametrize("shape", [(1, 15, 28), (28, 28), (0, 28, 28)])
def test_impossible_input_shapes_are_refused(name, shape, getkey):
    with pytest.raises(ValueError, match="input_shape"):
        make_model(name, shape, 10, key=getkey())
    jax.eval_shape(lambda: make_model(name, (1, 16, 16), 10, key=getkey())(jnp.ones((1, 16, 16))))


def test_an_unknown_model_lists_the_known_ones(getkey):
    with pytest.raises(ValueError, match="unknown model 'lenet'.*lenet-300-100"):
        make_model("lenet", GREY, 10, key=getkey())
    assert MODELS["lenet-5"] is LeNet5
