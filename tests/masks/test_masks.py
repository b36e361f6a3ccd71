"""Masks from scores: exact counts, ties, scopes, what is refused."""

import subprocess
import sys
import warnings

import equinox as eqx
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.arbitrary import ANYTHING, arrays, examples, explore, refused
from helpers.refusals import linear, refusals
from hypothesis import given, settings, strategies as st

import ntt_eqx as ntt
from ntt_eqx import _masks as masks
from ntt_eqx._masks._allocation import densities_of, layer_shapes
from ntt_eqx._masks._select import keep_highest, select_each

SIZES = (1, 2, 7, 33)


def highest(scores, count):
    """The oracle: a stable sort in float64, highest first, ties by index, NaN last."""
    flat = np.asarray(scores).astype(np.float64).ravel()
    keys = np.where(np.isnan(flat), np.inf, -flat)
    order = np.lexsort((np.arange(flat.size), np.isnan(flat), keys))
    kept = np.zeros(flat.size, bool)
    kept[order[:count]] = True
    return kept.reshape(np.shape(scores))


def tree(*leaves):
    """A score tree with leaves that are not prunable between the scores."""
    return {"layers": [{"weight": jnp.asarray(leaf), "bias": None} for leaf in leaves]}


def weights(mask):
    return [np.asarray(layer["weight"]) for layer in mask["layers"]]


@settings(max_examples=150, deadline=None)
@given(data=st.data(), size=st.sampled_from(SIZES))
def test_keeps_exactly_the_highest(data, size):
    values = st.one_of(
        st.floats(width=32, allow_nan=True, allow_infinity=True, allow_subnormal=True),
        st.sampled_from([0.0, -0.0, 1.0, -1.0]),  # ties
    )
    scores = data.draw(hnp.arrays(np.float32, size, elements=values))
    count = data.draw(st.integers(0, size))
    kept = np.asarray(keep_highest(jnp.asarray(scores), jnp.asarray(count)))
    np.testing.assert_array_equal(kept, highest(scores, count))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float64])
def test_keeps_exactly_the_highest_in_every_dtype(dtype, x64):
    rng = np.random.default_rng(0)
    for draw in (rng.normal(size=500), rng.integers(-3, 4, size=500)):
        scores = jnp.asarray(draw, dtype)
        for count in (0, 1, 250, 499, 500):
            kept = keep_highest(scores, jnp.asarray(count))
            np.testing.assert_array_equal(kept, highest(scores, count))


def test_arrays_side_by_side_are_selected_as_each_alone():
    """Of one entry, of whole blocks and of parts; with ties, NaN, infinities and two dtypes."""
    rng = np.random.default_rng(3)
    shapes = [(1,), (32, 32), (25, 41), (7,), (3, 1000)]
    drawn = [rng.normal(size=shape) for shape in shapes]
    drawn[2] = np.round(drawn[2])
    drawn[3][:] = np.nan
    drawn[4][0, :50] = -np.inf
    scores = [jnp.asarray(draw, jnp.float32) for draw in drawn]
    scores[1] = scores[1].astype(jnp.bfloat16)
    select = jax.jit(select_each)
    for counts in ([1, 100, 500, 3, 1500], [0, 1024, 0, 7, 3000], [1, 1, 1024, 0, 2970]):
        found = select(scores, [jnp.int32(count) for count in counts])
        for (kept, unranked), score, count in zip(found, scores, counts, strict=True):
            np.testing.assert_array_equal(kept, highest(score, count))
            assert bool(unranked) == (score.size == 7 and 0 < count < 7 or count == 2970)


@pytest.mark.parametrize("density", [0.02, 0.1, 0.5, 0.999, 1.0, 1])
def test_layer_counts_are_exact(density):
    rng = np.random.default_rng(1)
    scores = [rng.normal(size=s).astype(np.float32) for s in ((30, 20), (7, 30), (5, 3, 2, 2))]
    mask = masks.make_mask(tree(*scores), density)
    assert jax.tree.structure(mask) == jax.tree.structure(tree(*scores))
    for kept, score in zip(weights(mask), scores, strict=True):
        assert kept.dtype == bool
        np.testing.assert_array_equal(kept, highest(score, round(density * score.size)))


