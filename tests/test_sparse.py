"""Sparse models: exact zeros, which leaves are prunable, what is refused."""

import pickle

import equinox as eqx
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.arbitrary import arrays, examples, explore, refused
from helpers.models import Dropping
from helpers.refusals import linear
from hypothesis import given, settings, strategies as st

from ntt_eqx import SparseModel, apply_mask, prunable_weights, sparsify
from ntt_eqx._sparse import map_masked, masked_weights


class Zoo(eqx.Module):
    """One of every kind of layer whose leaves matter here."""

    conv: eqx.nn.Conv2d
    norm: eqx.nn.GroupNorm
    rms: eqx.nn.RMSNorm
    cell: eqx.nn.GRUCell
    embedding: eqx.nn.Embedding
    heads: dict
    scale: jax.Array

    def __init__(self, key):
        k = jax.random.split(key, 5)
        self.conv = eqx.nn.Conv2d(3, 4, 2, key=k[0])
        self.norm = eqx.nn.GroupNorm(2, 4)
        self.rms = eqx.nn.RMSNorm((2, 3))
        self.cell = eqx.nn.GRUCell(4, 5, key=k[1])
        self.embedding = eqx.nn.Embedding(6, 4, key=k[2])
        self.heads = {"a": eqx.nn.Linear(5, 2, key=k[3]), "b": (eqx.nn.LayerNorm((3, 3)),)}
        self.scale = jnp.ones((3, 3))


@pytest.fixture
def mlp(getkey):
    return eqx.nn.MLP(4, 3, 8, 2, key=getkey())


def random_mask(model, key, density=0.5):
    full = sparsify(model).mask
    leaves, treedef = jax.tree.flatten(full)
    keys = jax.random.split(key, len(leaves))
    pairs = zip(keys, leaves, strict=True)
    return jax.tree.unflatten(
        treedef, [jax.random.bernoulli(k, density, leaf.shape) for k, leaf in pairs]
    )


def test_prunable_weights_are_the_layers_weights(getkey):
    marked, _ = jax.tree_util.tree_flatten_with_path(prunable_weights(Zoo(getkey())))
    names = {jax.tree_util.keystr(path) for path, mark in marked if mark}
    assert names == {
        ".conv.weight",
        ".cell.weight_ih",
        ".cell.weight_hh",
        ".embedding.weight",
        ".heads['a'].weight",
    }


def test_a_predicate_chooses_other_leaves(getkey):
    seen = []

    def where(path, owner, leaf):
        seen.append((path, type(owner).__name__, leaf.shape))
        return path == ".scale"

    marks = prunable_weights(Zoo(getkey()), where)
    assert marks.scale is True
    assert sum(jax.tree.leaves(marks)) == 1
    assert (".heads['a'].weight", "Linear", (2, 5)) in seen
    assert (".conv.bias", "Conv2d", (4, 1, 1)) in seen
    assert (".scale", "Zoo", (3, 3)) in seen


class Box:
    """A node of a tree that says nothing of its children's names."""

    def __init__(self, content, others):
        self.content, self.others = content, others


jax.tree_util.register_pytree_node(
    Box, lambda box: ((box.content, box.others), None), lambda _, children: Box(*children)
)


def test_children_of_a_node_without_names_have_no_owner(getkey):
    linear = eqx.nn.Linear(3, 2, key=getkey())
    model = {"box": Box(linear, (linear.weight,)), "plain": [linear]}
    owners = {}

    def where(path, owner, leaf):
        owners[path] = owner
        return leaf.ndim == 2

    marks = prunable_weights(model, where)
    assert jax.tree.leaves(marks) == [True, False, True, True, False]
    assert {path: owner for path, owner in owners.items() if "box" in path} == {
        "['box'][<flat index 0>].weight": None,
        "['box'][<flat index 0>].bias": None,
        "['box'][<flat index 1>][0]": None,
    }
    assert owners["['plain'][0].weight"] is owners["['plain'][0].bias"] is linear
    # `linear.weight` in a tuple is an array that no Equinox module holds
    assert jax.tree.leaves(prunable_weights(model)) == [True, False, True, True, False]


