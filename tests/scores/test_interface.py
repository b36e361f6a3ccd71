"""What all scores have in common: types, structure, labels, pruned weights, what is refused."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.arbitrary import ANYTHING, arrays, examples, explore, labels, refused
from helpers.refusals import (
    ASKS_FOR_ONE,
    HOLDS_THEM,
    Batched,
    Grid,
    NeedsKey,
    X,
    Y,
    linear,
    refusals,
    unchecked,
)
from helpers.tiers import default_only
from hypothesis import strategies as st

import ntt_eqx as ntt
from ntt_eqx import make_mask, scores, sparsify
from ntt_eqx.data import Batch

KEY = jax.random.key(4)
SQUARES = lambda sparse, x: jnp.sum(jnp.square(jax.vmap(sparse)(x)))

LABEL_FREE = {
    "magnitude": scores.Magnitude(),
    "lamp": scores.LAMP(),
    "random": scores.Random(KEY),
    "logit_snip": scores.LogitSnip(),
    "synflow": scores.SynFlow(),
    "ntk_sap": scores.NTKSAP(KEY, rounds=2),
    "path_exclusion": scores.PathExclusion(),
    "wanda": scores.Wanda(),
    "weighted_random": scores.WeightedRandom(KEY),
    "loss_gradient": scores.LossGradient(lambda s, x: jnp.sum(jax.vmap(s)(x))),
}
SUPERVISED = {"snip": scores.Snip(), "grasp": scores.GraSP()}
ALL = LABEL_FREE | SUPERVISED
NEEDS_X = sorted(set(LABEL_FREE) - {"lamp", "magnitude", "random"})


def given(name, batch):
    return batch if name in SUPERVISED else batch[0]


@pytest.mark.parametrize("name", sorted(ALL))
def test_structure_type_and_determinism(name, normalised, batch):
    """One float array for every prunable weight, the same ones at every call."""
    score, seen = ALL[name], given(name, batch)
    tree = score(normalised, seen)
    mask = sparsify(normalised).mask
    assert jax.tree.structure(tree) == jax.tree.structure(mask)
    for leaf, m in zip(jax.tree.leaves(tree), jax.tree.leaves(mask), strict=True):
        assert leaf.shape == m.shape
        assert leaf.dtype == jnp.float32
        assert np.isfinite(leaf).all()
        assert len(np.unique(leaf)) > 1
        if name != "grasp":
            assert (np.asarray(leaf) >= 0).all()
    assert eqx.tree_equal(tree, score(normalised, seen))
    assert eqx.tree_equal(tree, score(sparsify(normalised), seen))
    assert isinstance(score, scores.AbstractSupervisedScore) == (name in SUPERVISED)
    assert isinstance(score, scores.AbstractLabelFreeScore) == (name in LABEL_FREE)


@pytest.mark.parametrize("name", sorted(LABEL_FREE))
def test_label_free_scores_get_no_labels_from_prune(name, tiny, batch):
    x, _ = batch
    without = scores.prune(tiny, LABEL_FREE[name], 0.5, (x, None))
    assert eqx.tree_equal(without, scores.prune(tiny, LABEL_FREE[name], 0.5, x))


@pytest.mark.parametrize("name", sorted(ALL))
def test_every_score_starts_a_transfer(name, tiny, batch):
    mask = make_mask(ALL[name](tiny, given(name, batch)), 0.5)
    state = ntt.ntt_init(tiny, ntt.NTTConfig(density=0.5, num_steps=1), optax.sgd(0.1), mask=mask)
    assert eqx.tree_equal(state.student.mask, mask)


def test_scores_of_pruned_weights(tiny, batch, getkey):
    """Kept weights are scored at the masked network; pruned ones by what their return does."""
    mask = make_mask(scores.Random(getkey())(tiny), 0.5)
    sparse = sparsify(tiny).with_mask(mask)
    pruned = ~np.asarray(mask.output.weight)
    assert (np.asarray(scores.Snip()(sparse, batch).output.weight)[pruned] > 0).any()
    assert not eqx.tree_equal(scores.Snip()(sparse, batch), scores.Snip()(tiny, batch))
    # what is stored under the mask has no bearing on the scores of kept weights
    other = eqx.tree_at(
        lambda s: s.model.output.weight,
        sparse,
        jnp.where(mask.output.weight, tiny.output.weight, 7.0),
    )
    for name in sorted(set(ALL) - {"ntk_sap", "random"}):
        one = ALL[name](sparse, given(name, batch)).output.weight
        two = ALL[name](other, given(name, batch)).output.weight
        np.testing.assert_allclose(np.asarray(one)[~pruned], np.asarray(two)[~pruned], rtol=1e-6)


@pytest.mark.parametrize(
    "kind", [scores.Random, scores.WeightedRandom, lambda key: scores.NTKSAP(key, rounds=2)]
)
def test_keys_matter(kind, tiny, batch, getkey):
    one, two = getkey(), getkey()
    assert eqx.tree_equal(kind(one)(tiny, batch[0]), kind(one)(tiny, batch[0]))
    assert not eqx.tree_equal(kind(one)(tiny, batch[0]), kind(two)(tiny, batch[0]))


def test_random_draws_differ_between_layers(getkey):
    model = eqx.nn.MLP(5, 5, 5, 2, key=getkey())
    leaves = jax.tree.leaves(scores.Random(getkey())(model))
    assert not np.array_equal(leaves[0], leaves[1])


def test_scores_that_want_only_a_shape_ignore_values(tiny, batch):
    for name in ("synflow", "ntk_sap"):
        other = ALL[name](tiny, np.full_like(batch[0], np.nan))
        assert eqx.tree_equal(other, ALL[name](tiny, batch[0]))


@pytest.mark.parametrize("name", ["synflow", "ntk_sap", "path_exclusion"])
def test_scores_that_give_real_numbers_refuse_models_of_tokens(name, getkey):
    one, two = getkey(), getkey()

    class Tokens(eqx.Module):
        table: eqx.nn.Embedding
        head: eqx.nn.Linear

        def __call__(self, x):
            return self.head(jnp.mean(jax.vmap(self.table)(x), axis=0))

    model = Tokens(eqx.nn.Embedding(9, 4, key=one), eqx.nn.Linear(4, 3, key=two))
    with pytest.raises(ValueError, match="real numbers .* int32, as token ids.*behind the embedd"):
        ALL[name](model, np.zeros((2, 5), np.int32))
    images = np.zeros((2, 4), np.uint8)  # a model of real numbers takes them
    assert ALL["synflow"](model.head, images).weight.shape == (3, 4)


def test_bfloat16_models(getkey):
    short = eqx.nn.MLP(4, 3, 5, 1, key=getkey(), dtype=jnp.bfloat16)
    x = jax.random.normal(getkey(), (6, 4), jnp.bfloat16)
    for name in ("synflow", "grasp"):
        tree = ALL[name](short, (x, np.arange(6) % 3) if name in SUPERVISED else x)
        assert all(np.isfinite(leaf.astype(jnp.float32)).all() for leaf in jax.tree.leaves(tree))
        make_mask(tree, 0.5)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("name", sorted(set(ALL) - {"random", "magnitude"}))
def test_narrow_models_are_scored_in_float32(name, dtype, tiny, batch):
    """As the same numbers in float32, where second derivatives do not vanish."""
    cast = lambda tree, to: jax.tree.map(
        lambda leaf: leaf.astype(to) if eqx.is_inexact_array(leaf) else leaf, tree
    )
    narrow, x = cast(tiny, dtype), jnp.asarray(batch[0], dtype)
    wide, labels = cast(narrow, jnp.float32), batch[1]
    tree = ALL[name](narrow, given(name, (x, labels)))
    assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype(jnp.float32)}
    assert eqx.tree_equal(tree, ALL[name](wide, given(name, (x.astype(jnp.float32), labels))))
    make_mask(tree, 0.5)


class Half(eqx.Module):
    """A model that computes in 16 bits of its own."""

    weight: jax.Array

    def __call__(self, x):
        x = jnp.broadcast_to(x.astype(jnp.bfloat16), self.weight.shape)
        return jnp.sum(jax.lax.mul(self.weight, x), axis=1)


def test_a_model_that_knows_16_bits_alone_is_scored_in_them(getkey):
    model = Half(jax.random.normal(getkey(), (3, 4), jnp.bfloat16))
    found = scores.LogitSnip()(model, jax.random.normal(getkey(), (5, 4)))
    assert found.weight.dtype == jnp.bfloat16 and bool(jnp.any(found.weight > 0))


FORMS = {
    "tuple": lambda x, y: (x, y),
    "list": lambda x, y: [x, y],
    "x and y": lambda x, y: {"x": x, "y": y},
    "image": lambda x, y: {"image": x, "label": y},
    "pixels": lambda x, y: {"label": y, "pixel_values": x},
    "input": lambda x, y: {"input": x, "labels": y},
    "batch": lambda x, y: Batch(jnp.asarray(x), jnp.asarray(y)),
    "other byte order": lambda x, y: x.astype(">f4"),
}


@pytest.mark.parametrize("name", ["synflow", "ntk_sap"])
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_paths_and_draws_of_models_that_cast_their_input(name, dtype, getkey):
    """A convolution takes no second dtype, so that the model stays in 16 bits."""

    class Half(eqx.Module):
        conv: eqx.nn.Conv1d

        def __call__(self, x):
            return self.conv(x.astype(dtype)).astype(jnp.float32)

    model = Half(eqx.nn.Conv1d(2, 3, 2, key=getkey(), dtype=dtype))
    (found,) = jax.tree.leaves(LABEL_FREE[name](model, jnp.zeros((5, 2, 4))))
    assert found.shape == model.conv.weight.shape and bool(jnp.all(found > 0))
    if name == "synflow":  # each weight is used at three places of an input of ones
        np.testing.assert_allclose(found, 3 * jnp.abs(model.conv.weight), rtol=0.02)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["logit_snip", "path_exclusion", "synflow", "magnitude"])
def test_batches_of_every_form_give_their_inputs(name, form, tiny, batch):
    with unchecked():
        found = scores.prune(tiny, LABEL_FREE[name], 0.5, FORMS[form](*batch))
        direct = LABEL_FREE[name](tiny, FORMS[form](*batch))
    assert eqx.tree_equal(found, scores.prune(tiny, LABEL_FREE[name], 0.5, batch[0]))
    assert eqx.tree_equal(direct, LABEL_FREE[name](tiny, batch[0]))


@pytest.mark.parametrize("form", ["tuple", "list", "x and y", "batch"])
def test_pairs_of_every_form_are_examples(form, tiny, batch):
    with unchecked():
        found = scores.prune(tiny, scores.Snip(), 0.5, FORMS[form](*batch))
    assert eqx.tree_equal(found, scores.prune(tiny, scores.Snip(), 0.5, batch))


@pytest.mark.parametrize("name", sorted(SUPERVISED))
def test_labels_may_be_constants_of_a_traced_function(name, tiny, batch):
    """They have values there, which are looked at."""
    x, y = batch[0], jnp.asarray(batch[1])
    call = lambda y: eqx.filter_jit(lambda model: ALL[name](model, (x, y)))(tiny)
    assert eqx.tree_equal(call(y), ALL[name](tiny, (x, y)), rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="labels must lie in"):
        call(y + 99)


def test_works_under_jit(tiny, batch):
    for name in ("snip", "synflow"):
        jitted = eqx.filter_jit(lambda model, seen, name=name: ALL[name](model, seen))
        got, expected = jitted(tiny, given(name, batch)), ALL[name](tiny, given(name, batch))
        assert eqx.tree_equal(got, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", NEEDS_X)
def test_missing_inputs_are_refused(name, tiny, batch):
    with pytest.raises(ValueError, match=r"needs a(n array| batch) of inputs"):
        ALL[name](tiny)
    with pytest.raises(ValueError, match="at least one sample|batch of inputs for their shape"):
        ALL[name](tiny, batch[0][:0])


@pytest.mark.parametrize("name", ["logit_snip", "path_exclusion", "loss_gradient"])
def test_broken_inputs_are_refused(name, tiny, batch):
    with pytest.raises(ValueError, match="NaN or infinite"):
        ALL[name](tiny, np.where(batch[0] > 1, np.nan, batch[0]))
    with pytest.raises(ValueError, match="standardise it first"):
        ALL[name](tiny, batch[0].astype(np.uint8))


@pytest.mark.parametrize("name", sorted(SUPERVISED))
def test_bad_labels_are_refused(name, tiny, batch):
    x, y = batch
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 3\)"):
        ALL[name](tiny, (x, y + 1))
    with pytest.raises(ValueError, match="NaN or infinite"):
        ALL[name](tiny, (x * np.inf, y))
    flat = eqx.nn.Lambda(lambda x: jnp.sum(x))
    model = eqx.nn.Sequential([tiny, flat])
    with pytest.raises(ValueError, match="must map one sample"):
        ALL[name](model, batch)


def test_bad_settings_are_refused(getkey):
    with pytest.raises(ValueError, match="temperature must be above 0"):
        scores.GraSP(0.0)
    with pytest.raises(ValueError, match="NTKSAP: needs at least one round"):
        scores.NTKSAP(getkey(), rounds=0)
    with pytest.raises(ValueError, match="NTKSAP: needs at least one round"):
        scores.NTKSAP(getkey(), epsilon=0.0)
    for points in ((), (0.0,), (0.5, 1.5)):
        with pytest.raises(ValueError, match="points must lie in"):
            scores.LossGradient(SQUARES, points)


def test_the_ntt_loss_scores_away_from_the_teacher(getkey):
    """At the teacher its distances are flat; along the ray to zero they are not."""
    teacher = eqx.nn.MLP(4, 2, 5, 1, key=getkey())
    x = jax.random.normal(getkey(), (4, 4))
    config = ntt.NTTConfig(density=0.5, l2_weight=0.0)
    loss = lambda student, x: ntt.ntt_loss(student, teacher, x, config)[0]
    flat = scores.LossGradient(loss)(teacher, x)
    assert max(float(leaf.max()) for leaf in jax.tree.leaves(flat)) < 1e-6
    tree = scores.LossGradient(loss, points=(0.25, 0.5, 0.75))(teacher, x)
    assert min(float(leaf.max()) for leaf in jax.tree.leaves(tree)) > 1e-3
    sparse = scores.prune(teacher, scores.LossGradient(loss, points=(0.5,)), 0.5, x)
    assert float(sparse.density()) == 0.5


test_refusals = refusals(
    {
        "prune: density": (
            lambda: ntt.prune(linear(), scores.Magnitude(), 1.5),
            r"prune: density must be a number in \(0, 1\], got 1.5",
        ),
        "prune: no labels": (
            lambda: ntt.prune(linear(), scores.Snip(), 0.5, X),
            r"a tuple \(x, y\)",
        ),
        "prune: a dict": (
            lambda: ntt.prune(linear(), scores.LogitSnip(), 0.5, {"rows": X}),
            "prune: a batch that is a dict must have one of the keys x, .*; this one has rows",
        ),
        "prune: nothing": (
            lambda: ntt.prune(linear(), scores.LogitSnip(), 0.5, []),
            "LogitSnip: needs an array of inputs .*, got list",
        ),
        "score: features": (lambda: scores.LogitSnip()(linear(), X[:, :2]), ASKS_FOR_ONE),
        "score: batches": (lambda: scores.LogitSnip()(Batched(), X), ASKS_FOR_ONE),
        "score: key": (lambda: scores.PathExclusion()(NeedsKey(), X), HOLDS_THEM),
        "score: labels": (lambda: scores.GraSP()(linear(), (X, Y + 1)), r"must lie in \[0, 2\)"),
        "score: not logits": (lambda: scores.Snip()(Grid(), (X, Y)), "to a vector of logits"),
    }
)


@examples(40, 1000)
def test_arbitrary_examples(examples):
    model = linear()

    def holds(x, y, name):
        given = x if name in ("LogitSnip", "PathExclusion") else (x, y)
        found = refused(lambda: getattr(scores, name)()(model, given), ValueError, begins=name)
        assert found is None or found.weight.shape == (2, 3)

    explore(
        holds,
        examples,
        x=st.one_of(arrays([(2, 3)], ["f4"]), ANYTHING),
        y=st.one_of(labels(2), ANYTHING),
        name=st.sampled_from(["LogitSnip", "PathExclusion", "Snip", "GraSP"]),
    )


@pytest.mark.parametrize("name", default_only(sorted(ALL), "synflow", "path_exclusion"))
def test_networks_with_batch_norm(name, getkey):
    """Scores that leave normalisation out do so in models that ask for its class, too."""
    model = ntt.models.make_model("resnet-20-bn", (3, 8, 8), 10, key=getkey())
    x, y = jax.random.normal(getkey(), (8, 3, 8, 8)), jnp.arange(8)
    found = ALL[name](ntt.warm_up(model, x), given(name, (x, y)))
    for leaf in jax.tree.leaves(found):
        assert jnp.isfinite(leaf).all() and (leaf != leaf.ravel()[0]).any()
