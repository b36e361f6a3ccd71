"""A function with its parameters is a model: what is pruned, and the order of its axes."""

import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ntt_eqx as ntt

WINDOW = ("NHWC", "HWIO", "NHWC")  # as Flax and Haiku have it


def images(params, x):
    """A convolution and two dense layers, with weights as in Flax: `[*window, in, out]`."""
    conv = params["stem"]
    h = jax.lax.conv_general_dilated(x[None], conv["kernel"], (1, 1), "VALID", None, None, WINDOW)
    h = jax.nn.relu(h[0] + conv["bias"][None, None]).reshape(-1)
    h = jax.nn.relu(h @ params["body"]["kernel"] + params["body"]["bias"])
    return h @ params["a_head"]["kernel"]  # sorted before the others


def draw(shape, seed):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def parameters():
    layer = lambda shape, seed: {"kernel": draw(shape, seed), "bias": draw(shape[-1:], seed + 9)}
    head = {"kernel": draw((8, 3), 2), "scale": draw((3, 3), 3)}
    return {"stem": layer((2, 2, 4, 8), 0), "body": layer((32, 8), 1), "a_head": head}


KERNELS = {f".args[0]['{name}']['kernel']" for name in ("stem", "body", "a_head")}
LAYOUTS = dict(stem="kkio", body="io", a_head="io")


@pytest.fixture
def model():
    return eqx.Partial(images, parameters())


@pytest.fixture
def x():
    return draw((6, 3, 3, 4), 5)


def test_what_is_pruned_of_a_bare_tree(model):
    found = ntt.describe_prunable(model)
    assert found.pruned.keys() == KERNELS
    assert found.left_out.keys() == {".args[0]['a_head']['scale']"}
    lists = eqx.Partial(images, [(jnp.ones((3, 2)), jnp.ones((1, 4))), jnp.ones((2, 2))])
    assert ntt.describe_prunable(lists).pruned.keys() == {".args[0][0][0]", ".args[0][1]"}
    state_dict = {"0.weight": jnp.ones((3, 2)), "0.bias": jnp.ones((3, 2)), "pos": jnp.ones((3, 2))}
    found = ntt.describe_prunable(eqx.Partial(images, state_dict))
    assert found.pruned.keys() == {".args[0]['0.weight']"}


def test_arrays_in_lists_of_an_equinox_module_are_not_pruned():
    class Listed(eqx.Module):
        matrices: list
        inner: eqx.nn.Linear

    listed = Listed([jnp.ones((3, 3))], eqx.nn.Linear(3, 3, key=jax.random.key(0)))
    assert ntt.describe_prunable(listed).pruned.keys() == {".inner.weight"}
    held = eqx.Partial(lambda m, x: x, listed)
    assert ntt.describe_prunable(held).pruned.keys() == {".args[0].inner.weight"}


@pytest.mark.filterwarnings("ignore:sparsify")
def test_every_entry_takes_a_function(model, x):
    theta = ntt.ntk(model, x)
    exact = ntt.ntk(model, x, implementation="jacobian")
    assert jnp.allclose(theta, exact, rtol=1e-3, atol=1e-3 * float(exact.max()))
    v = draw((6, 3), 6)
    product = jnp.einsum("nmkl,ml->nk", theta, v)
    assert jnp.allclose(
        ntt.ntk_operator(model, x).mv(v), product, rtol=1e-3, atol=1e-3 * float(exact.max())
    )
    scores = (ntt.scores.Magnitude(), ntt.scores.Snip(), ntt.scores.SynFlow())
    for score in scores:
        sparse = ntt.prune(model, score, 0.5, (x, np.arange(6) % 3), allocation="erk")
        kept = sum(int(m.sum()) for m in jax.tree.leaves(sparse.mask))
        assert kept == round(0.5 * (128 + 256 + 24))
        assert sparse(x[0]).shape == (3,)
    config = ntt.NTTConfig(density=0.5, num_steps=2, mask_every=1)
    state = ntt.ntt_init(model, config, optax.adam(1e-3))
    state, _ = ntt.transfer(state, [x, x], num_steps=2)
    assert jnp.isfinite(state.student(x[0])).all()
    assert float(state.student.density()) == 0.5