def test_each_layer_rounds_its_own_count():
    rng = np.random.default_rng(4)
    scores = tree(*(rng.normal(size=5).astype(np.float32) for _ in range(3)))
    kept = [int(m.sum()) for m in weights(masks.make_mask(scores, 0.3))]
    assert kept == [2, 2, 2]  # round(1.5) each, where round(4.5) would be 4 in all


@pytest.mark.parametrize("density", [0.02, 0.1, 0.5, 1.0])
def test_global_counts_are_exact(density):
    rng = np.random.default_rng(2)
    shapes = ((30, 20), (7, 30), (5, 3, 2, 2))
    scores = [rng.normal(size=s).astype(np.float32) for s in shapes]
    mask = weights(masks.make_mask(tree(*scores), density, scope="global"))
    flat = np.concatenate([s.ravel() for s in scores])
    expected = highest(flat, round(density * flat.size))
    np.testing.assert_array_equal(np.concatenate([m.ravel() for m in mask]), expected)


def test_ties_go_to_the_lowest_index():
    mask = masks.make_mask(tree([[9.0, 2, 2], [1, 0, 8]], [7.0, 5, 5, 6]), 0.5)
    assert weights(mask)[0].tolist() == [[True, True, False], [False, False, True]]
    mask = masks.make_mask(tree([[9.0, 2, 2], [1, 0, 8]], [0.1, 2.0, 7, 2]), 0.5, scope="global")
    assert weights(mask)[0].tolist() == [[True, True, True], [False, False, True]]
    assert weights(mask)[1].tolist() == [False, False, True, False]


def test_global_scope_mixes_dtypes():
    scores = tree(jnp.asarray([[1.0, 4.0]], jnp.bfloat16), jnp.asarray([[2.0, 3.0]], jnp.float32))
    kept = weights(masks.make_mask(scores, 0.5, scope="global"))
    assert [k.tolist() for k in kept] == [[[False, True]], [[False, True]]]


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_traced_scores_give_the_same_mask_without_a_retrace(scope):
    traces = 0

    @jax.jit
    def refresh(due, scores, old):
        nonlocal traces
        traces += 1
        return jax.lax.cond(due, lambda: masks.make_mask(scores, 0.3, scope=scope), lambda: old)

    rng = np.random.default_rng(3)
    for _ in range(3):
        scores = tree(rng.normal(size=(8, 5)).astype(np.float32), np.float32(rng.normal(size=(9,))))
        eager = masks.make_mask(scores, 0.3, scope=scope)
        old = jax.tree.map(jnp.ones_like, eager)
        assert eqx.tree_equal(refresh(jnp.asarray(True), scores, old), eager)
        assert eqx.tree_equal(refresh(jnp.asarray(False), scores, old), old)
    assert traces == 1


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_scores_that_are_constants_of_a_traced_function(scope):
    scores = tree(np.arange(20.0, dtype=np.float32).reshape(4, 5), np.float32([3.0, 9.0, 1.0]))
    expected = masks.make_mask(scores, 0.5, scope=scope)
    assert eqx.tree_equal(jax.jit(lambda: masks.make_mask(scores, 0.5, scope=scope))(), expected)
    broken = tree(np.array([[1.0, np.nan]]))
    with pytest.raises(ValueError, match=r"scores\['layers'\]\[0\]\['weight'\] has NaN entries"):
        jax.jit(lambda: masks.make_mask(broken, 0.5, scope=scope))()


@pytest.mark.parametrize("density", [0, 0.0, -0.1, 1.0001, 2, float("nan"), float("inf"), True])
def test_bad_densities_are_refused(density):
    with pytest.raises(ValueError, match=r"density must be a number in \(0, 1\]"):
        masks.make_mask(tree(np.ones((2, 3))), density)


def test_an_emptied_layer_is_named():
    scores = tree(np.ones((30, 30)), np.ones((2, 2)))
    with pytest.raises(
        ValueError, match=r"leaves no weight in layer \['layers'\]\[1\]\['weight'\]"
    ):
        masks.make_mask(scores, 0.1)
    with pytest.raises(ValueError, match="leaves no weight in the network"):
        masks.make_mask(scores, 1e-6, scope="global")


