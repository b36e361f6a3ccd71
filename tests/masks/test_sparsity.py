"""`Sparsity`: one description for every mask; schedules, allocations and patterns of one's own."""

import math
from collections.abc import Mapping
from fractions import Fraction

import equinox as eqx
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from helpers.comparison import counts
from hypothesis import given, settings, strategies as st

import ntt_eqx as ntt
from ntt_eqx._masks._allocation import densities_of, exact_product, whole_counts

SHAPES = {"a": (12, 16), "b": (8, 12), "c": (4, 8)}


@pytest.fixture
def scores():
    rng = np.random.default_rng(0)
    return {n: jnp.asarray(rng.normal(size=s), jnp.float32) for n, s in SHAPES.items()}


@pytest.mark.parametrize(
    "settings",
    [
        {"density": 0.3},
        {"density": 0.3, "scope": "global"},
        {"density": 0.3, "allocation": "erk"},
        {"density": 0.5, "pattern": ntt.NM(2, 4)},
        {"density": 0.5, "pattern": ntt.Block((4, 4))},
        {"density": {"['a']": 0.25, "['b']": 0.5, "['c']": 1.0}},
    ],
)
def test_every_maker_of_masks_takes_it(scores, settings):
    sparsity = ntt.Sparsity(**settings)
    settings = dict(settings)
    expected = ntt.make_mask(scores, settings.pop("density"), **settings)
    assert eqx.tree_equal(ntt.make_mask(scores, sparsity), expected)
    assert eqx.tree_equal(eqx.filter_jit(sparsity.mask)(scores), expected)
    assert bool(sparsity.holds(expected))
    assert not bool(sparsity.holds(jax.tree.map(jnp.ones_like, expected)))
    assert ntt.Sparsity(**{"density": sparsity.density, **settings}) == sparsity
    hash(sparsity)


