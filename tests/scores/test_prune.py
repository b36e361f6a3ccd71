"""Pruning in one shot and in steps."""

import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ntt_eqx as ntt
from ntt_eqx import make_mask, scores, sparsify


class Spy(scores.AbstractLabelFreeScore):
    """The magnitude, and a record of the densities that it was asked at."""

    seen: list = eqx.field(static=True)

    def __call__(self, model, x=None):
        self.seen.append(float(model.density()))
        return scores.Magnitude()(model)


@pytest.fixture
def model(getkey):
    return eqx.nn.MLP(20, 10, 50, 1, key=getkey())  # 1,000 and 500 weights


def kept(sparse):
    return np.concatenate([np.asarray(m).ravel() for m in jax.tree.leaves(sparse.mask)])


@pytest.mark.parametrize(
    "options",
    [
        {"density": 0.5, "scope": "global"},
        {"density": 0.5, "allocation": "erk"},
        {"density": {".layers[0].weight": 0.5, ".layers[1].weight": 1.0}, "pattern": ntt.NM()},
    ],
)
def test_one_shot_is_a_score_and_a_mask(options, model, getkey):
    x, y = jax.random.normal(getkey(), (6, 20)), jnp.arange(6, dtype=jnp.int32)
    score, options = scores.Snip(), dict(options)
    density = options.pop("density")
    sparse = scores.prune(model, score, density, (x, y), **options)
    assert eqx.tree_equal(sparse.mask, make_mask(score(model, (x, y)), density, **options))
    assert eqx.tree_equal(sparse.model, model)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("exponential", [1.0, 0.1**0.25, 0.1**0.5, 0.1**0.75]), ("linear", [1.0, 0.775, 0.55, 0.325])],
)
def test_schedules(schedule, expected, model):
    seen = []
    sparse = scores.prune(model, Spy(seen), 0.1, steps=4, schedule=schedule)
    assert seen == pytest.approx(expected, abs=1e-3)
    assert eqx.tree_equal(sparse, scores.prune(model, scores.Magnitude(), 0.1))
    assert kept(sparse).sum() == 150


@pytest.mark.parametrize("options", [{"scope": "global"}, {"allocation": "erk"}, {}])
def test_steps_keep_exact_counts_and_never_regrow(options, model, getkey):
    score = scores.Random(getkey())
    masks_seen = []

    class Watched(scores.AbstractLabelFreeScore, scores.AbstractDrawingScore):
        key: jax.Array

        def __call__(self, model, x=None):
            masks_seen.append(kept(model))
            return scores.Random(self.key)(model)

    sparse = scores.prune(model, Watched(score.key), 0.04, steps=6, **options)
    masks_seen.append(kept(sparse))
    for before, after in zip(masks_seen[:-1], masks_seen[1:], strict=True):
        assert not (after & ~before).any()
    assert kept(sparse).sum() == 60
    again = scores.prune(model, Watched(score.key), 0.04, steps=6, regrow=True, **options)
    assert kept(again).sum() == 60
    assert not eqx.tree_equal(again.mask, sparse.mask)  # each step draws anew


def test_densities_given_per_layer_are_scheduled(model):
    density = {".layers[0].weight": 0.1, ".layers[1].weight": 1.0}
    sparse = scores.prune(model, scores.Magnitude(), density, steps=3)
    assert [int(m.sum()) for m in jax.tree.leaves(sparse.mask)] == [100, 500]


def test_prunes_further_and_keeps_what_is_gone_gone(model, getkey):
    first = scores.prune(model, scores.Random(getkey()), 0.5)
    second = scores.prune(first, scores.Random(getkey()), 0.2)
    assert not (kept(second) & ~kept(first)).any()
    assert kept(second).sum() == 300


def test_inverted_scores_keep_the_lowest(model):
    high = kept(scores.prune(model, scores.Magnitude(), 0.5))
    low = kept(scores.prune(model, scores.Magnitude(), 0.5, invert=True))
    np.testing.assert_array_equal(high, ~low)


def test_iterated_synflow_saves_layers_that_magnitude_loses(getkey):
    """At the sparsity where every layer can keep but a few weights (Tanaka et al., fig. 1)."""
    model = eqx.nn.MLP(30, 4, 30, 3, key=getkey(), use_bias=False)
    x = jax.random.normal(getkey(), (20, 30))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "prune: no path")  # eleven weights, four outputs
        sparse = scores.prune(model, scores.SynFlow(), 0.004, x, scope="global", steps=30)
    assert kept(sparse).sum() == round(0.004 * 2820)
    with pytest.warns(ntt.LayerCollapseWarning, match="prune: layer collapse"):
        scores.prune(model, scores.Magnitude(), 0.004, scope="global")


def test_bad_options_are_refused(model):
    with pytest.raises(ValueError, match="steps must be at least 1"):
        scores.prune(model, scores.Magnitude(), 0.5, steps=0)
    with pytest.raises(ValueError, match="one density, so it takes one step"):
        scores.prune(model, scores.Magnitude(), 0.5, steps=2, pattern=ntt.NM())
    with pytest.raises(ValueError, match=r"prune: density must be a number in \(0, 1\]"):
        scores.prune(model, scores.Magnitude(), float("nan"), steps=2)
    with pytest.raises(Exception, match="schedule"):
        scores.prune(model, scores.Magnitude(), 0.5, schedule="cubic")  # pyright: ignore
    with pytest.raises(ValueError, match="has NaN entries"):
        broken = eqx.tree_at(lambda m: m.layers[0].weight, model, jnp.full((50, 20), jnp.nan))
        scores.prune(broken, scores.Magnitude(), 0.5)


def test_a_pruned_nan_stays_out(model):
    """What is stored under the mask may be anything."""
    mask = sparsify(model).mask
    mask = eqx.tree_at(
        lambda m: m.layers[0].weight, mask, mask.layers[0].weight.at[0, 0].set(False)
    )
    broken = eqx.tree_at(
        lambda m: m.layers[0].weight, model, model.layers[0].weight.at[0, 0].set(jnp.nan)
    )
    sparse = scores.prune(sparsify(broken).with_mask(mask), scores.Magnitude(), 0.5)
    assert not sparse.mask.layers[0].weight[0, 0]
