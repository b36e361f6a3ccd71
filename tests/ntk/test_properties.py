"""Random models, batches, masks and options: the kernel and its gradient are the oracle's.

The default run takes few models, because every one is compiled; `-m slow` takes many. Many masks
through one compiled model cost little, and are taken by the hundred.
"""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from helpers.comparison import random_mask, relative_error, weighted_sum
from helpers.support import known
from helpers.tiers import drawn
from hypothesis import HealthCheck, given, settings, strategies as st
from pytest import mark

import ntt_eqx as ntt
from ntt_eqx._ntk import MaskIndex, index_concrete, kernel_spec, outputs_and_ntk
from ntt_eqx.kernels import gather_rows

pytestmark = mark.usefixtures("gathers")

TOLERANCE = {"float32": 1e-5, "float64": 1e-10}
ACTIVATIONS = {"tanh": jnp.tanh, "relu": jax.nn.relu, "sin": jnp.sin}

quiet = settings(
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


class Stack(eqx.Module):
    """Layers with an activation in between; dense ones may run along a sequence."""

    layers: list
    head: eqx.nn.Linear
    activation: str = eqx.field(static=True)

    def __call__(self, x):
        for layer in self.layers:
            dense = isinstance(layer, eqx.nn.Linear)
            x = jax.vmap(layer)(x) if dense and x.ndim == 2 else layer(x)
            x = ACTIVATIONS[self.activation](x)
        return self.head(x.reshape(-1))


@st.composite
def dense_models(draw):
    """Build `(dtype, key) -> Stack` and the shape of its samples."""
    widths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    biases = draw(st.lists(st.booleans(), min_size=3, max_size=3))
    length = draw(st.sampled_from([None, None, 1, 3]))
    outputs, activation = draw(st.integers(1, 4)), draw(st.sampled_from(sorted(ACTIVATIONS)))

    def build(dtype, key):
        keys = jax.random.split(key, len(widths))
        layers = [
            eqx.nn.Linear(i, o, use_bias=b, dtype=dtype, key=k)
            for i, o, b, k in zip(widths[:-1], widths[1:], biases, keys, strict=False)
        ]
        last = widths[-1] * (length or 1)
        head = eqx.nn.Linear(last, outputs, use_bias=biases[2], dtype=dtype, key=keys[-1])
        return Stack(layers, head, activation)

    return build, (widths[0],) if length is None else (length, widths[0])


@st.composite
def convolutional_models(draw):
    """One or two convolutions of 1 to 3 dimensions."""
    ndim = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 1, 2]))
    channels = groups * draw(st.integers(1, 2))
    size, options, spatial, inputs = draw(st.integers(3, 5)), [], [], channels
    spatial = [size] * ndim
    for _ in range(draw(st.integers(1, 2))):
        kernel = draw(st.integers(1, 2))
        o = dict(
            kernel_size=kernel,
            stride=draw(st.integers(1, 2)),
            padding=draw(st.integers(0, 1)),
            dilation=draw(st.integers(1, 2)),
            groups=groups,
            use_bias=draw(st.booleans()),
        )
        after = [
            (n + 2 * o["padding"] - o["dilation"] * (kernel - 1) - 1) // o["stride"] + 1
            for n in spatial
        ]
        if min(after) < 1:
            break
        features = groups * draw(st.integers(1, 2))
        options.append((inputs, features, o))
        inputs, spatial = features, after
    outputs, activation = draw(st.integers(1, 3)), draw(st.sampled_from(sorted(ACTIVATIONS)))

    def build(dtype, key):
        keys = jax.random.split(key, len(options) + 1)
        layers = [
            eqx.nn.Conv(ndim, i, f, dtype=dtype, key=k, **o)
            for (i, f, o), k in zip(options, keys, strict=False)
        ]
        head = eqx.nn.Linear(inputs * int(np.prod(spatial)), outputs, dtype=dtype, key=keys[-1])
        return Stack(layers, head, activation)

    return build, (channels, *[size] * ndim)


@st.composite
def cases(draw):
    build, shape = draw(st.one_of(dense_models(), convolutional_models()))
    return dict(
        build=build,
        shape=shape,
        n=draw(st.integers(1, 5)),
        m=draw(st.sampled_from([None, 1, 2, 3, 4])),
        dtype=draw(st.sampled_from(sorted(TOLERANCE))),
        density=draw(st.one_of(st.sampled_from([0.0, 0.05, 0.12, 1.0]), st.floats(0, 1))),
        gathered=draw(st.booleans()),
        metric=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
        options=dict(
            kernel=draw(st.sampled_from(["active", "active", "ambient"])),
            outputs=draw(st.sampled_from(["full", "diagonal", "trace"])),
            max_bytes=draw(st.sampled_from([None, 1, 777, 4001, 2**20])),
        ),
    )


def check_case(case):
    with jax.enable_x64(True):
        _check_case(**case)