def test_a_model_without_prunable_weights_is_refused():
    with pytest.raises(ValueError, match="no prunable weight in LayerNorm; pass `where=`"):
        sparsify(eqx.nn.LayerNorm((3, 3)))


def test_sparsify_keeps_everything(mlp):
    sparse = sparsify(mlp)
    assert sparsify(sparse) is sparse
    assert float(sparse.density()) == 1.0
    x = jnp.arange(4.0)
    assert eqx.tree_equal(sparse.to_dense(), mlp)
    np.testing.assert_array_equal(sparse(x), mlp(x))


def test_zeros_are_exact_and_hide_what_is_not_finite(mlp, getkey):
    mask = random_mask(mlp, getkey())
    hidden = jnp.where(mask.layers[0].weight, mlp.layers[0].weight, jnp.nan)
    hidden = hidden.at[0, 0].set(jnp.where(mask.layers[0].weight[0, 0], 1.0, jnp.inf))
    broken = eqx.tree_at(lambda m: m.layers[0].weight, mlp, hidden)
    sparse = SparseModel(broken, mask)
    dense = sparse.to_dense()
    assert (np.asarray(dense.layers[0].weight)[~np.asarray(mask.layers[0].weight)] == 0).all()
    x = jnp.arange(4.0)
    assert np.isfinite(sparse(x)).all()
    np.testing.assert_array_equal(jax.jit(lambda s, x: s(x))(mask_only(sparse), x), sparse(x))
    slopes = eqx.filter_grad(lambda s: jnp.sum(s(x)))(sparse)
    for slope, kept in zip(
        jax.tree.leaves(eqx.filter(slopes.model, prunable_weights(mlp))),
        jax.tree.leaves(mask),
        strict=True,
    ):
        assert np.isfinite(slope).all()
        assert (np.asarray(slope)[~np.asarray(kept)] == 0).all()


def mask_only(sparse):
    """The same model with static leaves closed over, so that plain jit takes it."""
    arrays, static = eqx.partition(sparse, eqx.is_array)
    return jax.tree_util.Partial(lambda arrays, x: eqx.combine(arrays, static)(x), arrays)


def test_a_pruned_weight_keeps_its_value_and_may_come_back(mlp, getkey):
    sparse = sparsify(mlp).with_mask(random_mask(mlp, getkey()))
    assert not eqx.tree_equal(sparse.to_dense(), mlp)
    assert eqx.tree_equal(sparse.with_mask(sparsify(mlp).mask).to_dense(), mlp)


def test_densities(mlp):
    mask = sparsify(mlp).mask
    mask = eqx.tree_at(lambda m: m.layers[0].weight, mask, mask.layers[0].weight.at[0].set(False))
    sparse = SparseModel(mlp, mask)
    assert {name: float(d) for name, d in sparse.densities().items()} == {
        ".layers[0].weight": 0.875,
        ".layers[1].weight": 1.0,
        ".layers[2].weight": 1.0,
    }
    total = 4 * 8 + 8 * 8 + 8 * 3
    assert float(sparse.density()) == pytest.approx((total - 4) / total)


def test_densities_are_float32_with_64_bits_too(mlp, x64):
    sparse = sparsify(mlp)
    assert {d.dtype for d in (sparse.density(), *sparse.densities().values())} == {
        jnp.dtype(jnp.float32)
    }


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), density=st.floats(0, 1))
def test_masked_weights_and_apply_mask_agree(seed, density):
    model = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(seed))
    mask = random_mask(model, jax.random.key(seed + 1), density)
    dense = apply_mask(model, mask)
    sparse = SparseModel(model, mask)
    for masked, layer, original in zip(
        masked_weights(sparse), dense.layers, model.layers, strict=True
    ):
        np.testing.assert_array_equal(masked, layer.weight)
        np.testing.assert_array_equal(layer.bias, original.bias)
    kept = sum(int(leaf.sum()) for leaf in jax.tree.leaves(mask))
    assert float(sparse.density()) == pytest.approx(kept / 20, abs=1e-6)


