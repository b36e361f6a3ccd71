"""The equivalents of primitives on CPU and GPU: XLA's own values and derivatives, of two orders."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.comparison import relative_error
from jax import lax
from jax.extend.core import jaxprs_in_params

from ntt_eqx import _primitives
from ntt_eqx._primitives import apply_primitive, in_memory, with_equivalents
from ntt_eqx_kernels import _blocks

pytestmark = [
    pytest.mark.usefixtures("x64"),
    pytest.mark.skipif(jax.default_backend() != "cpu", reason="the equivalents are for CPU"),
]


in_memory_here = functools.partial(in_memory, platform="cpu")


def applied(eqn, inputs):
    """On the device in use."""
    return apply_primitive(eqn, inputs, _primitives.target_device().platform)


def equation(function, *arrays):
    """The only equation of `function` under its name, and XLA's own version of it."""
    (eqn,) = jax.make_jaxpr(function)(*arrays).jaxpr.eqns
    return eqn


def derivatives(call, weights, *arrays, forwards=True):
    """Value, gradient, and the gradient's own derivative along a direction."""

    def loss(*arrays):
        y = call(*arrays)
        return jnp.sum(weights * (y + y**2)), y

    places = tuple(range(len(arrays)))
    first = lambda *arrays: jax.grad(lambda *a: loss(*a)[0], places)(*arrays)
    along = tuple(jnp.cos(jnp.arange(a.size, dtype=a.dtype)).reshape(a.shape) for a in arrays)
    curvature = jax.jvp(first, arrays, along)[1] if forwards else ()
    backwards = jax.grad(
        lambda *a: sum(jnp.vdot(g, v) for g, v in zip(first(*a), along, strict=True)), places
    )(*arrays)
    return loss(*arrays)[1], first(*arrays), curvature, backwards


def both(eqn, *arrays, **options):
    xla = lambda *a: eqn.primitive.bind(*a, **eqn.params)
    ours = lambda *a: applied(eqn, a)[0]
    weights = jnp.sin(1.0 + jnp.arange(eqn.outvars[0].aval.size, dtype=arrays[0].dtype))
    weights = weights.reshape(eqn.outvars[0].aval.shape)
    run = jax.jit(lambda *a: [derivatives(call, weights, *a, **options) for call in (ours, xla)])
    return run(*arrays)


def equations_of(function, *arguments):
    def inside(jaxpr):
        for eqn in jaxpr.eqns:
            yield eqn
            for called in jaxprs_in_params(eqn.params):
                yield from inside(called)

    return list(inside(jax.make_jaxpr(function)(*arguments).jaxpr))


def primitives_of(function, *arguments):
    return {eqn.primitive.name for eqn in equations_of(function, *arguments)}


def tiled_max(window, x):
    return equation(lambda a: lax.reduce_window(a, -jnp.inf, lax.max, window, window, "VALID"), x)


@pytest.mark.parametrize(
    ("shape", "window"),
    [
        ((2, 6, 4), (1, 2, 2)),
        ((1, 7, 5), (1, 3, 2)),
        ((3, 5), (1, 2)),
        ((4, 2, 2, 3), (1, 2, 2, 2)),
    ],
)
def test_maximum_over_tiles_with_ties(shape, window):
    """Values 0 .. 2, so that most tiles have several maxima; remainders are dropped."""
    x = jnp.asarray(np.random.default_rng(0).integers(0, 3, shape), jnp.float64)
    found, expected = both(tiled_max(window, x), x)
    for f, e in zip(found, expected, strict=True):
        assert relative_error(f, e) < 1e-14