def test_shares_of_erk_do_not_depend_on_the_order_of_axes():
    shapes = {"stem": (2, 2, 4, 8), "body": (32, 8)}
    turned = {"stem": (8, 4, 2, 2), "body": (8, 32)}
    ones = lambda shapes: {name: jnp.ones(shape) for name, shape in shapes.items()}
    assert ntt.allocate(ones(shapes), 0.3, "erk") == ntt.allocate(ones(turned), 0.3, "erk")


def test_layouts_are_read_from_the_program(model, x):
    expected = [(f".args[0]['{name}']['kernel']", letters) for name, letters in LAYOUTS.items()]
    assert list(ntt.weight_layouts(model, x).items()) == expected
    assert list(ntt.weight_layouts(ntt.sparsify(model, lambda p, o, w: w.ndim > 1), x)) == [
        path for path, _ in expected
    ]
    lenet = ntt.models.LeNet5(key=jax.random.key(0))
    found = ntt.weight_layouts(lenet, jnp.ones((1, 1, 28, 28)))
    assert found == {".conv1.weight": "oikk", ".conv2.weight": "oikk"} | {
        ".hidden.weight": "oi", ".output.weight": "oi"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "f", "letters"),
    [
        ((3, 2, 5), lambda w, x: jnp.einsum("ihd,i->hd", w, x[:3]), "ioo"),
        ((2, 3, 5), lambda w, x: jnp.einsum("hdi,hd->i", w, x.reshape(2, 3)), "iio"),
        ((4, 6, 5), lambda w, x: jax.vmap(lambda w: x @ w)(w), "oio"),
        ((2, 6, 6), lambda w, x: jax.lax.scan(lambda h, w: (w @ h, None), x, w)[0], "ooi"),
        ((6, 4), lambda w, x: w[jnp.argmax(x)], "io"),
        ((1, 6), lambda w, x: w @ x, "oi"),
        ((6, 1), lambda w, x: x @ w, "io"),
        ((12,), lambda w, x: w.reshape(2, 6) @ x, None),  # one axis for both
        ((6, 6), lambda w, x: w @ (w @ x), None),  # twice
        ((6, 6), lambda w, x: jnp.tanh(w) @ x, None),
    ],
)
def test_letters(shape, f, letters):
    found = ntt.weight_layouts(eqx.Partial(f, draw(shape, 0)), draw((2, 6), 1))
    assert found == ({} if letters is None else {".args[0]": letters})


def outputs_first(tree):
    """The same scores as Equinox would store them, first layer first."""
    turn = {"stem": (3, 2, 0, 1), "body": (1, 0), "a_head": (1, 0)}
    return {name: tree[name]["kernel"].transpose(axes) for name, axes in turn.items()}


@pytest.mark.filterwarnings("ignore:sparsify")
@pytest.mark.parametrize(
    "pattern",
    [ntt.NM(1, 2), ntt.Block((2, 4)), ntt.Block((3, 3)), ntt.Channels(0), ntt.Channels(1)],
    ids=str,
)
def test_patterns_in_a_layout(pattern, model, x):
    """They mask what they mask of the same weights in Equinox' order, the ends included."""

    class Net(eqx.Module):
        stem: jax.Array
        body: jax.Array
        a_head: jax.Array

    scores = ntt.scores.Magnitude()(model)
    expected = ntt.make_mask(Net(**outputs_first(scores.args[0])), 0.5, pattern=pattern)
    laid = ntt.InLayout(pattern, ntt.weight_layouts(model, x))
    found = ntt.make_mask(scores, 0.5, pattern=laid)
    for name, mask in outputs_first(found.args[0]).items():
        np.testing.assert_array_equal(mask, getattr(expected, name))
    sparsity = ntt.Sparsity(0.5, pattern=laid)
    assert bool(sparsity.holds(found))
    assert hash(sparsity.pattern.layouts) == hash(laid.layouts)
    assert laid.keeps_count((32, 8)) == pattern.keeps_count((8, 32))