def test_map_masked_leaves_the_rest_alone(mlp):
    doubled = map_masked(lambda w, m: 2 * w, mlp, sparsify(mlp).mask)
    np.testing.assert_array_equal(doubled.layers[1].weight, 2 * mlp.layers[1].weight)
    np.testing.assert_array_equal(doubled.layers[1].bias, mlp.layers[1].bias)


def test_masks_that_do_not_fit_are_refused(mlp):
    mask = sparsify(mlp).mask
    at = lambda m: m.layers[1].weight
    with pytest.raises(ValueError, match=r"mask.layers\[1\].weight must be a boolean array"):
        SparseModel(mlp, eqx.tree_at(at, mask, jnp.ones((8, 8))))
    with pytest.raises(ValueError, match=r"has shape \(8, 7\) but the weight has shape \(8, 8\)"):
        SparseModel(mlp, eqx.tree_at(at, mask, jnp.ones((8, 7), bool)))
    with pytest.raises(ValueError, match="does not have the structure of MLP"):
        SparseModel(mlp, sparsify(eqx.nn.MLP(4, 3, 8, 3, key=jax.random.key(0))).mask)
    for other in (True, jnp.ones((8, 8), jnp.int32)):
        with pytest.raises(ValueError, match="must be a boolean array"):
            SparseModel(mlp, eqx.tree_at(at, mask, other))
    bias = eqx.tree_at(
        lambda m: m.layers[0].bias, mask, jnp.ones(9, bool), is_leaf=lambda m: m is None
    )
    with pytest.raises(ValueError, match=r"bias has shape \(9,\) but the weight has shape \(8,\)"):
        SparseModel(mlp, bias)


def test_save_and_load(mlp, getkey, tmp_path):
    sparse = sparsify(mlp).with_mask(random_mask(mlp, getkey()))
    eqx.tree_serialise_leaves(tmp_path / "model.eqx", sparse)
    like = sparsify(eqx.nn.MLP(4, 3, 8, 2, key=getkey()))
    assert eqx.tree_equal(eqx.tree_deserialise_leaves(tmp_path / "model.eqx", like), sparse)


@pytest.mark.parametrize("nested", [lambda m: m, lambda m: {"net": m, "step": jnp.int32(3)}])
def test_a_file_of_a_sparse_model_is_no_file_of_a_plain_one(nested, mlp, getkey, tmp_path):
    """Else pruned weights would return with the values that they have under the mask."""
    sparse = sparsify(mlp).with_mask(random_mask(mlp, getkey()))
    eqx.tree_serialise_leaves(tmp_path / "sparse.eqx", nested(sparse))
    eqx.tree_serialise_leaves(tmp_path / "plain.eqx", nested(mlp))
    for name, like in (("sparse", mlp), ("plain", sparse)):
        with pytest.raises(Exception, match="(?i)leaf"):
            eqx.tree_deserialise_leaves(tmp_path / f"{name}.eqx", nested(like))


def test_bfloat16_and_vmap_over_masks(getkey):
    model = eqx.nn.Linear(4, 3, key=getkey(), dtype=jnp.bfloat16)
    sparse = sparsify(model)
    assert sparse.to_dense().weight.dtype == jnp.bfloat16
    stack = jax.vmap(lambda key: random_mask(model, key))(jax.random.split(getkey(), 5))
    out = eqx.filter_vmap(
        lambda mask: SparseModel(model, mask)(jnp.ones(4, jnp.bfloat16)), in_axes=0
    )(stack)
    assert out.shape == (5, 3)
    assert out.dtype == jnp.bfloat16


