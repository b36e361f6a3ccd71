"""Allocations over layers, patterns, and the ablations of masks."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from ntt_eqx import _masks as masks, prune, scores, sparsify, weight_layouts
from ntt_eqx._masks._allocation import allocate_shapes, round_together, whole_counts

LENET = {"a": (300, 784), "b": (100, 300), "c": (10, 100)}


def ones(shapes):
    return {name: jnp.ones(shape) for name, shape in shapes.items()}


def distinct(shapes):
    return {n: jnp.arange(float(math.prod(s))).reshape(s) for n, s in shapes.items()}


def test_erk_is_proportional_to_sum_over_product():
    density = masks.allocate(ones(LENET), 0.03, "erk")
    raw = {f"['{n}']": sum(s) / math.prod(s) for n, s in LENET.items()}
    scale = {name: density[name] / raw[name] for name in raw}
    assert len({round(s, 9) for s in scale.values()}) == 1
    total = sum(d * math.prod(s) for d, s in zip(density.values(), LENET.values(), strict=True))
    assert total == pytest.approx(0.03 * 266200)


def test_erk_keeps_small_layers_dense():
    density = masks.allocate(ones(LENET), 0.2, "erk")
    assert density["['c']"] == 1.0
    total = sum(d * math.prod(s) for d, s in zip(density.values(), LENET.values(), strict=True))
    assert total == pytest.approx(0.2 * 266200)
    assert set(masks.allocate(ones(LENET), 1.0, "erk").values()) == {1.0}


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(1, 40), min_size=2, max_size=4), min_size=1, max_size=5),
    density=st.floats(0.01, 1.0),
)
def test_erk_spends_the_whole_budget(shapes, density):
    tree = {str(i): np.ones(shape) for i, shape in enumerate(shapes)}
    given_out = masks.allocate(tree, density, "erk")
    sizes = [math.prod(shape) for shape in shapes]
    assert all(0 < d <= 1 for d in given_out.values())
    total = sum(d * s for d, s in zip(given_out.values(), sizes, strict=True))
    assert total == pytest.approx(density * sum(sizes))
    counts = round_together(
        [d * s for d, s in zip(given_out.values(), sizes, strict=True)], round(total)
    )
    assert sum(counts) == round(total)
    assert all(0 <= c <= s for c, s in zip(counts, sizes, strict=True))


def test_erk_masks_have_the_exact_density_of_the_network():
    rng = np.random.default_rng(0)
    tree = {n: jnp.asarray(rng.normal(size=s), jnp.float32) for n, s in LENET.items()}
    mask = masks.make_mask(tree, 0.05, allocation="erk")
    assert sum(int(m.sum()) for m in mask.values()) == round(0.05 * 266200)
    assert float(mask["c"].mean()) > float(mask["b"].mean()) > float(mask["a"].mean())


def test_densities_by_layer():
    tree = distinct({"a": (4, 5), "b": (10, 10)})
    mask = masks.make_mask(tree, {"['a']": 0.5, "['b']": 0.1})
    assert [int(m.sum()) for m in mask.values()] == [10, 10]
    assert masks.allocate(tree, {"['b']": 1, "['a']": 0.5}) == {"['a']": 0.5, "['b']": 1.0}
    with pytest.raises(ValueError, match=r"missing \[\"\['b'\]\"\], unknown \['x'\]"):
        masks.make_mask(tree, {"['a']": 0.5, "x": 0.5})
    with pytest.raises(ValueError, match=r"\['b'\]: density must be a number"):
        masks.make_mask(tree, {"['a']": 0.5, "['b']": 0.0})
    with pytest.raises(ValueError, match="leave nothing to allocate"):
        masks.make_mask(tree, {"['a']": 0.5, "['b']": 0.5}, allocation="erk")


def test_names_and_densities_of_no_meaning_are_refused_without_a_type_checker(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    tree = ones({"a": (4, 5)})
    with pytest.raises(ValueError, match="allocation must be 'uniform' or 'erk', got 'ERK'"):
        masks.allocate(tree, 0.5, "ERK")  # pyright: ignore
    with pytest.raises(ValueError, match="scope must be 'layer' or 'global', got 'network'"):
        masks.make_mask(tree, 0.5, scope="network")  # pyright: ignore
    for density in ("half", None, [0.5, 0.5], True):
        with pytest.raises(ValueError, match=r"must be a number in \(0, 1\], got"):
            masks.make_mask(tree, density)  # pyright: ignore
    with pytest.raises(ValueError, match=r"must be a number in \(0, 1\], got"):
        jax.jit(lambda density: masks.make_mask(tree, density))(0.5)


def test_options_that_contradict_each_other_are_refused():
    tree = ones({"a": (4, 8)})
    for options in (
        {"density": {"['a']": 0.5}},
        {"density": 0.5, "allocation": "erk"},
        {"density": 0.5, "allocation": "uniform"},
        {"density": 0.5, "pattern": masks.NM()},
    ):
        with pytest.raises(ValueError, match="scope='global' takes one density"):
            masks.make_mask(tree, scope="global", **options)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), nm=st.sampled_from([(2, 4), (1, 4), (3, 3), (1, 2)]))
def test_n_of_every_m(seed, nm):
    n, m = nm
    rng = np.random.default_rng(seed)
    values = rng.integers(-2, 3, size=(3, 12)) if seed % 2 else rng.normal(size=(3, 12))
    scores = values.astype(np.float32)
    (mask,) = masks.make_mask([jnp.asarray(scores)], n / m, pattern=masks.NM(n, m))
    for row, kept in zip(scores, np.asarray(mask), strict=True):
        for start in range(0, 12, m):
            group = row[start : start + m]
            best = np.argsort(-group, kind="stable")[:n]
            assert set(np.flatnonzero(kept[start : start + m])) == set(best)


def test_n_of_m_runs_over_input_channels():
    rng = np.random.default_rng(1)
    scores = jnp.asarray(rng.normal(size=(5, 8, 3, 3)), jnp.float32)
    (mask,) = masks.make_mask([scores], 0.5, pattern=masks.NM(2, 4))
    groups = np.asarray(mask).reshape(5, 2, 4, 3, 3)
    assert (groups.sum(axis=2) == 2).all()


def test_n_of_m_has_one_density_and_names_layers_that_do_not_fit():
    tree = distinct({"a": (4, 8), "b": (4, 6)})
    with pytest.raises(ValueError, match=r"2:4 needs a multiple of 4 inputs, but \['b'\]"):
        masks.make_mask(tree, 0.5, pattern=masks.NM())
    mask = masks.make_mask(tree, {"['a']": 0.5, "['b']": 1.0}, pattern=masks.NM())
    assert int(mask["a"].sum()) == 16
    assert bool(mask["b"].all())
    with pytest.raises(ValueError, match="has density 0.5, but .* was given 0.3"):
        masks.make_mask(tree, 0.3, pattern=masks.NM())


def test_blocks_are_kept_by_their_mean():
    scores = jnp.asarray([[1.0, 1, 9, 0, 4], [1, 1, 0, 0, 4], [8, 0, 2, 2, 0]])
    (mask,) = masks.make_mask([scores], 0.5, pattern=masks.Block((2, 2)))
    # means: [[1, 2.25, 4], [4, 2, 0]]
    expected = [[0, 0, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 0, 0, 0]]
    np.testing.assert_array_equal(mask, np.array(expected, bool))


def test_blocks_one_entry_high_are_parts_of_rows():
    scores = jnp.asarray([[1.0, 1, 9, 0], [2, 2, 0, 0]])
    (mask,) = masks.make_mask([scores], 0.5, pattern=masks.Block((1, 2)))
    np.testing.assert_array_equal(mask, np.array([[0, 0, 1, 1], [1, 1, 0, 0]], bool))


def test_blocks_of_a_convolution_hold_whole_kernels():
    rng = np.random.default_rng(2)
    scores = jnp.asarray(rng.normal(size=(4, 6, 3, 3)), jnp.float32)
    (mask,) = masks.make_mask([scores], 0.25, pattern=masks.Block((2, 3)))
    kept = np.asarray(mask).reshape(2, 2, 2, 3, 9).transpose(0, 2, 1, 3, 4).reshape(4, -1)
    assert sorted(kept.mean(axis=1)) == [0, 0, 0, 1]


@pytest.mark.parametrize("axis", [0, 1])
def test_whole_channels(axis):
    rng = np.random.default_rng(3)
    scores = rng.normal(size=(8, 6, 2, 2)).astype(np.float32)
    (mask,) = masks.make_mask([jnp.asarray(scores)], 0.5, pattern=masks.Channels(axis))
    rest = tuple(a for a in range(4) if a != axis)
    means = scores.mean(axis=rest)
    best = set(np.argsort(-means)[: len(means) // 2])
    channels = np.asarray(mask).mean(axis=rest)
    assert set(np.flatnonzero(channels == 1)) == best
    assert set(np.unique(channels)) == {0.0, 1.0}


def test_groups_compete_over_all_layers():
    tree = {"a": jnp.full((4, 2), 3.0), "b": jnp.full((2, 100), 2.0)}
    tree = {"a": tree["a"].at[1:3].set(4.0), "b": tree["b"].at[1].set(5.0)}
    mask = masks.make_mask(tree, 0.5, scope="global", pattern=masks.Channels(0))
    assert np.asarray(mask["a"]).all(axis=1).tolist() == [False, True, True, False]
    assert np.asarray(mask["b"]).all(axis=1).tolist() == [False, True]


def test_patterns_under_jit_and_erk():
    rng = np.random.default_rng(4)
    tree = {"a": jnp.asarray(rng.normal(size=(6, 8)), jnp.float32)}
    for options in (
        {"pattern": masks.Block((4, 4))},
        {"pattern": masks.NM()},
        {"pattern": masks.Channels(1), "allocation": "erk"},
    ):
        build = lambda t, options=options: masks.make_mask(t, 0.5, **options)
        assert eqx.tree_equal(jax.jit(build)(tree), build(tree))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: masks.NM(0, 4), "needs 0 < n <= m"),
        (lambda: masks.NM(5, 4), "needs 0 < n <= m"),
        (lambda: masks.Block(()), "sizes must be at least 1"),
        (lambda: masks.Block((4, 0)), "sizes must be at least 1"),
        (lambda: masks.Channels(2), "axis must be 0"),
        (
            lambda: masks.make_mask([jnp.ones(4)], 0.5, pattern=masks.Block((2, 2))),
            "have more axes",
        ),
        (lambda: masks.make_mask([jnp.ones(4)], 0.5, pattern=masks.Channels(1)), "has no axis 1"),
        (
            lambda: masks.make_mask([jnp.ones((4, 4))], 0.1, pattern=masks.Block((4, 4))),
            "leaves no weight in layer",
        ),
    ],
)
def test_patterns_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.fixture
def sparse(getkey):
    model = eqx.nn.MLP(20, 10, 30, 1, key=getkey())
    weights = {"0": model.layers[0].weight, "1": model.layers[1].weight}
    kept = masks.make_mask(jax.tree.map(abs, weights), 0.3)
    full = sparsify(model)
    return full.with_mask(
        eqx.tree_at(
            lambda m: [layer.weight for layer in m.layers], full.mask, [kept["0"], kept["1"]]
        )
    )


def test_shuffling_keeps_counts_and_moves_weights(sparse, getkey):
    key = getkey()
    shuffled = masks.shuffle_mask(sparse.mask, key)
    pairs = list(zip(jax.tree.leaves(shuffled), jax.tree.leaves(sparse.mask), strict=True))
    for after, before in pairs:
        assert after.shape == before.shape
        assert int(after.sum()) == int(before.sum())
        agreement = float((after & before).sum() / before.sum())
        assert agreement < 0.6  # 0.3 in the mean
    assert jax.tree.structure(shuffled) == jax.tree.structure(sparse.mask)
    assert eqx.tree_equal(shuffled, masks.shuffle_mask(sparse.mask, key))
    assert not eqx.tree_equal(shuffled, masks.shuffle_mask(sparse.mask, getkey()))
    sparse.with_mask(shuffled)


def test_reinitialising_keeps_the_mask_and_each_layers_values(sparse, getkey):
    other = masks.reinitialise(sparse, getkey())
    assert eqx.tree_equal(other.mask, sparse.mask)
    for after, before in zip(other.model.layers, sparse.model.layers, strict=True):
        assert not np.array_equal(after.weight, before.weight)
        np.testing.assert_array_equal(np.sort(after.weight, None), np.sort(before.weight, None))
        np.testing.assert_array_equal(after.bias, before.bias)


def test_reinitialising_with_a_constructor(sparse, getkey):
    key, make = getkey(), lambda key: eqx.nn.MLP(20, 10, 30, 1, key=key)
    other = masks.reinitialise(sparse, key, make)
    assert eqx.tree_equal(other.model, make(key))
    with pytest.raises(ValueError, match="structure|shape"):
        masks.reinitialise(sparse, key, lambda key: eqx.nn.MLP(20, 10, 31, 1, key=key))


def test_inverting_twice_is_nothing():
    tree = {"a": jnp.asarray([1.0, -2.0]), "b": None}
    assert eqx.tree_equal(masks.invert_scores(masks.invert_scores(tree)), tree)


def test_erk_counts_add_up_to_the_rounded_density_at_ties():
    """A sum of floating-point shares misses one half in fifteen."""
    rng, seen = np.random.default_rng(0), 0
    while seen < 300:
        shapes = {
            f"w{n}": tuple(map(int, rng.integers(2, 12, 2))) for n in range(rng.integers(2, 6))
        }
        sizes = [rows * columns for rows, columns in shapes.values()]
        density = (int(rng.integers(1, sum(sizes))) + 0.5) / sum(sizes)
        if not 0.1 < density < 1:
            continue
        shares = dict(allocate_shapes(shapes, density, "erk"))
        counts = whole_counts(shares, sizes, True, density)
        assert sum(counts) == round(density * sum(sizes))
        assert all(0 <= count <= size for count, size in zip(counts, sizes, strict=True))
        seen += 1


class Stack(eqx.Module):
    """Layers stacked along a first axis, through which a scan goes."""

    layers: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(self, key):
        make = lambda key: eqx.nn.Linear(8, 8, key=key)
        self.layers = eqx.filter_vmap(make)(jax.random.split(key, 5))
        self.head = eqx.nn.Linear(8, 4, key=key)

    def __call__(self, x):
        arrays, rest = eqx.partition(self.layers, eqx.is_array)
        one = lambda x, layer: (jnp.tanh(eqx.combine(layer, rest)(x)), None)
        return self.head(jax.lax.scan(one, x, arrays)[0])


class Inside(eqx.Module):
    first: eqx.nn.Linear
    table: eqx.nn.Embedding
    head: eqx.nn.Linear

    def __call__(self, x):
        place = jnp.sum(self.first(x)).astype(jnp.int32)
        return self.head(self.table(place))


@pytest.mark.parametrize(
    "pattern", [masks.NM(2, 4), masks.Block((4, 4)), masks.Channels(), masks.ConstantFanIn()]
)
def test_embeddings_need_their_order(pattern, getkey):
    """They are stored with inputs first, which patterns would take for outputs."""
    linear = lambda n, m: eqx.nn.Linear(n, m, key=getkey())
    model = Inside(linear(8, 8), eqx.nn.Embedding(12, 8, key=getkey()), linear(8, 4))
    score = scores.Random(getkey())
    with pytest.raises(ValueError, match=r"\.table\.weight of an Embedding is \[inputs, outputs\]"):
        prune(model, score, masks.Sparsity(0.5, pattern=pattern))
    laid = masks.InLayout(pattern, weight_layouts(model, jnp.ones((2, 8))))
    kept = prune(model, score, masks.Sparsity(0.5, pattern=laid)).mask.table.weight
    if isinstance(pattern, masks.NM):
        assert (kept.reshape(3, 4, 8).sum(1) == 2).all()


class Tokens(eqx.Module):
    table: eqx.nn.Embedding
    hidden: eqx.nn.Linear
    head: eqx.nn.Linear


def test_embeddings_that_are_spared_stay_whole(getkey):
    linear = lambda n, m: eqx.nn.Linear(n, m, key=getkey())
    model = Tokens(eqx.nn.Embedding(12, 8, key=getkey()), linear(8, 8), linear(8, 4))
    pattern = masks.Channels(spare=(".table.weight", ".head.weight"))
    found = prune(model, scores.Random(getkey()), masks.Sparsity(0.5, pattern=pattern))
    assert bool(found.mask.table.weight.all()) and not bool(found.mask.hidden.weight.all())


@pytest.mark.parametrize(
    "pattern", [masks.NM(2, 4), masks.Block((4, 4)), masks.Channels(), masks.ConstantFanIn()]
)
def test_stacks_of_layers_need_their_order(pattern, getkey):
    """Their first axis is not that of outputs, which patterns take it for."""
    model, x = Stack(getkey()), jnp.ones((2, 8))
    score = scores.Random(getkey())
    with pytest.raises(ValueError, match="is a stack of them"):
        prune(model, score, masks.Sparsity(0.5, pattern=pattern))
    embeddings = eqx.filter_vmap(lambda key: eqx.nn.Embedding(8, 8, key=key))
    tables = [embeddings(jax.random.split(getkey(), 5)), model.head]
    with pytest.raises(ValueError, match="is a stack of them"):
        masks.make_mask(score(tables), 0.5, pattern=pattern)
    laid = masks.InLayout(pattern, weight_layouts(model, x))
    kept = prune(model, score, masks.Sparsity(0.5, pattern=laid)).mask.layers.weight
    if isinstance(pattern, masks.NM):
        assert (kept.reshape(5, 8, 2, 4).sum(3) == 2).all()