@pytest.mark.parametrize("allocation", [None, "erk"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_schedule_gives_at_each_step_the_mask_of_its_density(scores, scope, allocation):
    if scope == "global" and allocation is not None:
        pytest.skip("an allocation belongs to layers")
    schedule = ntt.GradualDensity(final=0.1, end=10)
    sparsity = ntt.Sparsity(schedule, scope, allocation)
    at = jax.jit(lambda step: sparsity.mask(scores, step))
    kept = []
    for step in (0, 2, 3, 5, 9, 10, 50):
        mask = at(jnp.int32(step))
        expected = ntt.Sparsity(float(schedule(step)), scope, allocation).quiet_mask(scores)
        assert counts(mask) == counts(expected)
        assert eqx.tree_equal(mask, expected)
        kept.append(sum(counts(mask)))
    assert kept == sorted(kept, reverse=True) and kept[0] == 320 and kept[-1] == 32


def test_gradual_density_is_its_formula():
    schedule = ntt.GradualDensity(final=0.1, end=9, initial=0.9, begin=1)
    found = [float(schedule(step)) for step in (0, 1, 5, 9, 20)]
    np.testing.assert_allclose(found, [0.9, 0.9, 0.1 + 0.8 * 0.125, 0.1, 0.1], rtol=1e-6)


@pytest.mark.parametrize(
    "schedule",
    [
        lambda step: 0.5 if step > 3 else 0.9,
        lambda step: 0.9 - 0.1 * math.tanh(step),
        lambda step: float(np.interp(np.asarray(step), [0, 9], [0.9, 0.5])),
        lambda step: [0.9, 0.5][step],
    ],
)
def test_a_schedule_of_values_says_how_it_is_written_for_a_compiled_step(schedule, scores):
    sparsity = ntt.Sparsity(schedule)
    assert sum(counts(sparsity.mask(scores, 0))) == 288
    with pytest.raises(ValueError, match=r"schedule asks for the value of its step, .* jnp\.where"):
        jax.jit(lambda step: sparsity.mask(scores, step))(jnp.int32(1))


def test_a_layer_under_a_schedule_keeps_a_weight(scores):
    sparsity = ntt.Sparsity(lambda step: 1e-3 + 0.0 * step)
    assert counts(jax.jit(lambda s: sparsity.mask(scores, s))(jnp.int32(1))) == [1, 1, 1]
    with pytest.raises(ValueError, match=r"leaves no weight in layer \['a'\]"):
        sparsity.mask(scores, 0)


def test_the_sparsity_of_a_mask_keeps_the_counts_of_every_layer(scores):
    mask = ntt.make_mask(scores, 0.4, allocation="erk")
    held = ntt.Sparsity(0.4).of_mask(mask)
    assert held.density != 0.4 and counts(held.mask(scores)) == counts(mask)
    blocks = ntt.make_mask(scores, 0.5, pattern=ntt.Block((5, 5)))
    held = ntt.Sparsity(0.2, pattern=ntt.Block((5, 5))).of_mask(blocks)
    assert eqx.tree_equal(held.mask(scores), blocks)
    with pytest.raises(ValueError, match="does not have the pattern"):
        ntt.Sparsity(0.2, pattern=ntt.Block((5, 5))).of_mask(mask)


class Diagonals(ntt.AbstractLayerPattern):
    """Whole diagonals, wrapped around, are kept or dropped."""

    def groups(self, scores, name, density):
        return jnp.stack([jnp.trace(jnp.roll(scores, -d, axis=1)) for d in range(scores.shape[1])])

    def spread(self, marks, shape, name):
        rows, columns = jnp.indices(shape)
        return marks[(columns - rows) % shape[1]]


def test_a_pattern_of_ones_own(scores):
    square = {"w": jnp.asarray(np.random.default_rng(1).normal(size=(6, 6)), jnp.float32)}
    mask = ntt.make_mask(square, 0.5, pattern=Diagonals())["w"]
    sums = [float(np.trace(np.roll(square["w"], -d, axis=1))) for d in range(6)]
    kept = {d for d in range(6) if bool(mask[0, d])}
    assert kept == set(np.argsort(sums)[3:])
    assert all(bool(mask[r, (r + d) % 6]) == (d in kept) for r in range(6) for d in range(6))


class SharedRows(ntt.AbstractPattern):
    """Rows of all weights are kept or dropped together."""

    def densities(self, shapes, density, allocation):
        return dict(density) if isinstance(density, Mapping) else {"rows": density}

    def group_scores(self, scores, densities):
        return {"rows": sum(leaf.mean(axis=1) for leaf in scores.values())}

    def masks(self, marks, shapes):
        spread = lambda shape: jnp.broadcast_to(marks["rows"][:, None], shape)
        return {name: spread(shape) for name, shape in shapes.items()}

    def marks_of(self, masks):
        return {"rows": jnp.any(jnp.stack([m.any(axis=1) for m in masks.values()]), axis=0)}

    def pools_of(self, name):
        return ("rows",)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_pattern_over_several_layers_of_ones_own(scope):
    rng = np.random.default_rng(2)
    layers = {n: jnp.asarray(rng.normal(size=(8, k)), jnp.float32) for n, k in (("a", 3), ("b", 5))}
    sparsity = ntt.Sparsity(0.5, scope, pattern=SharedRows())
    mask = ntt.make_mask(layers, sparsity)
    best = np.argsort(np.mean(layers["a"], axis=1) + np.mean(layers["b"], axis=1))[4:]
    for leaf in mask.values():
        assert set(np.flatnonzero(leaf.all(axis=1))) == set(best.tolist())
        assert int(leaf.any(axis=1).sum()) == 4
    assert bool(sparsity.holds(mask))
    held = sparsity.of_mask(mask)
    assert dict(held.density) == {"rows": 0.5}
    other = {name: -leaf for name, leaf in layers.items()}
    again = held.mask(other)
    assert eqx.tree_equal(again, ntt.make_mask(other, sparsity))
    torn = {**mask, "a": mask["a"].at[int(best[0]), 0].set(False)}
    assert not bool(sparsity.holds(torn))
    with pytest.raises(ValueError, match=r"layer \['a'\] the given mask does not have the pattern"):
        sparsity.of_mask(torn)
    with pytest.raises(ValueError, match=r"scores of layer \['a'\] cannot rank"):
        ntt.make_mask({name: jnp.ones_like(leaf) for name, leaf in layers.items()}, 0.5,
                      pattern=SharedRows())  # fmt: skip


class TwoPools(SharedRows):
    """The first weight and the second, as pools that are named in two orders."""

    def densities(self, shapes, density, allocation):
        return {"second": density["second"], "first": density["first"]}

    def group_scores(self, scores, densities):
        return {"first": scores["['a']"], "second": scores["['b']"]}

    def masks(self, marks, shapes):
        return {"['b']": marks["second"], "['a']": marks["first"]}

    def pools_of(self, name):
        return ("first",) if name == "['a']" else ("second",)


def test_a_pool_keeps_its_own_density():
    rng = np.random.default_rng(3)
    layers = {n: jnp.asarray(rng.normal(size=(4, 5)), jnp.float32) for n in "ab"}
    masks = ntt.make_mask(layers, {"first": 0.25, "second": 0.75}, pattern=TwoPools())
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {"a": 5, "b": 15}


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"density": 0.0}, r"Sparsity: density must be a number in \(0, 1\], got 0.0"),
        ({"density": {"a": 2.0}}, r"Sparsity: a: density must be a number"),
        ({"density": 0.5, "scope": "network"}, "Sparsity: scope must be"),
        ({"density": 0.5, "allocation": "ERK"}, "Sparsity: allocation must be"),
        ({"density": 0.5, "scope": "global", "allocation": "erk"}, "takes one density"),
        ({"density": 0.5, "pattern": "2:4"}, "pattern must be an AbstractPattern, got '2:4'"),
    ],
)
def test_what_cannot_be_is_refused(settings, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=message):
        ntt.Sparsity(**settings)