@pytest.fixture
def dropped(getkey):
    model = Dropping((4, 5, 3), getkey(), activation="tanh")
    return sparsify(model).with_mask(random_mask(model, getkey()))


def test_inference_mode_reaches_the_model_and_leaves_the_mask(dropped):
    x = jnp.arange(4.0)
    tested = eqx.nn.inference_mode(dropped)
    assert tested.model.dropout.inference is True and dropped.model.dropout.inference is False
    assert eqx.tree_equal(tested.mask, dropped.mask)
    np.testing.assert_array_equal(tested(x), eqx.nn.inference_mode(dropped.to_dense())(x))
    assert eqx.tree_equal(eqx.nn.inference_mode(tested, value=False), dropped)
    nested = eqx.nn.inference_mode({"student": dropped, "layer": eqx.nn.Dropout(0.1)})
    assert nested["student"].model.dropout.inference and nested["layer"].inference


def test_tree_transformations_of_a_model_with_dropout(dropped, tmp_path, getkey):
    x, key = jnp.arange(4.0), getkey()
    parts = eqx.partition(dropped, eqx.is_inexact_array)
    assert eqx.tree_equal(eqx.combine(*parts), dropped)
    assert jax.tree.leaves(parts[0].mask) == []
    assert eqx.tree_equal(jax.tree.map(lambda leaf: leaf, dropped), dropped)
    flipped = ~dropped.mask.first.weight
    other = eqx.tree_at(lambda s: s.mask.first.weight, dropped, flipped)
    np.testing.assert_array_equal(other.mask.first.weight, flipped)
    assert eqx.tree_equal(other.mask.second, dropped.mask.second)
    assert eqx.tree_equal(other.model, dropped.model)
    ones = eqx.tree_at(lambda s: s.model.first.bias, dropped, jnp.ones(5))
    np.testing.assert_array_equal(ones.to_dense().first.bias, 1.0)
    eqx.tree_serialise_leaves(tmp_path / "model.eqx", dropped)
    like = sparsify(Dropping((4, 5, 3), getkey(), activation="tanh"))
    assert eqx.tree_equal(eqx.tree_deserialise_leaves(tmp_path / "model.eqx", like), dropped)
    eager = dropped(x, key=key)
    np.testing.assert_allclose(eqx.filter_jit(dropped)(x, key=key), eager, rtol=1e-6)
    assert eqx.tree_equal(pickle.loads(pickle.dumps(dropped)), dropped)
    shapes = eqx.filter_eval_shape(lambda s: s, dropped)
    assert shapes.mask.first.weight.shape == (5, 4) and shapes.mask.second.bias is None


def test_a_mask_for_layers_without_weights_is_refused(mlp):
    mask = eqx.tree_at(lambda m: m.layers[1], sparsify(mlp).mask, jnp.ones((8, 8), bool))
    with pytest.raises(ValueError, match=r"mask\.layers\[1\] must be None.* but 2 leaves"):
        SparseModel(mlp, mask)
    whole = eqx.tree_at(lambda m: m.layers[1], sparsify(mlp).mask, None)
    assert SparseModel(mlp, whole).mask.layers[1].weight is None


@examples(60, 1000)
def test_arbitrary_masks(examples):
    model = linear()

    def holds(weight, bias):
        places = lambda m: (m.weight, m.bias)
        mask = eqx.tree_at(places, model, (weight, bias), is_leaf=lambda m: m is None)
        sparse = refused(lambda: SparseModel(model, mask), ValueError, begins="SparseModel")
        dense = refused(lambda: apply_mask(model, mask), ValueError, begins="SparseModel")
        assert (sparse is None) == (dense is None)
        if sparse is not None and weight is not None:
            assert np.all(np.asarray(dense.weight)[~np.asarray(weight)] == 0)

    explore(
        holds,
        examples,
        weight=st.one_of(hnp.arrays(bool, (2, 3)), arrays(), st.none()),
        bias=st.one_of(hnp.arrays(bool, 2), arrays(), st.none()),
    )