def test_maximum_of_infinities_and_nan():
    """The value is XLA's; a NaN stays within its tile, forward and backward."""
    rows = [[np.nan, 1, 2, 3], [-np.inf, -np.inf, np.inf, 1], [4, np.nan, 0, 0], [5, 6, -1, -2]]
    x = jnp.asarray(np.stack([rows])).astype(jnp.float64)
    eqn = tiled_max((1, 2, 2), x)
    ours, pull = jax.vjp(lambda a: applied(eqn, [a])[0], x)
    xla = eqn.primitive.bind(x, **eqn.params)
    np.testing.assert_array_equal(ours, xla)
    assert np.isnan(ours[0, 0, 0]) and np.isnan(ours[0, 1, 0]) and ours[0, 0, 1] == np.inf
    (back,) = pull(jnp.ones_like(ours))
    np.testing.assert_array_equal(np.asarray(back).sum(), ours.size)  # one entry of each tile
    assert set(np.unique(back)) == {0.0, 1.0}


def test_other_windows_are_left_to_xla():
    """Overlapping or padded windows go through the primitive itself."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 6, 6)))
    for strides, padding in (((1, 1, 1), "VALID"), ((1, 2, 2), "SAME"), ((1, 3, 3), "VALID")):
        eqn = equation(
            lambda a, s=strides, p=padding: lax.reduce_window(
                a, -jnp.inf, lax.max, (1, 2, 2) if p == "VALID" else (1, 3, 3), s, p
            ),
            x,
        )
        expected = eqn.primitive.bind(x, **eqn.params)
        np.testing.assert_array_equal(applied(eqn, [x])[0], expected)


CONVOLUTIONS = {
    "1-D, strided, padded, dilated": dict(
        x=(2, 3, 9), w=(4, 3, 2), window_strides=(2,), padding=[(1, 2)], rhs_dilation=(3,)
    ),
    "2-D, groups": dict(
        x=(1, 4, 5, 4), w=(6, 2, 2, 3), window_strides=(1, 2), padding=[(0, 1), (2, 0)],
        feature_group_count=2,
    ),
    "2-D, transposed, cut": dict(
        x=(1, 2, 3, 3), w=(3, 2, 2, 3), window_strides=(1, 1), padding=[(-1, 1), (2, -1)],
        lhs_dilation=(2, 3),
    ),
    "3-D": dict(
        x=(1, 2, 3, 2, 4), w=(2, 2, 2, 1, 2), window_strides=(1, 1, 2), padding="VALID",
    ),
    "channels last": dict(
        x=(2, 5, 4, 3), w=(2, 3, 3, 4), window_strides=(1, 1), padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    ),
    "channels in front of the batch": dict(
        x=(3, 5, 2), w=(2, 3, 4), window_strides=(2,), padding="SAME",
        dimension_numbers=("CWN", "WIO", "NWC"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution(name):
    options = dict(CONVOLUTIONS[name])
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(size=options.pop(which))) for which in ("x", "w"))
    eqn = equation(lambda x, w: lax.conv_general_dilated(x, w, **options), x, w)
    found, expected = both(eqn, x, w)
    for f, e in zip(found, expected, strict=True):
        assert relative_error(f, e) < 1e-13


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution_on_a_gpu(name, at_once, on_a_gpu, monkeypatch):
    """XLA's own, but for the gradient of the weight, which is a product of patches."""
    monkeypatch.setattr(_primitives, "_MOST_TAPS", 100 if at_once else 0)
    p = dict(CONVOLUTIONS[name])
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(size=p.pop(k))) for k in "xw")
    eqn = equation(lambda a, b: lax.conv_general_dilated(a, b, precision="highest", **p), x, w)
    found, expected = both(eqn, x, w, forwards=False)
    for f, e in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert relative_error(f, e) < 1e-12
    loss = lambda a, b: jnp.sum(jnp.sin(applied(eqn, [a, b])[0]))
    slope = lambda a, b: sum(jnp.sum(d**3) for d in jax.grad(loss, (0, 1))(a, b))
    equations = equations_of(jax.grad(slope, (0, 1)), x, w)
    highest = (lax.Precision.HIGHEST,) * 2
    of = lambda name: [eqn for eqn in equations if eqn.primitive.name == name]
    assert {eqn.params["precision"] for eqn in of("dot_general")} == {highest}
    kernels = {eqn.invars[1].aval.size for eqn in of("conv_general_dilated")}
    assert kernels == {w.size}  # never a convolution for the weight


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("name", ["channels last", "channels in front of the batch"])
def test_convolution_of_a_batch_in_blocks(name, rows, monkeypatch):
    """Five samples, one or two of which have patches that fit the cache."""
    options = dict(CONVOLUTIONS[name])
    axis = options["dimension_numbers"][0].index("N")
    shape = [5 if n == axis else size for n, size in enumerate(options.pop("x"))]
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(size=size)) for size in (shape, options.pop("w")))
    eqn = equation(lambda x, w: lax.conv_general_dilated(x, w, **options), x, w)

    def made_again():
        call = lambda x, w: applied(eqn, [x, w])  # a new one, traced anew
        return {"remat2", "checkpoint"} & primitives_of(call, x, w)

    assert not made_again()
    monkeypatch.setattr(_blocks, "BLOCK_BYTES", rows * _primitives._patch_bytes(eqn) // 5)
    assert made_again()
    found, expected = both(eqn, x, w)
    for f, e in zip(found, expected, strict=True):
        assert relative_error(f, e) < 1e-13


def two_layers(weights, x):
    """A batch through a convolution and a pool inside `jit`, and one more convolution."""
    dims = ("NCHW", "OIHW", "NCHW")
    first = lambda w, x: lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=dims)
    pool = lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
    hidden = jax.jit(lambda w, x: pool(jax.nn.relu(first(w, x))))(weights[0], x)
    deep = lax.conv_general_dilated(hidden, weights[1], (2, 2), "VALID", feature_group_count=2)
    return {"sum": jnp.sum(jnp.sin(deep)), "deep": deep}


