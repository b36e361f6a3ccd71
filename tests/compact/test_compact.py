"""`compact` leaves out what cannot matter and nothing else."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.drawn_networks import draw
from helpers.refusals import unchecked
from helpers.tiers import default_only, drawn

import ntt_eqx as ntt

pytestmark = pytest.mark.usefixtures("x64")

MANY = drawn(8)


@eqx.filter_jit
def outputs(model, x):
    return jax.vmap(model)(x)


def assert_same(sparse, found, x):
    """On samples that `compact` has not seen, too."""
    one, two = np.asarray(outputs(sparse, x)), np.asarray(outputs(found.model, x))
    assert one.shape == two.shape and one.dtype == two.dtype
    np.testing.assert_allclose(two, one, rtol=0, atol=1e-12 * max(1.0, np.abs(one).max()))


def masked(model, density, seed=0):
    """Any model with large weights in float64 and a scattered mask."""
    rng = np.random.default_rng(seed)
    sparse = ntt.sparsify(model)
    fill = lambda leaf: (
        jnp.asarray(rng.normal(size=leaf.shape) / max(leaf[0].size * density, 1) ** 0.5)
        if eqx.is_inexact_array(leaf) and leaf.ndim
        else leaf
    )
    mask = jax.tree.map(lambda m: jnp.asarray(rng.random(m.shape) < density), sparse.mask)
    return ntt.SparseModel(jax.tree.map(fill, sparse.model), mask)


@pytest.mark.parametrize(
    "name, shape, densities",
    [
        ("lenet-300-100", (1, 8, 8), (0.01,)),
        ("lenet-5", (1, 16, 16), (0.02,)),
        pytest.param("conv-4", (1, 16, 16), (0.005,), marks=pytest.mark.slow),
    ],
)
def test_models_of_the_library(name, shape, densities, getkey):
    model = ntt.models.make_model(name, shape, 10, key=getkey())
    for density in densities:
        sparse = masked(model, density)
        x = jnp.asarray(np.random.default_rng(1).normal(size=(4, *shape)))
        found = ntt.compact(sparse, x[:2])
        assert_same(sparse, found, x)
        assert type(found.model.model) is type(model)
        assert found.compact_parameters < found.parameters or density >= 0.2


@pytest.mark.slow
def test_resnet_20_with_batch_norm(getkey):
    """Channels that are tied by shortcuts go together, with their statistics."""
    model = ntt.models.make_model("resnet-20-bn", (3, 4, 4), 10, key=getkey())
    sparse = ntt.sparsify(jax.tree.map(widened, model))
    first = lambda m: [m.model.stem.weight] + [b.conv2.weight for b in m.model.blocks]
    mask = eqx.tree_at(first, sparse.mask, replace_fn=lambda m: m.at[:5].set(False))
    sparse = sparse.with_mask(mask)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 3, 4, 4)))
    found = ntt.compact(sparse, x[:2])
    assert_same(sparse, found, x)
    assert first(found.model.model)[0].shape == (11, 3, 3, 3)
    assert found.model.model.model.norm.input_size == 11


class Normed(eqx.Module):
    """A residual block with batch norm, and its head."""

    stem: eqx.nn.Conv2d
    norm: eqx.nn.BatchNorm
    branch: eqx.nn.Conv2d
    head: eqx.nn.Linear

    def __init__(self, key):
        self.stem = eqx.nn.Conv2d(1, 4, 3, key=key, dtype=jnp.float64)
        self.norm = eqx.nn.BatchNorm(4, "batch", mode="batch", dtype=jnp.float64)
        self.branch = eqx.nn.Conv2d(4, 4, 3, padding=1, key=key, dtype=jnp.float64, use_bias=False)
        self.head = eqx.nn.Linear(4, 2, key=key, dtype=jnp.float64)

    def __call__(self, x, state):
        h, state = self.norm(self.stem(x), state)
        h = jax.nn.relu(h + self.branch(jax.nn.relu(h)))
        return self.head(jnp.mean(h, axis=(1, 2))), state


def test_batch_norm_behind_a_shortcut(getkey):
    """A channel goes with its statistics where both branches leave it empty."""
    model = ntt.StatefulModel(*eqx.nn.make_with_state(Normed)(getkey()))
    below = lambda m: m.model.norm.bias  # a channel that ReLU turns off, once nothing feeds it
    sparse = ntt.sparsify(eqx.tree_at(below, model, replace_fn=lambda b: b.at[2].set(-9.0)))
    x = jnp.arange(75.0).reshape(3, 1, 5, 5) / 9
    for weights, shape in ((["stem"], 4), (["branch"], 4), (["stem", "branch"], 3)):
        where = lambda m, weights=weights: [getattr(m.model, name).weight for name in weights]
        mask = eqx.tree_at(where, sparse.mask, replace_fn=lambda m: m.at[2].set(False))
        found = ntt.compact(sparse.with_mask(mask), x)
        assert_same(sparse.with_mask(mask), found, x)
        small = found.model.model
        assert small.model.norm.input_size == small.model.stem.out_channels == shape
        state = small.state.get(small.model.norm.batch_state_index)
        assert state[0].shape == state[1].shape == (shape,)


def widened(leaf):
    return leaf.astype(jnp.float64) if eqx.is_inexact_array(leaf) else leaf


def test_a_transformer_loses_hidden_units_and_says_what_stays(getkey):
    model = ntt.models.ViT((1, 8, 8), dim=8, depth=1, num_heads=2, key=getkey())
    sparse = masked(model, 0.08)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 1, 8, 8)))
    found = ntt.compact(sparse, x[:2])
    assert_same(sparse, found, x)
    block = found.model.model.blocks[0]
    assert block.expand.out_features == block.contract.in_features < 16
    assert block.queries_keys_values.weight.shape == (24, 8)
    assert any("reshape splits them" in sentence for sentence in found.stayed)
    assert any("reduce_sum runs over them" in sentence for sentence in found.stayed)


@pytest.mark.parametrize("seed", default_only(range(3), 2))
def test_drawn_networks(seed):
    sparse, x = draw(seed)
    assert_same(sparse, ntt.compact(sparse, x[:2]), x)


@pytest.mark.slow
def test_many_drawn_networks():
    for seed in range(3, 3 + MANY):
        sparse, x = draw(seed)
        assert_same(sparse, ntt.compact(sparse, x[:2]), x)
        if seed % 40 == 0:
            jax.clear_caches()


def mlp(getkey, *widths, use_bias=True):
    layers = []
    for i, o in zip(widths[:-1], widths[1:], strict=True):
        layers += [eqx.nn.Linear(i, o, use_bias, key=getkey(), dtype=jnp.float64)]
        layers += [eqx.nn.Lambda(jnp.tanh)]
    return eqx.nn.Sequential(layers[:-1])


def with_empty(sparse, cuts):
    """`sparse` with rows or columns of its layers empty: (layer, axis, indices)."""
    mask = sparse.mask
    for layer, axis, indices in cuts:
        at = (indices,) if axis == 0 else (slice(None), indices)
        mask = eqx.tree_at(
            lambda m, n=layer: m.layers[n].weight,
            mask,
            replace_fn=lambda w, a=at: w.at[a].set(False),
        )
    return sparse.with_mask(mask)


def test_a_network_by_hand(getkey):
    """Two constant units, one that is not read, and what only they read or feed."""
    sparse = ntt.sparsify(mlp(getkey, 5, 6, 4, 3))
    rows, columns = jnp.array([0, 2]), jnp.array([5])
    sparse = with_empty(sparse, [(0, 0, rows), (2, 1, columns), (2, 0, jnp.array([1]))])
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5)))
    found = ntt.compact(sparse, x)
    assert_same(sparse, found, x)
    assert [a.compact_shape for a in found.arrays] == [(3, 5), (3,), (3, 3), (3,), (3, 3), (3,)]
    first, second = found.model.model.layers[0], found.model.model.layers[2]
    assert (first.out_features, second.in_features, second.out_features) == (3, 3, 3)
    assert found.parameters == 79 and found.compact_parameters == 42 and found.stayed == ()
    assert "79 parameters before, 42 after" in str(found)
    live = [layer.live_units for layer in ntt.effective_sparsity(sparse, x).layers]
    assert live == [3, 3, 3]


def test_what_is_kept_is_as_it_was(getkey):
    """Weights under the mask included, so that a refresh can bring them back."""
    sparse = with_empty(ntt.sparsify(mlp(getkey, 4, 3, 2)), [(0, 0, jnp.array([1]))])
    mask = eqx.tree_at(
        lambda m: m.layers[0].weight, sparse.mask, replace_fn=lambda m: m.at[0, 0].set(False)
    )
    sparse = sparse.with_mask(mask)
    found = ntt.compact(sparse, jnp.ones((1, 4), jnp.float64)).model
    left = jnp.array([0, 2])
    weight = sparse.model.layers[0].weight[left]
    np.testing.assert_array_equal(found.model.layers[0].weight, weight)
    np.testing.assert_array_equal(found.mask.layers[0].weight, mask.layers[0].weight[left])


def test_a_whole_network_stays_whole(getkey):
    sparse = ntt.sparsify(mlp(getkey, 4, 3, 2))
    found = ntt.compact(sparse, jnp.ones((1, 4), jnp.float64))
    assert eqx.tree_equal(found.model, sparse) and found.difference == 0


def test_a_network_without_any_weight(getkey):
    """One unit of each layer is left, and the outputs are the constants that they were."""
    sparse = ntt.sparsify(mlp(getkey, 4, 3, 3, 2))
    sparse = sparse.with_mask(jax.tree.map(jnp.zeros_like, sparse.mask))
    x = jnp.ones((2, 4), jnp.float64)
    found = ntt.compact(sparse, x)
    assert_same(sparse, found, x)
    assert found.compact_parameters < found.parameters


def test_constants_stay_where_there_is_no_bias(getkey):
    model = mlp(getkey, 4, 5, 3)
    model = eqx.tree_at(lambda m: m.layers[2].bias, model, None)
    sparse = with_empty(ntt.sparsify(model), [(0, 0, jnp.array([1]))])
    found = ntt.compact(sparse, jnp.ones((1, 4), jnp.float64))
    assert found.compact_parameters == found.parameters
    (sentence,) = found.stayed
    assert sentence == (
        ".layers[0].weight: 1 empty rows stay: the next layer has no bias for their constant."
    )


class Reads(eqx.Module):
    """A layer whose scale is taken from the number of units."""

    one: eqx.nn.Linear
    two: eqx.nn.Linear
    how: str = eqx.field(static=True)

    def __call__(self, x):
        h = self.one(x)
        if self.how == "scale":
            return self.two(h / len(h))
        if self.how == "fixed":
            return self.two(h.reshape(4, 1).reshape(4))
        return self.two(h * jnp.arange(4.0))


def reads(how, getkey):
    one, two = (eqx.nn.Linear(4, o, key=getkey(), dtype=jnp.float64) for o in (4, 3))
    mask = ntt.sparsify(Reads(one, two, how)).mask
    mask = eqx.tree_at(lambda m: m.one.weight, mask, replace_fn=lambda m: m.at[1].set(False))
    return ntt.SparseModel(Reads(one, two, how), mask)


def test_a_model_that_reads_the_number_of_its_units_is_refused(getkey):
    x = jnp.ones((2, 4), jnp.float64)
    for how, reason in (("scale", "outputs differ by up to"), ("fixed", "smaller: ")):
        with pytest.raises(ValueError, match=f"compact: Reads is another function .*{reason}"):
            ntt.compact(reads(how, getkey), x)
    found = ntt.compact(reads("positions", getkey), x)
    assert found.compact_parameters == found.parameters and "iota" in found.stayed[0]


def test_other_things_are_refused(getkey):
    model = mlp(getkey, 4, 3, 2)
    for function in (ntt.compact, ntt.effective_sparsity):
        name = function.__name__
        refused = pytest.raises(ValueError, match=f"{name}: needs a SparseModel, got Sequential")
        with unchecked(), refused:
            function(model, jnp.ones((1, 4), jnp.float64))
        with pytest.raises(ValueError, match=name):
            function(ntt.sparsify(model), jnp.ones((1, 5), jnp.float64))


def test_outputs_that_are_not_finite_are_told(getkey):
    """A normalised weight divides by the norm of a row, which a mask can make zero."""
    model = eqx.nn.WeightNorm(eqx.nn.Linear(3, 2, key=getkey()))
    sparse = ntt.sparsify(model)
    mask = jax.tree.map(lambda m: m.at[0].set(False), sparse.mask)
    with pytest.raises(ValueError, match="compact: an output of the model under its mask has NaN"):
        ntt.compact(sparse.with_mask(mask), jnp.ones((1, 3), jnp.float64))


def test_products_with_scalars_and_to_scalars(getkey):
    class Gained(eqx.Module):
        layers: list
        gain: jax.Array

        def __call__(self, x):
            h = jnp.tanh(self.layers[0](x))
            total = jnp.dot(self.layers[1].weight[0], h) * self.gain / (1.0 + self.gain**2)
            return jnp.stack([total, total + self.layers[1].bias[0]])

    layers = [eqx.nn.Linear(4, 6, key=getkey()), eqx.nn.Linear(6, 1, key=getkey())]
    model = Gained(layers, jnp.asarray(0.7))
    sparse = with_empty(ntt.sparsify(model), [(1, 1, jnp.array([0, 3]))])
    found = ntt.compact(sparse, jnp.ones((2, 4), jnp.float64))
    assert_same(sparse, found, jax.random.normal(getkey(), (5, 4), jnp.float64))
    assert found.model.model.layers[0].weight.shape == (4, 4)


def test_float32(getkey):
    layers = [eqx.nn.Linear(i, o, key=getkey(), dtype=jnp.float32) for i, o in ((4, 3), (3, 2))]
    sparse = with_empty(ntt.sparsify(eqx.nn.Sequential(layers)), [(0, 0, jnp.array([1]))])
    found = ntt.compact(sparse, jnp.ones((2, 4), jnp.float32))
    assert found.model.model.layers[1].weight.dtype == found.model.model.layers[1].bias.dtype
    assert found.model.model.layers[1].weight.shape == (2, 2) and found.difference < 1e-5


def test_weights_on_a_path_are_those_of_products_of_masks(getkey):
    rng = np.random.default_rng(3)
    sparse = masked(mlp(getkey, 6, 8, 7, 3), 0.2, seed=5)
    masks = [np.asarray(m, int) for m in jax.tree.leaves(sparse.masks)]
    before, after = [np.ones(6, int)], [np.ones(3, int)]
    for m in masks[:-1]:
        before.append((m @ before[-1] > 0).astype(int))
    for m in reversed(masks[1:]):
        after.insert(0, (m.T @ after[0] > 0).astype(int))
    on_path = [
        int((m * a[:, None] * b[None]).sum()) for m, b, a in zip(masks, before, after, strict=True)
    ]
    found = ntt.effective_sparsity(sparse, jnp.asarray(rng.normal(size=(2, 6))))
    assert [layer.on_path for layer in found.layers] == on_path
    assert found.share == sum(on_path) / sum(m.sum() for m in masks)
    assert found.density == sum(on_path) / sum(m.size for m in masks)


class Made(eqx.Module):
    """A layer whose weight is made of two parameters."""

    weight: jax.Array
    scale: jax.Array
    last: eqx.nn.Linear

    def __init__(self, key):
        one, two = jax.random.split(key)
        self.weight, self.scale = jax.random.normal(one, (6, 4)), jnp.ones(6)
        self.last = eqx.nn.Linear(6, 3, key=two)

    def __call__(self, x):
        return self.last(jnp.tanh((self.weight * self.scale[:, None]) @ x))


def test_weights_that_are_made_of_parameters_lie_on_paths(getkey):
    found = ntt.effective_sparsity(ntt.sparsify(Made(getkey())), jnp.ones((2, 4)))
    assert float(found.density) == 1


def test_layers_that_share_a_weight(getkey):
    """Such a layer has a placeholder where its weight would be."""
    first, second = (eqx.nn.Linear(6, 6, key=getkey()) for _ in range(2))

    class Twice(eqx.Module):
        layers: eqx.nn.Shared
        last: eqx.nn.Linear

        def __call__(self, x):
            one, two = self.layers()
            return self.last(jnp.tanh(two(jnp.tanh(one(x)))))

    tied = eqx.nn.Shared((first, second), lambda pair: pair[1].weight, lambda pair: pair[0].weight)
    model, x = Twice(tied, eqx.nn.Linear(6, 3, key=getkey())), jnp.ones((3, 6))
    sparse = ntt.prune(model, ntt.scores.Magnitude(), 0.3)
    small = ntt.compact(sparse, x)
    np.testing.assert_allclose(jax.vmap(small.model)(x), jax.vmap(sparse)(x), rtol=1e-5)