def test_a_schedule_out_of_range_and_contradictions_are_refused(scores):
    with pytest.raises(ValueError, match="the schedule at step 3: density must be a number"):
        ntt.Sparsity(lambda step: 2.0).mask(scores, 3)
    with pytest.raises(ValueError, match="has density 0.5, but .* a schedule"):
        by_step = ntt.Sparsity(ntt.GradualDensity(0.5, 3), pattern=ntt.NM())
        jax.jit(lambda s: by_step.mask(scores, s))(jnp.int32(1))
    with pytest.raises(ValueError, match="give these to Sparsity"):
        ntt.make_mask(scores, ntt.Sparsity(0.5), allocation="erk")


PAIR = st.tuples(st.floats(2.0**-20, 1, width=32), st.integers(1, 2**30))


@settings(deadline=None)
@given(st.lists(PAIR, min_size=8, max_size=8))
def test_products_of_shares_and_sizes_are_exact(pairs):
    """Remainders decide which layer gets one more, so that they are exact to float32, too."""
    shares, sizes = zip(*pairs, strict=True)
    counts, left = exact_product(jnp.asarray(shares, jnp.float32), jnp.asarray(sizes, jnp.int32))
    for share, size, count, rest in zip(shares, sizes, counts, left, strict=True):
        whole = Fraction(share) * size
        assert int(count) == math.floor(whole)
        assert abs(float(rest) - float(whole - math.floor(whole))) <= 2.0**-23
        assert (float(rest) == 0.5) == (whole - math.floor(whole) == Fraction(1, 2))


def test_a_schedule_shares_out_as_one_density_does():
    shapes = {"a": (64, 20), "b": (64, 64), "c": (64, 64), "d": (10, 64)}
    sizes = [math.prod(shape) for shape in shapes.values()]

    @jax.jit
    def traced(density):
        return whole_counts(densities_of(shapes, density, "erk"), sizes, True, density)

    for density in np.random.default_rng(0).uniform(0.01, 1, 100).astype(np.float32):
        known = float(density)
        wanted = whole_counts(densities_of(shapes, known, "erk"), sizes, True, known)
        assert [int(count) for count in traced(density)] == wanted