def _check_case(build, shape, n, m, dtype, density, gathered, metric, seed, options):
    rng = np.random.default_rng(seed)
    sparse = ntt.sparsify(build(jnp.dtype(dtype), jax.random.key(seed)))
    mask = random_mask(sparse.mask, density, seed)
    x1 = jnp.asarray(rng.normal(size=(n, *shape)), dtype)
    x2 = None if m is None else jnp.asarray(rng.normal(size=(m, *shape)), dtype)
    params, static = eqx.partition(sparse, eqx.is_inexact_array)
    c = None
    if metric:  # learning rates, some of them zero
        rate = lambda w: jnp.asarray(
            rng.uniform(0, 2, w.shape) * (rng.random(w.shape) < 0.8), dtype
        )
        c = jax.tree.map(rate, eqx.filter(sparse.model, eqx.is_inexact_array))

    def kernel(params, mask, x1, x2, c, implementation):
        model = eqx.combine(params, static).with_mask(mask)
        chosen = dict(options, max_bytes=None) if implementation else options
        theta = ntt.ntk(model, x1, x2, metric=c, implementation=implementation, **chosen)
        return weighted_sum(theta), theta

    both = jax.value_and_grad(kernel, has_aux=True)
    constant = mask if gathered else None  # a constant mask's few entries are gathered

    @jax.jit
    def run(params, mask, x1, x2, c):
        wide = lambda tree: jax.tree.map(
            lambda a: a.astype(jnp.float64) if eqx.is_inexact_array(a) else a, tree
        )
        ours = both(params, mask if constant is None else constant, x1, x2, c, None)
        oracle = both(wide(params), mask, wide(x1), wide(x2), wide(c), "jacobian")
        return ours, oracle

    ((_, theta), gradient), ((_, expected), slope) = run(params, mask, x1, x2, c)
    assert theta.dtype == jnp.dtype(dtype) and expected.dtype == jnp.float64
    assert relative_error(theta, expected) < TOLERANCE[dtype]
    assert relative_error(gradient, slope) < TOLERANCE[dtype]


@settings(quiet, max_examples=4)
@given(case=cases())
def test_any_case(case):
    check_case(case)


@mark.slow
@settings(quiet, max_examples=drawn(25))
@given(case=cases())
def test_many_cases(case):
    check_case(case)


@functools.cache
def compiled(kind, gathered):
    """A model, its samples, and the kernel and gradient of any mask of it, by us and the oracle."""
    key, data = jax.random.split(jax.random.key(5))
    if kind == "dense":
        keys = jax.random.split(key, 2)
        layers = [eqx.nn.Linear(20, 9, key=keys[0])]
        model = Stack(layers, eqx.nn.Linear(9, 3, key=keys[1]), "tanh")
        x = jax.random.normal(data, (6, 20))
    else:
        keys = jax.random.split(key, 2)
        groups = 2 if kind == "groups" else 1
        layers = [eqx.nn.Conv2d(2, 4, 3, padding=1, groups=groups, key=keys[0])]
        model = Stack(layers, eqx.nn.Linear(64, 2, key=keys[1]), "tanh")
        x = jax.random.normal(data, (6, 2, 4, 4))
    sparse = ntt.sparsify(model)
    params, static = eqx.partition(sparse, eqx.is_inexact_array)

    @jax.jit
    def run(params, mask, support, x):
        def ours(params):
            pruned = eqx.combine(params, static).with_mask(mask)
            index = support if gathered else None
            _, theta = outputs_and_ntk(kernel_spec(), pruned, x, index=index)
            return weighted_sum(theta), theta

        def oracle(params):
            pruned = eqx.combine(params, static).with_mask(mask)
            theta = ntt.ntk(pruned, x[:3], x[3:], implementation="jacobian")
            return weighted_sum(theta), theta

        both = functools.partial(jax.value_and_grad, has_aux=True)
        return both(ours)(params), both(oracle)(params)

    return sparse, params, x, run


def support_of(mask):
    """The index of a mask, with room for every mask of the weight: all have one shape."""
    rows = lambda m: gather_rows(np.asarray(m).reshape(len(m), -1), m.size)
    return jax.tree.map(lambda m: MaskIndex(rows(m)), mask)


def check_mask(kind, gathered, density, seed):
    with jax.enable_x64(True):
        sparse, params, x, run = compiled(kind, gathered)
        mask = random_mask(sparse.mask, density, seed)
        support = support_of(mask)
        ((_, theta), gradient), ((_, expected), slope) = run(params, mask, support, x)
        assert relative_error(theta, expected) < 1e-10
        assert relative_error(gradient, slope) < 1e-10


@mark.parametrize("kind", ["dense", "convolution", "groups"])
@mark.parametrize("gathered", [False, True])
@settings(quiet, max_examples=30)
@given(density=st.one_of(st.just(0.0), st.just(1.0), st.floats(0, 1)), seed=st.integers(0, 10**6))
def test_any_mask(kind, gathered, density, seed):
    check_mask(kind, gathered, density, seed)


def test_support_is_used_below_its_density_alone():
    with jax.enable_x64(True):
        sparse = compiled("dense", True)[0]
        few, many = random_mask(sparse.mask, 0.05), random_mask(sparse.mask, 0.6)
        index = lambda mask: index_concrete(mask, kernel_spec().costs)
        assert len(known(index(few))) == len(jax.tree.leaves(few))
        assert jax.tree.leaves(index(many)) == []
