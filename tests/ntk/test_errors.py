"""Every mistake that `ntk` can see is reported in its own words, before anything is traced."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.arbitrary import ANYTHING, arrays, examples, explore, refused
from helpers.refusals import (
    ASKS_FOR_ONE,
    HOLDS_THEM,
    Batched,
    NeedsKey,
    NeedsState,
    ReturnsState,
    Wrapped,
    linear,
    refusals,
    unchecked,
)
from hypothesis import strategies as st

import ntt_eqx as ntt

X = np.ones((2, 3), np.float32)
W = np.ones((2, 3), np.float32)


class Returns(eqx.Module):
    """A model that returns what it was told to."""

    weight: jax.Array
    what: str = eqx.field(static=True)

    def __call__(self, x):
        y = self.weight * x
        return {
            "pair": (y, y),
            "integers": jnp.argmax(y)[None],
            "dictionary": {"logits": y},
            "nothing": None,
        }[self.what]


test_refusals = refusals(
    {
        "features": (lambda: ntt.ntk(linear(), jnp.asarray(X[:, :2])), ASKS_FOR_ONE),
        "features, oracle": (
            lambda: ntt.ntk(linear(), jnp.asarray(X[:, :2]), implementation="jacobian"),
            ASKS_FOR_ONE,
        ),
        "no axis": (lambda: ntt.ntk(linear(), jnp.ones(())), "x1: .*got a scalar float32"),
        "a list": (
            lambda: ntt.ntk(linear(), [[1.0, 2.0, 3.0]]),
            "ntk: x1 must be an array, got list",
        ),
        "second a list": (
            lambda: ntt.ntk(linear(), jnp.asarray(X), [1]),
            "ntk: x2 must be an array, got list",
        ),
        "a function of its parameters": (
            lambda: ntt.ntk(lambda p, x: p["w"] @ x, {"w": jnp.ones((2, 3))}, jnp.asarray(X)),
            r"ntk: the model has no floating-point parameters.*ntk\(eqx.Partial\(f, params\), x\)",
        ),
        "a function of one array": (
            lambda: ntt.ntk(lambda w, x: w @ x, jnp.ones((2, 3)), jnp.asarray(X)),
            r"ntk: the model has no floating-point parameters.*eqx.Partial\(f, params\)",
        ),
        "a function that closes over them": (
            lambda: ntt.ntk(lambda x: W @ x, jnp.asarray(X)),
            r"ntk: the model has no floating-point parameters.*eqx.Partial\(f, params\)",
        ),
        "explained": (
            lambda: ntt.explain(lambda x: W @ x, jnp.asarray(X)),
            r"explain: the model has no floating-point .*explain\(eqx.Partial\(f, params\), x\)",
        ),
        "explain of nothing": (lambda: ntt.explain(linear(), None), "explain: x1 must be an array"),
        "tile of one number": (
            lambda: ntt.ntk_tiles(linear(), jnp.asarray(X), tile=4),
            r"ntk_tiles: tile must be two positive integers.*\(256, 256\), got 4",
        ),
        "tiles of nothing": (
            lambda: ntt.ntk_tiles(linear(), None),
            "ntk_tiles: x1 must be an array, got NoneType",
        ),
        "one array of directions": (
            lambda: ntt.ntk(linear(), jnp.asarray(X), directions=jnp.ones((2, 2))),
            r"ntk: directions must be a pair \(V\[R, K\], W\[S, K\]\)",
        ),
        "directions of lists": (
            lambda: ntt.ntk(linear(), jnp.asarray(X), directions=([[1.0, 0.0]], [[1.0, 0.0]])),
            r"ntk: directions\[0\] must be an array, got list",
        ),
        "no outputs": (
            lambda: ntt.ntk(eqx.Partial(lambda w, x: w @ x, jnp.ones((0, 3))), jnp.asarray(X)),
            r"ntk: the model maps one sample to no outputs, an array float32\[0\]",
        ),
        "batches": (lambda: ntt.ntk(Batched(), jnp.asarray(X)), ASKS_FOR_ONE),
        "key": (lambda: ntt.ntk(NeedsKey(), jnp.asarray(X)), HOLDS_THEM),
        "state": (lambda: ntt.ntk(NeedsState(), jnp.asarray(X)), HOLDS_THEM),
        "state, oracle": (
            lambda: ntt.ntk(ReturnsState(), jnp.asarray(X), implementation="ntk_vector_products"),
            "paired with its state by",
        ),
        "budget of text": (
            lambda: ntt.ntk(linear(), jnp.asarray(X), max_bytes="1G"),
            "max_bytes must be positive, got 1G",
        ),
    }
)


def broken_weight(value):
    return eqx.tree_at(lambda m: m.weight, linear(), value)


ENTRIES = {
    "ntk": lambda x, m: ntt.ntk(m, x),
    "ntk, second": lambda x, m: ntt.ntk(m, jnp.asarray(X), x),
    "oracle": lambda x, m: ntt.ntk(m, x, implementation="jacobian"),
    "ntk_and_outputs": lambda x, m: ntt.ntk_and_outputs(m, x),
    "ntk_tiles": lambda x, m: list(ntt.ntk_tiles(m, x)),
    "explain": lambda x, m: ntt.explain(m, x),
    "compare_kernels": lambda x, m: ntt.compare_kernels(ntt.sparsify(m), m, x),
    "outputs_and_kernels": lambda x, m: ntt.outputs_and_kernels(
        ntt.sparsify(m), m, x, ntt.StepInfo(jnp.int32(0), jax.random.key(0), 1.0)
    ),
    "kernel_matrix": lambda x, m: ntt.kernel_matrix(x),
    "fit_kernel_ridge": lambda x, m: ntt.fit_kernel_ridge(
        x[:, :2], x[:, :2], ridge=9.0, jitter=0.0
    ),
}
NO_WEIGHTS = ("kernel_matrix", "fit_kernel_ridge")
NOT_JAX = {
    "longdouble": (np.longdouble(X), "which JAX does not have; cast it to float64 first"),
    "masked": (np.ma.masked_array(X, X > 0), "is a masked array; give it numbers"),
    "text": (np.array([["a"] * 3] * 2), "must be an array of numbers"),
}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("kind", NOT_JAX)
def test_arrays_that_jax_does_not_have(entry, kind):
    x, message = NOT_JAX[kind]
    with unchecked(), pytest.raises(ValueError, match=rf"(?s)^{entry.split(',')[0]}.*{message}"
                                    if entry != "oracle" else message):  # fmt: skip
        ENTRIES[entry](x, linear())
    if entry in NO_WEIGHTS or kind == "text":
        return
    with unchecked(), pytest.raises(ValueError, match=rf"weight is .*|{message}"):
        ENTRIES[entry](jnp.asarray(X), broken_weight(x[:2]))


@pytest.mark.parametrize("entry", ENTRIES)
def test_another_byte_order(entry):
    """Numbers count, not the order of their bytes: in samples, weights and kernels alike."""
    model = broken_weight(np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3))
    turned = broken_weight(model.weight.astype(model.weight.dtype.newbyteorder()))
    x = np.linspace(0.0, 1.0, 6, dtype=np.float32).reshape(2, 3)
    x[1, 0] = x[0, 1]  # a kernel is symmetric
    flipped = x.astype(x.dtype.newbyteorder())
    assert flipped.tobytes() != x.tobytes() and (flipped == x).all()
    with unchecked():
        found, expected = (jax.tree.leaves(ENTRIES[entry](*given)) for given in
                           ((flipped, turned), (x, model)))  # fmt: skip
    assert len(found) == len(expected)
    for mine, right in zip(found, expected, strict=True):
        if isinstance(right, ntt.KernelComparison):
            mine, right = list(mine.numbers.values()), list(right.numbers.values())
        np.testing.assert_array_equal(mine, right)


def test_another_byte_order_of_directions_and_metric():
    model, x = linear(), jnp.asarray(X)
    directions = (np.float32([[1, 2]]), np.float32([[3, -1]]))
    metric = jax.tree.map(lambda w: np.linspace(0, 1, w.size, dtype="f4").reshape(w.shape), model)
    turn = lambda tree: jax.tree.map(lambda a: a.astype(a.dtype.newbyteorder()), tree)
    with unchecked():
        found = ntt.ntk(model, x, directions=turn(directions), metric=turn(metric))
        right = ntt.ntk(model, x, directions=directions, metric=metric)
    np.testing.assert_array_equal(found, right)


def test_integers_that_jax_would_wrap():
    table = eqx.Partial(lambda w, x: w[x % 2], jnp.ones((2, 3)))
    with unchecked(), pytest.raises(ValueError, match="ntk: x1 holds int64.*wrap to int32"):
        ntt.ntk(table, np.array([0, 2**32]))


class Wide(eqx.Module):
    """So many outputs that their kernel fits nowhere; nothing of it is computed."""

    scale: jax.Array
    width: int = eqx.field(static=True)

    def __call__(self, x):
        return jnp.broadcast_to(self.scale * x.sum(), (self.width,))


TOO_LARGE = {
    "full": (
        lambda m, x: ntt.ntk(m, x),
        r"ntk: the kernel \[2, 2, 3000000, 3000000\] takes 134,110.5 GiB, more than the .* GiB of "
        r".*outputs='diagonal' takes 0.0 GiB; outputs='trace' .*ntk_tiles .*ntk_to_zarr",
    ),
    "and outputs": (lambda m, x: ntt.ntk_and_outputs(m, x), "takes 134,110.5 GiB"),
    "oracle": (
        lambda m, x: ntt.ntk(m, x, implementation="jacobian", outputs="trace"),
        "takes 134,110.5 GiB.*implementation='factors'",
    ),
    "a step": (
        lambda m, x: ntt.outputs_and_kernels(
            ntt.sparsify(m, lambda *_: True),
            m,
            x,
            ntt.StepInfo(jnp.int32(0), jax.random.key(0), 1.0),
        ),
        r"ntt_loss: the kernel \[1, 1, 3000000, 3000000\] .*ntt.Trace\(\)",
    ),
}


@pytest.mark.parametrize("case", TOO_LARGE)
def test_a_kernel_that_fits_nowhere(case):
    call, message = TOO_LARGE[case]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        call(Wide(jnp.ones(()), 3_000_000), jnp.asarray(X))


FORWARD = {
    "jvp": lambda f, m: jax.jvp(f, (m,), (m,)),
    "jvp of jit": lambda f, m: jax.jvp(jax.jit(f), (m,), (m,)),
    "jit of jvp": lambda f, m: jax.jit(lambda m: jax.jvp(f, (m,), (m,)))(m),
    "jacfwd": lambda f, m: jax.jacfwd(f)(m),
    "hessian": lambda f, m: jax.hessian(f)(m),
    "vmapped": lambda f, m: jax.vmap(lambda t: jax.jvp(f, (m,), (t,)))(m[None]),
}


@pytest.mark.parametrize("mode", FORWARD)
def test_forward_mode(mode):
    """A sentence of ours, and both modes by the implementation that it names."""
    x = jnp.asarray(X)
    model = lambda w: eqx.Partial(lambda w, x: jnp.tanh(w @ x), w)
    call = lambda w: jnp.sum(ntt.ntk(model(w), x))
    w = jnp.linspace(-1.0, 1.0, 6).reshape(2, 3)
    with pytest.raises(ValueError, match="^ntk: the kernel is differentiable in reverse mode only"):
        FORWARD[mode](call, w)
    if mode == "jvp":
        oracle = lambda w: jnp.sum(ntt.ntk(model(w), x, implementation="jacobian"))
        forward, slope = jax.jvp(oracle, (w,), (w,))[1], jax.grad(call)(w)
        np.testing.assert_allclose(jnp.sum(w * slope), forward, rtol=1e-5)
        twice = jax.jacrev(jax.grad(call))(w)
        np.testing.assert_allclose(twice, jax.hessian(oracle)(w), rtol=1e-4, atol=1e-4)


def test_forward_mode_by_the_samples():
    with pytest.raises(ValueError, match="^ntk: the kernel is differentiable in reverse mode only"):
        jax.jvp(lambda x: ntt.ntk(linear(), x), (jnp.asarray(X),), (jnp.asarray(X),))


def test_an_error_inside_a_model_is_kept_as_the_cause():
    class Failing(Wrapped):
        def __call__(self, x):
            raise RuntimeError("the reason")

    with pytest.raises(
        ValueError, match=r"fails on one sample.*RuntimeError: the reason"
    ) as caught:
        ntt.ntk(Failing(), jnp.asarray(X))
    assert isinstance(caught.value.__cause__, RuntimeError)


BAD_ARGUMENTS = {
    "features": (dict(x2=np.ones((2, 4), np.float32)), r"x1 holds samples float32\[3\] but x2 "),
    "dtypes": (dict(x2=np.ones((2, 3), np.int32)), r"x2 holds int32\[3\]; both must suit"),
    "ranks": (dict(x2=np.ones((2, 3, 1), np.float32)), r"x2 holds float32\[3, 1\]"),
    "no samples": (dict(x1=X[:0]), "a batch must hold at least one sample"),
    "no samples in x2": (dict(x2=X[:0]), "a batch must hold at least one sample"),
    "no budget": (dict(max_bytes=0), "max_bytes must be positive, got 0"),
    "negative budget": (dict(max_bytes=-5), "max_bytes must be positive, got -5"),
    "directions and outputs": (
        dict(directions=(jnp.ones((1, 2)), jnp.ones((1, 2))), outputs="trace"),
        "directions go with outputs='full'",
    ),
    "directions and oracle": (
        dict(directions=(jnp.ones((1, 2)), jnp.ones((1, 2))), implementation="jacobian"),
        "directions go with outputs='full' and implementation='factors'",
    ),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_arguments(name):
    options, message = BAD_ARGUMENTS[name]
    options = {k: jnp.asarray(v) if isinstance(v, np.ndarray) else v for k, v in options.items()}
    options = dict(x1=jnp.asarray(X)) | options
    with pytest.raises(ValueError, match=message):
        ntt.ntk(linear(), options.pop("x1"), **options)


@pytest.mark.parametrize("name", ["kernel", "outputs", "precision", "implementation"])
def test_unknown_names(name):
    """A wrong name is refused by the type check under test, and by `ntk` itself without it."""
    from ntt_eqx._ntk._spec import check_options

    given = dict(kernel="active", outputs="full", precision="float32", implementation=None)
    unchecked = getattr(check_options, "__wrapped__", check_options)
    with pytest.raises(ValueError, match=rf"ntk: {name} must be one of .*, got 'fancy'"):
        unchecked("ntk", directions=None, max_bytes=None, **given | {name: "fancy"})


@pytest.mark.parametrize("what", ["pair", "integers", "dictionary", "nothing"])
def test_models_that_do_not_return_one_array(what):
    model = Returns(jnp.ones(3), what)
    with pytest.raises(ValueError, match="must map one sample to one floating-point array"):
        ntt.ntk(model, jnp.asarray(X))


@pytest.mark.parametrize("implementation", [None, "jacobian"])
def test_models_without_parameters(implementation):
    with pytest.raises(ValueError, match="ntk: the model has no floating-point parameters"):
        ntt.ntk(eqx.nn.Lambda(jnp.tanh), jnp.asarray(X), implementation=implementation)


@pytest.mark.parametrize(
    ("shape", "place"), [((2, 1), "weight"), ((3, 2), "weight"), ((), "bias"), ((3,), "bias")]
)
def test_metric_of_another_shape(shape, place):
    model = linear()
    metric = eqx.tree_at(lambda m: getattr(m, place), model, jnp.ones(shape))
    with pytest.raises(ValueError, match=rf"ntk: metric\.{place} has shape"):
        ntt.ntk(model, jnp.asarray(X), metric=metric)


def test_metric_of_another_structure():
    with pytest.raises(ValueError, match="ntk: the metric does not have the structure of Linear"):
        ntt.ntk(linear(), jnp.asarray(X), metric=[jnp.ones((2, 3)), jnp.ones(2)])


def test_directions_for_another_number_of_outputs():
    with pytest.raises(ValueError, match=r"ntk: directions .* 2 outputs"):
        ntt.ntk(linear(), jnp.asarray(X), directions=(jnp.ones((1, 3)), jnp.ones((1, 3))))


@examples(40, 1000)
def test_arbitrary_batches(examples):
    model = linear()

    def holds(x1, x2, kernel, outputs, max_bytes):
        options = dict(kernel=kernel, outputs=outputs, max_bytes=max_bytes)
        theta = refused(lambda: ntt.ntk(model, x1, x2, **options), ValueError, begins="ntk")
        if theta is not None:
            assert theta.shape[:2] == (len(x1), len(x1 if x2 is None else x2))
            assert theta.dtype == jnp.float32

    explore(
        holds,
        examples,
        x1=st.one_of(arrays([(2, 3)], ["f4"]), ANYTHING),
        x2=st.one_of(st.none(), arrays([(2, 3)], ["f4"]), ANYTHING),
        kernel=st.sampled_from(["active", "ambient", "both"]),
        outputs=st.sampled_from(["full", "trace", "sketch"]),
        max_bytes=st.sampled_from([None, 1, 0, -1, 2.5, "1G"]),
    )