def test_no_pattern_guesses_an_order(model, x):
    scores = ntt.scores.Magnitude()(ntt.sparsify(model, lambda path, o, w: path in KERNELS))
    for pattern in (ntt.NM(), ntt.Channels(), ntt.Block()):
        with pytest.raises(ValueError, match=r"nothing says that .* weight_layouts\(model, x\)"):
            ntt.make_mask(scores, 0.5, pattern=pattern)
    for path in ("kernel", "w", "embeddings"):
        with pytest.raises(ValueError, match="nothing says"):
            ntt.make_mask({"dense": {path: draw((8, 8), 0)}}, 0.5, pattern=ntt.NM())
    layouts = ntt.weight_layouts(model, x)
    first, *_ = layouts
    with pytest.raises(ValueError, match="no layout of .*'stem'"):
        rest = {path: letters for path, letters in layouts.items() if path != first}
        ntt.make_mask(scores, 0.5, pattern=ntt.InLayout(ntt.NM(), rest))
    with pytest.raises(ValueError, match="has 2 axes, but its shape is"):
        ntt.make_mask(scores, 0.5, pattern=ntt.InLayout(ntt.NM(), layouts | {first: "io"}))
    for wrong in ({}, {"a": "xy"}):
        with pytest.raises(ValueError, match="InLayout: "):
            ntt.InLayout(ntt.NM(), wrong)
    with pytest.raises(ValueError, match="InLayout: pattern"):
        ntt.InLayout(ntt.InLayout(ntt.NM(), layouts), layouts)


@pytest.mark.filterwarnings("ignore:sparsify")
def test_an_output_without_a_path_is_seen_in_any_order(model, x):
    sparse = ntt.sparsify(model)
    cut = eqx.tree_at(lambda m: m.args[0]["stem"]["kernel"], sparse.mask, replace_fn=jnp.zeros_like)
    with pytest.warns(ntt.LayerCollapseWarning):
        ntt.check_collapse(sparse.with_mask(cut), x)
    stem = lambda m: m.args[0]["stem"]["kernel"]
    without_a_filter = lambda m: m.at[..., 0].set(False)
    whole = eqx.tree_at(stem, sparse.mask, replace_fn=without_a_filter)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ntt.check_collapse(sparse.with_mask(whole), x)


def test_functions_without_their_parameters_are_told_of_partial(x):
    params = parameters()
    closed = lambda x: images(params, x)
    calls = (
        lambda: ntt.ntk(closed, x),
        lambda: ntt.ntk_operator(closed, x),
        lambda: ntt.prune(closed, ntt.scores.Magnitude(), 0.5),
        lambda: ntt.ntt_init(closed, ntt.NTTConfig(0.5, num_steps=1), optax.sgd(0.1)),
        lambda: ntt.weight_layouts(closed, x),
    )
    for call in calls:
        with pytest.raises(ValueError, match=r"eqx\.Partial\(f, params\)"):
            call()


def test_parameters_between_the_function_and_the_batch():
    from ntt_eqx._ntk import _given  # not before the type checker's import hook

    with pytest.raises(ValueError, match=r"ntk\(eqx\.Partial\(f, params\), x\)"):
        _given.given_model("ntk", images)


def test_the_state_of_nnx_is_no_parameter():
    nnx = pytest.importorskip("flax.nnx")

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.layer = nnx.Linear(4, 3, rngs=rngs)
            self.norm = nnx.BatchNorm(3, rngs=rngs)

        def __call__(self, x):
            return self.norm(self.layer(x))

    net = Net(nnx.Rngs(0))
    net.eval()
    x = draw((2, 4), 0)
    names = [parameter.name for parameter in ntt.explain(net, x).parameters]
    assert not [name for name in names if "mean" in name or "var" in name]
    assert ntt.describe_prunable(net).pruned == {".layer.kernel.value": (4, 3)}
    assert ntt.weight_layouts(net, x) == {".layer.kernel.value": "io"}
    graph, params, stats = nnx.split(net, nnx.Param, ...)
    alone = eqx.Partial(lambda params, x: nnx.merge(graph, params, stats)(x), params)
    np.testing.assert_allclose(ntt.ntk(net, x), ntt.ntk(alone, x), rtol=1e-6)
    with pytest.raises(ValueError, match="nothing says"):
        ntt.prune(net, ntt.scores.Magnitude(), 0.5, pattern=ntt.NM())
