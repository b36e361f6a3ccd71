"""Scores that cannot rank make no mask: refused, marked inside jit; no pruned weight returns."""

from fractions import Fraction

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.comparison import counts
from helpers.refusals import linear, refusals

import ntt_eqx as ntt
from ntt_eqx import scores
from ntt_eqx._masks._allocation import (
    _round,
    densities_of,
    exact_product,
    whole_counts,
)
from ntt_eqx._masks._select import select

RNG = np.random.default_rng(0)
GOOD = RNG.normal(size=(6, 8)).astype(np.float32)


def mostly(value, size=48, distinct=10):
    """`distinct` different numbers above 1, and `value` in all other places."""
    flat = np.full(size, value, np.float32)
    flat[:: size // distinct][:distinct] = 2 + np.arange(distinct)
    return flat.reshape(6, -1)


CANNOT = {
    "zero": (np.zeros((6, 8)), 0.5, "all are 0"),
    "equal": (np.full((6, 8), 3.0), 0.9, "all are 3"),
    "infinite": (np.full((6, 8), np.inf), 0.1, "all are inf"),
    "-infinite": (np.full((6, 8), -np.inf), 0.5, "48 are -infinity"),
    "some infinite": (np.where(GOOD > 0.5, np.inf, GOOD), 0.1, "are inf"),
    "most zero": (mostly(0.0), 0.5, "38 of 48 are 0"),
    "most equal, most kept": (-mostly(-1.0), 0.5, "38 of 48 are 1"),
}
CAN = {
    "a few zeros": (np.where(GOOD > 0.5, 0.0, np.abs(GOOD)), 0.9),
    "most zero, all of them dropped": (mostly(0.0), 10 / 48),
    "most equal, all of them kept": (mostly(0.0), 1.0),
    "marks": (GOOD > np.median(GOOD), 0.5),
    "two highest of sixteen": (np.r_[np.full(2, 9.0), np.arange(14.0)].reshape(4, 4), 1 / 16),
    "bars": (np.where(GOOD > 0, -np.inf, GOOD), 0.25),
    "integers": (RNG.integers(0, 5, (60, 80)), 0.3),
    "bfloat16": (jnp.asarray(RNG.normal(size=(60, 80)), jnp.bfloat16), 0.1),
    "float16": (jnp.asarray(RNG.normal(size=(60, 80)), jnp.float16), 0.5),
}


def tree(values):
    values = jnp.asarray(values)
    wide = values if jnp.issubdtype(values.dtype, jnp.floating) else values.astype(jnp.float32)
    return {"a": wide, "b": jnp.asarray(GOOD, wide.dtype)}


@pytest.mark.parametrize("name", CANNOT)
@pytest.mark.parametrize("options", [{}, {"allocation": "erk"}])
def test_scores_that_cannot_rank_make_no_mask(name, options):
    values, density, seen = CANNOT[name]
    given = tree(np.float32(values))
    with pytest.raises(ValueError, match=rf"(?s)scores of layer \['a'\] cannot rank .*{seen}"):
        ntt.make_mask(given, density, **options)
    inside = jax.jit(lambda s: ntt.make_mask(s, density, **options))(given)
    assert counts(inside)[0] == 0 and counts(inside)[1] > 0  # the mark: a layer without a weight


@pytest.mark.parametrize("name", CAN)
def test_harmless_ties_go_to_the_lowest_index(name):
    values, density = CAN[name]
    given = tree(values)
    mask = ntt.make_mask(given, density)
    assert counts(mask)[0] == round(density * given["a"].size)
    assert eqx.tree_equal(jax.jit(lambda s: ntt.make_mask(s, density))(given), mask)


def test_all_layers_together():
    zeros = {"a": jnp.zeros((6, 8)), "b": jnp.asarray(GOOD[:2])}
    with pytest.raises(ValueError, match=r"all layers together cannot rank .*48 of 64 are 0"):
        ntt.make_mask(zeros, 0.5, scope="global")
    inside = jax.jit(lambda s: ntt.make_mask(s, 0.5, scope="global"))(zeros)
    assert counts(inside) == [0, 0]
    few = {"a": jnp.zeros((6, 8)), "b": jnp.asarray(np.abs(GOOD[:2]))}
    with pytest.warns(ntt.LayerCollapseWarning):  # the zeros are below the threshold
        assert counts(ntt.make_mask(few, 16 / 64, scope="global")) == [0, 16]


@pytest.mark.parametrize(
    "pattern, values",
    [
        (ntt.NM(2, 4), np.zeros((6, 8))),
        (ntt.NM(2, 4), np.tile([1.0, 1, 1, 0], (6, 2))),
        (ntt.NM(1, 2), np.full((6, 8), np.inf)),
        (ntt.Block((2, 2)), np.tile([[1.0, 2], [2, 1]], (3, 4))),
        (ntt.Channels(1), np.tile([[1.0], [2]], (3, 8))),
    ],
)
def test_groups_that_cannot_be_ranked(pattern, values):
    given = {"a": jnp.asarray(values, jnp.float32)}
    with pytest.raises(ValueError, match=r"layer \['a'\] cannot rank"):
        ntt.make_mask(given, 0.5, pattern=pattern)
    inside = jax.jit(lambda s: ntt.make_mask(s, 0.5, pattern=pattern))(given)
    assert counts(inside) == [0]


def test_sums_of_blocks_in_16_bits_neither_overflow_nor_tie():
    large = jnp.asarray(60000 + 32 * np.arange(16).reshape(4, 4), jnp.float16)
    mask = ntt.make_mask({"a": large}, 0.5, pattern=ntt.Block((2, 2)))["a"]
    np.testing.assert_array_equal(mask, np.arange(4)[:, None] >= np.full(4, 2))
    near = jnp.asarray(1 + np.arange(64).reshape(8, 8) / 1024, jnp.bfloat16)
    means = np.asarray(near, np.float64).reshape(4, 2, 4, 2).mean((1, 3))
    mask = ntt.make_mask({"a": near}, 0.25, pattern=ntt.Block((2, 2)))["a"]
    assert means[np.asarray(mask[::2, ::2])].min() >= np.sort(means, None)[-4]


def test_in_many_rounds_weights_without_a_score_go_first():
    """One-hot features: most weights see nothing, and which of these go first does not matter."""
    model, x = linear(40, 6), np.eye(40, dtype=np.float32)[:10]
    with pytest.raises(ValueError, match="cannot rank"):
        ntt.prune(model, scores.LogitSnip(), 0.5, x)
    sparse = ntt.prune(model, scores.LogitSnip(), 0.2, x, steps=10)
    assert not np.asarray(sparse.mask.weight)[:, 10:].any()
    with pytest.raises(ValueError, match="cannot rank"):
        ntt.prune(model, scores.LogitSnip(), 0.2, 0 * x, steps=10)


@pytest.fixture
def model(getkey):
    return eqx.nn.MLP(20, 10, 30, 1, key=getkey())


@pytest.mark.parametrize(
    "first, then",
    [
        ({}, {"density": 0.5}),
        ({}, {"density": 0.06, "allocation": "erk"}),
        ({"scope": "global"}, {"density": 0.06}),
        ({}, {"density": 0.5, "pattern": ntt.NM(1, 2)}),
        ({}, {"density": 0.04, "pattern": ntt.Block((2, 2), spare=())}),
        ({}, {"density": 0.5, "steps": 3}),
        ({}, {"density": 0.5, "invert": True}),
    ],
)
def test_pruned_weights_return_only_with_regrow(model, first, then):
    if first:
        few = ntt.sparsify(model)
        at = lambda s: s.mask.layers[0].weight
        few = eqx.tree_at(at, few, jnp.zeros((30, 20), bool).at[:3, :4].set(True))
    else:
        few = ntt.prune(model, scores.Magnitude(), 0.05)
    options = dict(then)
    density = options.pop("density")
    with pytest.raises(ValueError, match=r"prune: layer .* pruned ones would return.*regrow=True"):
        ntt.prune(few, scores.Magnitude(), density, **options)
    if "invert" not in then and "steps" not in then:
        again = ntt.prune(few, scores.Magnitude(), density, regrow=True, **options)
        pairs = zip(jax.tree.leaves(again.mask), jax.tree.leaves(few.mask), strict=True)
        assert any(bool((new & ~old).any()) for new, old in pairs)

    @jax.jit
    def inside(weights):
        known = eqx.tree_at(lambda s: s.model.layers[0].weight, few, weights)
        return ntt.prune(known, scores.Magnitude(), density, **options).mask

    assert 0 in counts(inside(model.layers[0].weight))


def test_a_sparse_model_is_pruned_further_in_steps(model):
    half = ntt.prune(model, scores.Magnitude(), 0.5)
    sparse = ntt.prune(half, scores.Magnitude(), 0.1, steps=5)  # begins with densities above 0.5
    assert eqx.tree_equal(sparse, ntt.prune(model, scores.Magnitude(), 0.1))


def test_selections_say_whether_the_index_chose():
    zeros = jnp.zeros(8).at[:2].set(jnp.asarray([2.0, 1.0]))
    said = lambda count, **how: bool(select(zeros, jnp.int32(count), **how)[1])
    assert [said(k) for k in range(9)] == [False, False, False, *[True] * 5, False]
    assert not said(7, lenient=True) and said(5, lenient=True)


def test_counts_of_traced_shares_are_exact():
    rng = np.random.default_rng(1)
    shares = np.r_[
        rng.uniform(0, 1, 2000), 10.0 ** rng.uniform(-9, 0, 2000), np.arange(1, 101) / 100
    ].astype(np.float32)
    shares = np.r_[shares, rng.integers(1, 257, 400).astype(np.float32) / 256]
    count = jax.jit(lambda shares, sizes: _round(*exact_product(shares, sizes)))
    for high in (100, 2**24, 2**31 - 1):
        sizes = rng.integers(1, high, shares.size)
        sizes[:50] = high
        found = count(jnp.asarray(shares), jnp.asarray(sizes, jnp.int32))
        exact = [round(Fraction(float(d)) * int(n)) for d, n in zip(shares, sizes, strict=True)]
        np.testing.assert_array_equal(found, exact)


def test_counts_that_are_shared_out_add_up_under_a_schedule():
    shapes = {"a": (5000, 4000), "b": (300, 2000), "c": (10, 300), "d": (7, 3)}
    sizes = [int(np.prod(s)) for s in shapes.values()]

    @jax.jit
    def count(density):
        shares = densities_of(shapes, density, "erk")
        return jnp.stack(whole_counts(shares, sizes, True, density))

    for density in np.asarray([0.001, 0.013, 0.1, 0.37, 0.731, 0.999, 1.0], np.float32):
        found = np.asarray(count(density))
        assert found.sum() == round(float(density) * sum(sizes))
        assert (found >= 1).all() and (found <= sizes).all()


test_refusals = refusals(
    {
        "a class": (lambda: ntt.prune(linear(), scores.Snip, 0.5), r"the class Snip: .*Snip\(\)"),
        "a name": (lambda: ntt.prune(linear(), "snip", 0.5), "prune: score must be .* got 'snip'"),
        "no score": (lambda: ntt.prune(linear(), None, 0.5), "prune: score must be .* got None"),
        "steps": (lambda: ntt.prune(linear(), scores.Magnitude(), 0.5, steps=1.5), "got 1.5"),
        "a schedule": (
            lambda: ntt.prune(
                linear(), scores.Magnitude(), ntt.Sparsity(ntt.GradualDensity(0.5, 9))
            ),
            "prune: a schedule of the step belongs to a transfer",
        ),
        "a model as scores": (
            lambda: ntt.make_mask(eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0)), 0.1),
            r"(?s)make_mask: scores.activation must be .*prune\(model, score, density\)",
        ),
        "a sparse model as scores": (
            lambda: ntt.make_mask(ntt.sparsify(linear()), 0.1),
            "make_mask: takes the scores of weights and not a SparseModel",
        ),
        "a density as mask": (
            lambda: ntt.SparseModel(linear(), 0.1),
            r"SparseModel: the mask must be a tree .* got 0.1; prune\(model, score, density\)",
        ),
        "no mask": (lambda: ntt.SparseModel(linear(), None), "SparseModel: the mask must .* None"),
        "a sparse model's model": (
            lambda: ntt.SparseModel(ntt.sparsify(linear()), ntt.sparsify(linear()).mask),
            "SparseModel: the model is a SparseModel already",
        ),
        "shuffled weights": (
            lambda: ntt.shuffle_mask(linear(), jax.random.key(0)),
            "shuffle_mask: mask.weight must be a boolean array, got float32",
        ),
        "a shuffled model": (
            lambda: ntt.shuffle_mask(ntt.sparsify(linear()), jax.random.key(0)),
            "shuffle_mask: takes a mask, got a SparseModel",
        ),
        "shuffled numbers": (
            lambda: ntt.shuffle_mask(0.1, jax.random.key(0)),
            "shuffle_mask: mask must be a boolean array, got float",
        ),
        "nothing to shuffle": (
            lambda: ntt.shuffle_mask({"w": None}, jax.random.key(0)),
            "shuffle_mask: the mask has no arrays",
        ),
        "a dense model drawn again": (
            lambda: ntt.reinitialise(linear(), jax.random.key(0)),
            "reinitialise: needs a SparseModel, got Linear",
        ),
        "inverted text": (lambda: ntt.invert_scores({"w": "a"}), "invert_scores: .* got str"),
        "outputs of a mask": (
            lambda: ntt.check_collapse(ntt.sparsify(linear()).mask, np.ones((1, 3))),
            "check_collapse: give a SparseModel",
        ),
        "collapse of a number": (lambda: ntt.check_collapse(0.1), "check_collapse: .* got float"),
        "spared layers": (
            lambda: ntt.prune(
                linear(), scores.Magnitude(), 0.5, pattern=ntt.Channels(spare=(".x",))
            ),
            r"spare=\['.x'\] names no layer",
        ),
        "one spared layer": (
            lambda: ntt.Channels(spare=".weight"),
            "Channels: spare must be a tuple of paths",
        ),
        "nothing to prune": (
            lambda: ntt.prune(linear(), scores.Magnitude(), 0.5, pattern=ntt.Channels()),
            r"leaves every layer whole.*spare=\(\)",
        ),
    }
)