def test_a_layer_collapsed_by_global_scope_is_named():
    scores = tree(np.arange(1.0, 101.0).reshape(10, 10), np.zeros((3, 3)))
    with pytest.warns(masks.LayerCollapseWarning, match=r"\['layers'\]\[1\]\['weight'\]"):
        mask = masks.make_mask(scores, 0.5, scope="global")
    with pytest.warns(masks.LayerCollapseWarning, match="check_collapse: layer collapse"):
        assert masks.check_collapse(mask) == ("['layers'][1]['weight']",)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.jit(lambda s: masks.make_mask(s, 0.5, scope="global"))(scores)  # values not known
        assert masks.check_collapse(masks.make_mask(tree(np.eye(3)), 1 / 3)) == ()


def test_warnings_of_collapse_point_to_the_callers_line():
    # in another process: the type checker of the tests adds frames of its own
    lines = [
        "import jax.numpy as jnp",
        "from ntt_eqx import check_collapse, make_mask",
        "scores = {'a': jnp.ones(3), 'b': jnp.zeros(3)}",
        "mask = make_mask(scores, 0.5, scope='global')",
        "check_collapse(mask)",
    ]
    words = [sys.executable, "-W", "always", "-c", "\n".join(lines)]
    said = subprocess.run(words, capture_output=True, text=True, check=True).stderr
    assert "<string>:4: LayerCollapseWarning: make_mask: layer collapse" in said
    assert "<string>:5: LayerCollapseWarning: check_collapse: layer collapse" in said


def test_check_collapse_of_a_constant_of_a_traced_function():
    mask = tree(np.ones((3, 3), bool), np.zeros((2, 2), bool))
    with pytest.warns(masks.LayerCollapseWarning, match=r"\['layers'\]\[1\]\['weight'\]"):
        jax.jit(lambda x: x if masks.check_collapse(mask) else 2 * x)(1.0)


def test_check_collapse_needs_values():
    mask = masks.make_mask(tree(np.arange(9.0).reshape(3, 3)), 0.5)
    with pytest.raises(ValueError, match="traced"):
        jax.jit(lambda m: masks.check_collapse(m))(mask)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (tree(np.ones((2, 2), np.int32)), "must be a floating-point array, got int32"),
        (tree(np.ones((2, 2), bool)), "must be a floating-point array, got bool"),
        (tree(np.array([[1.0, np.nan]])), r"scores\['layers'\]\[0\]\['weight'\] has NaN entries"),
        (tree(np.ones((0, 2))), "is empty"),
        ({"layers": [None]}, "has no scores"),
    ],
)
def test_bad_scores_are_refused(scores, message):
    with pytest.raises(ValueError, match=message):
        masks.make_mask(scores, 0.5)


def test_a_bad_scope_is_refused():
    with pytest.raises(Exception, match="scope"):
        masks.make_mask(tree(np.ones((2, 2))), 0.5, scope="network")  # pyright: ignore


def test_traced_nan_scores_rank_last():
    scores = tree(np.array([[np.nan, -5.0, np.nan, 1.0]]))
    mask = jax.jit(lambda s: masks.make_mask(s, 0.5))(scores)
    assert weights(mask)[0].tolist() == [[False, True, False, True]]


test_refusals = refusals(
    {
        "weights of another model": (
            lambda: ntt.reinitialise(
                ntt.sparsify(linear()), jax.random.key(0), lambda key: eqx.nn.Linear(4, 2, key=key)
            ),
            "the mask does not have the structure of Linear",
        ),
        "numbers": (lambda: ntt.make_mask({"w": 1.0}, 0.5), "got float"),
        "text": (lambda: ntt.make_mask({"w": "abc"}, 0.5), "got str"),
        "complex": (lambda: ntt.make_mask({"w": jnp.ones(3, complex)}, 0.5), "got complex"),
        "density of text": (
            lambda: ntt.make_mask({"w": jnp.ones(3)}, "0.5"),
            r"density must be a number in \(0, 1\], got '0.5'",
        ),
        "an array of densities": (
            lambda: ntt.make_mask({"w": jnp.ones(3)}, np.array([0.5, 0.1])),
            r"density must be a number in \(0, 1\]",
        ),
        "other layers": (
            lambda: ntt.make_mask({"w": jnp.ones(3)}, {"w": 0.5}),
            r"missing \[\"\['w'\]\"\], unknown \['w'\]",
        ),
    }
)


