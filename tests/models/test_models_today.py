"""VGG-11, ResNet-20 and the vision transformer: sizes, transformations, kernels and NTT steps."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

from ntt_eqx import NTTConfig, ntk, ntt_init, ntt_step, prunable_weights
from ntt_eqx.models import MODELS, VGG11, ResNet20, ViT, make_model

NAMES = ("vgg-11", "resnet-20", "vit")
SMALL = {
    "vgg-11": functools.partial(VGG11, width=8),
    "resnet-20": functools.partial(ResNet20, width=8),
    "vit": functools.partial(ViT, dim=8, depth=1, num_heads=2),
}
SHAPE = (1, 16, 16)


@pytest.fixture(scope="module")
def small():
    """Each architecture at a fraction of its size; numbers from NumPy, which compiles nothing."""
    rng = np.random.default_rng(0)

    def draw(leaf):
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        fan = max(1, leaf.size // leaf.shape[0])
        values = rng.normal(0 if leaf.ndim > 1 else 0.5, fan**-0.5, leaf.shape)
        return jnp.asarray(values, leaf.dtype)

    models = {name: eqx.filter_eval_shape(SMALL[name], SHAPE, 3, key=jr.key(0)) for name in NAMES}
    return {name: jax.tree.map(draw, model) for name, model in models.items()}


def shapes(tree):
    return [leaf.shape for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype")]


def count(tree):
    return sum(int(np.prod(shape)) for shape in shapes(tree))


def test_sizes(getkey):
    build = lambda name: eqx.filter_eval_shape(MODELS[name], key=getkey())
    assert count(build("resnet-20")) == 269_722  # He et al. (2016), with option A shortcuts
    channels = (3, 64, 128, 256, 256, 512, 512, 512, 512)
    weights = 9 * sum(i * o for i, o in zip(channels[:-1], channels[1:], strict=True))
    assert count(build("vgg-11")) == weights + 2 * sum(channels[1:]) + 512 * 10 + 10
    block = 4 * 64 + 64 * 3 * 64 + 3 * 64 + 64 * 64 + 64 + 2 * (64 * 128) + 128 + 64
    embedding = 48 * 64 + 64 + 64 * 64
    assert count(build("vit")) == embedding + 4 * block + 2 * 64 + 64 * 10 + 10


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape, num_classes", [((1, 28, 28), 100), ((3, 32, 32), 2)])
def test_any_image_shape_and_number_of_classes(name, shape, num_classes, getkey):
    def logits():
        return make_model(name, shape, num_classes, key=getkey())(jnp.ones(shape))

    found = jax.eval_shape(logits)
    assert found.shape == (num_classes,) and found.dtype == jnp.float32


@pytest.mark.parametrize("name", NAMES)
def test_goes_through_jit_vmap_and_grad(name, small, getkey):
    x = jr.normal(getkey(), (2, *SHAPE))

    @eqx.filter_jit
    @functools.partial(eqx.filter_value_and_grad, has_aux=True)
    def loss(model):
        logits = jax.vmap(model)(x)
        return jnp.sum(logits**2), (logits[0], model(x[0]))

    (_, (logits, alone)), gradient = loss(small[name])
    np.testing.assert_allclose(logits, alone, rtol=1e-4, atol=1e-5)
    assert logits.shape == (3,) and float(jnp.std(logits)) > 1e-3
    for leaf in jax.tree.leaves(gradient):
        assert bool(jnp.all(jnp.isfinite(leaf))) and bool(jnp.any(leaf != 0))


@pytest.mark.parametrize("name", NAMES)
def test_only_weights_of_layers_are_prunable(name, small):
    marks = jax.tree_util.tree_leaves_with_path(prunable_weights(small[name]))
    pruned = {jax.tree_util.keystr(path) for path, mark in marks if mark}
    assert all(path.endswith(".weight") and ".norm" not in path for path in pruned)
    assert len(pruned) == {"vgg-11": 9, "resnet-20": 20, "vit": 6}[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_kernel_by_factors_is_the_exact_one(name, small, getkey):
    x1, x2 = jr.normal(getkey(), (2, 1, *SHAPE))
    found = ntk(small[name], x1, x2)
    exact = ntk(small[name], x1, x2, implementation="jacobian")
    np.testing.assert_allclose(found, exact, rtol=2e-3, atol=1e-3 * float(jnp.max(jnp.abs(exact))))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_goes_through_an_ntt_step(name, small, getkey):
    config = NTTConfig(density=0.2, num_steps=2, mask_every=None)
    state = ntt_init(small[name], config, optax.adam(1e-3))
    before = jax.tree.leaves(state.student)
    state, metrics = eqx.filter_jit(ntt_step)(state, jr.normal(getkey(), (4, *SHAPE)))
    assert bool(jnp.isfinite(metrics.loss)) and float(metrics.density) < 0.21
    after = jax.tree.leaves(state.student)
    changed = [bool(jnp.any(a != b)) for a, b in zip(after, before, strict=True)]
    assert any(changed)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda key: VGG11((1, 15, 16), key=key), "VGG11: input_shape .* at least 16"),
        (lambda key: VGG11(width=4, key=key), "VGG11: width must be a multiple of 8, got 4"),
        (lambda key: ResNet20(width=12, key=key), "ResNet20: width must be a multiple of 8"),
        (lambda key: ViT((1, 30, 28), key=key), "ViT: patches of 4 must divide"),
        (lambda key: ViT(dim=30, key=key), "4 heads must divide dim 30"),
        (lambda key: ViT((28, 28), key=key), "ViT: input_shape must be"),
    ],
)
def test_impossible_sizes_are_refused(build, message, getkey):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(build, getkey())


@pytest.mark.parametrize("name", NAMES)
def test_inputs_of_another_shape_are_refused(name, small):
    with pytest.raises(ValueError, match=r"takes one sample of shape \(1, 16, 16\).*jax.vmap"):
        small[name](jnp.ones((2, *SHAPE)))