def test_a_function_of_a_batch_by_the_equivalents(monkeypatch):
    rng = np.random.default_rng(0)
    weights = [jnp.asarray(rng.normal(size=s)) for s in ((4, 3, 3, 3), (6, 2, 2, 2))]
    x = jnp.asarray(rng.normal(size=(5, 3, 9, 8)))

    def both(function):
        def loss(weights):
            out = function(weights, x)
            return out["sum"], out

        return jax.value_and_grad(loss, has_aux=True)

    monkeypatch.setattr(_primitives, "_FEWEST", 0)
    found = jax.jit(both(with_equivalents(two_layers)))(weights)
    assert relative_error(found, both(two_layers)(weights)) < 1e-13

    convolution = "conv_general_dilated"
    names = lambda: primitives_of(with_equivalents(two_layers), weights, x)
    assert {convolution, "reduce_window_max"} <= primitives_of(two_layers, weights, x)
    assert not {convolution, "reduce_window_max"} & names()
    patches = 8 * (5 * 9 * 8) * (3 * 3 * 3)  # of the first layer, which has more than the second
    monkeypatch.setattr(_primitives, "_LARGEST", patches - 1)
    assert convolution in names() and "reduce_window_max" not in names()
    monkeypatch.setattr(_primitives, "_LARGEST", patches)
    assert convolution not in names()
    monkeypatch.setattr(_primitives, "_FEWEST", 4 * 9 + 1)  # one more than the first layer has
    assert convolution in names()


def test_what_is_kept_in_memory_is_what_it_was():
    x = jnp.linspace(-1.0, 1.0, 6).reshape(2, 3)
    for batched in (lambda call: call, jax.vmap):
        call = jax.jit(batched(in_memory_here))
        for found, expected in zip(
            derivatives(call, jnp.cos(x), x), derivatives(lambda x: x, jnp.cos(x), x), strict=True
        ):
            assert jax.tree.all(jax.tree.map(np.array_equal, found, expected))
    assert in_memory_here(jnp.arange(3)).tolist() == [0, 1, 2]