DENSITIES = st.one_of(st.floats(0.0, 1.0), st.floats(), st.integers(-1, 2), ANYTHING)
USUAL_SCORES = hnp.arrays(
    "f4", st.sampled_from([(3,), (2, 3), (1, 1)]), elements=st.floats(-9, 9, width=32)
)
SCORES = arrays(shapes=[(3,), (2, 3), (1, 1), (0,), ()])


@examples(100, 3000)
def test_arbitrary_scores(examples):
    def holds(leaves, density, scope, allocation, pattern):
        tree = {str(i): leaf for i, leaf in enumerate(leaves)}
        options = dict(scope=scope, allocation=allocation, pattern=pattern)
        mask = refused(lambda: ntt.make_mask(tree, density, **options), ValueError)
        if mask is None:
            return
        kept = [(int(np.sum(m)), m.size) for m in jax.tree.leaves(mask)]
        assert all(m.dtype == bool for m in jax.tree.leaves(mask))
        if scope == "global" and pattern is None:
            assert sum(k for k, _ in kept) == round(float(density) * sum(n for _, n in kept))
        elif pattern is None and allocation != "erk":
            assert all(k == round(float(density) * n) for k, n in kept)

    explore(
        holds,
        examples,
        leaves=st.one_of(
            st.lists(USUAL_SCORES, min_size=1, max_size=3),
            st.lists(st.one_of(SCORES, st.floats(), st.text()), max_size=3),
        ),
        density=st.one_of(st.sampled_from([0.1, 0.5, 1.0]), DENSITIES),
        scope=st.sampled_from(["layer", "layer", "global", "network"]),
        allocation=st.sampled_from([None, None, "erk", "other"]),
        pattern=st.sampled_from([None, None, ntt.NM(1, 2), ntt.Block((1, 3)), ntt.Channels(0)]),
    )


def test_erk_shares_of_stacked_layers_are_those_of_single_ones(getkey):
    """A stack by `eqx.filter_vmap` is no layer with one more axis, nor is one of convolutions."""

    def make(key):
        cell = eqx.nn.GRUCell(7, 5, key=key)
        turned = eqx.nn.ConvTranspose1d(4, 6, 3, key=key)
        layers = eqx.nn.Linear(20, 30, key=key), eqx.nn.Conv1d(4, 6, 3, key=key)
        return *layers, turned, cell, eqx.nn.Embedding(9, 4, key=key)

    keys, head = jax.random.split(getkey(), 5), eqx.nn.Linear(30, 8, key=getkey())
    one_by_one = ntt.scores.Random(getkey())([*map(make, keys), head])
    stacked = ntt.scores.Random(getkey())([eqx.filter_vmap(make)(keys), head])
    expected, found = (masks.allocate(tree, 0.1, "erk") for tree in (one_by_one, stacked))
    names = ("[0].weight", "[1].weight", "[2].weight", "[3].weight_ih", "[3].weight_hh")
    for name in (*names, "[4].weight"):
        np.testing.assert_allclose(found[f"[0]{name}"], expected[f"[0]{name}"], rtol=1e-12)
    shapes = layer_shapes(stacked)
    for density in (0.1, 0.4):
        shares = masks.allocate(stacked, density, "erk")
        mask = masks.make_mask(stacked, density, allocation="erk")
        for (name, share), leaf in zip(shares.items(), jax.tree.leaves(mask), strict=True):
            assert abs(int(leaf.sum()) - share * leaf.size) <= 1, name
        traced = jax.jit(lambda d: densities_of(shapes, d, "erk"))(jnp.float32(density))
        for name, share in shares.items():
            np.testing.assert_allclose(traced[name], share, rtol=1e-5)


def test_allocate_takes_no_model(getkey):
    model = eqx.nn.MLP(3, 2, 4, 1, key=getkey())
    for tree in (model, ntt.sparsify(model)):
        with pytest.raises(ValueError, match="allocate: needs a mask or a score tree"):
            masks.allocate(tree, 0.5)
