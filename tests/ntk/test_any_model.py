"""All models of the zoo: exact kernels and gradients, each parameter on its path."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from helpers.comparison import (
    every_array,
    largest,
    random_mask,
    relative_error,
    weighted_sum,
)
from helpers.tiers import default_only
from helpers.zoo import ZOO, Half

import ntt_eqx as ntt
from ntt_eqx._ntk._kernel import known_index
from ntt_eqx._ntk._layers import find_layers
from ntt_eqx._ntk._linear import rules_in_use
from ntt_eqx._ntk._spec import kernel_spec
from ntt_eqx._ntk._trace import trace

EXACT = 1e-10  # float64

pytestmark = pytest.mark.usefixtures("x64")
every_model = pytest.mark.parametrize("name", ZOO)


@functools.cache
def built(name):
    return ZOO[name].build(jax.random.key(1))


def analysed(model, x):
    """The model's layers, and its parameters that are in none, by path."""
    traced, arrays = trace(model, jax.ShapeDtypeStruct(x.shape[1:], x.dtype))
    layers, rest = find_layers(traced.program, [a.shape for a in arrays], rules_in_use())
    return traced, layers, [traced.parameters[p].path for p in rest]


@every_model
def test_path_of_each_parameter(name):
    case = ZOO[name]
    traced, layers, rest = analysed(built(name), case.samples(1))
    found = dict.fromkeys(rest, "rest")
    for layer in layers:
        found[traced.parameters[layer.weight].path] = layer.kind
        if layer.bias is not None:
            found[traced.parameters[layer.bias].path] = "bias"
    assert found == case.paths


@pytest.mark.parametrize("name", default_only(ZOO, "custom", "tied"))
def test_kernel_and_gradient(name):
    """Against the explicit Jacobian, for masks of all kinds, dense and gathered, both kernels."""
    case = ZOO[name]
    model = built(name)
    if isinstance(model, Half):  # a function that an oracle can have without bfloat16's rounding
        model = jax.tree.map(lambda w: w.astype(jnp.float64), model)
    sparse = ntt.sparsify(model, every_array)
    x1, x2 = case.samples(3, seed=1), case.samples(2, seed=2)
    params, static = eqx.partition(sparse, eqx.is_inexact_array)

    def graded(**options):
        """The kernel and the gradient of a weighted sum of it, `(params, mask) -> (theta, g)`."""

        def loss(params, mask):
            theta = ntt.ntk(eqx.combine(params, static).with_mask(mask), x1, x2, **options)
            return weighted_sum(theta), theta

        def call(params, mask):
            (_, theta), gradient = jax.value_and_grad(loss, has_aux=True)(params, mask)
            return theta, gradient

        return call

    oracle = jax.jit(graded(implementation="jacobian"))
    dense, ambient = jax.jit(graded()), jax.jit(graded(kernel="ambient"))
    few = random_mask(sparse.mask, 0.1, seed=3)
    gathered = jax.jit(lambda params: graded()(params, few))  # constant: only entries it keeps

    def check(found, expected, which):
        assert jax.tree.leaves(found)[0].dtype == jnp.float64
        for part, f, e in zip(("kernel", "gradient"), found, expected, strict=True):
            assert relative_error(f, e) < EXACT, (which, part)

    for density in (0.5, 0.0, 1.0):
        mask = random_mask(sparse.mask, density)
        check(dense(params, mask), oracle(params, mask), density)
    expected = oracle(params, few)
    assert largest(expected) > 0
    check(dense(params, few), expected, "few")
    check(gathered(params), expected, "gathered")

    # The ambient kernel is the active one of a full mask at weights that are zero already.
    kept = ntt.apply_mask(model, few)
    zeroed, _ = eqx.partition(eqx.tree_at(lambda s: s.model, sparse, kept), eqx.is_inexact_array)
    theta, gradient = oracle(zeroed, sparse.mask)
    gradient = eqx.tree_at(lambda s: s.model, gradient, ntt.apply_mask(gradient.model, few))
    check(ambient(params, few), (theta, gradient), "ambient")


def test_bfloat16_weights_in_a_wider_model():
    """Exact where a layer computes in the sample's precision, although its weights are rounded."""
    case = ZOO["half"]
    model = built("half")
    wide = jax.tree.map(lambda w: w.astype(jnp.float64), model)
    x1, x2 = case.samples(3, seed=1), case.samples(2, seed=2)
    run = jax.jit(
        lambda m, w: (ntt.ntk(m, x1, x2), ntt.ntk(w, x1, x2, implementation="jacobian")),
    )
    found, expected = run(model, wide)
    assert found.dtype == jnp.float64
    assert relative_error(found, expected) < EXACT


def test_bfloat16_model_gives_float32():
    case = ZOO["half"]
    model = case.build(jax.random.key(1))
    x = case.samples(3, dtype=jnp.bfloat16)
    wide = jax.tree.map(lambda w: w.astype(jnp.float32), model)
    run = jax.jit(
        lambda m, w: (
            ntt.ntk(m, x),
            ntt.ntk(w, x.astype(jnp.float32), implementation="jacobian"),
        ),
    )
    found, expected = run(model, wide)
    assert found.dtype == jnp.float32
    assert relative_error(found, expected) < 0.05  # the model's own rounding


def test_bfloat16_bias_beside_float64_weights():
    """Parameters on the slow path keep the precision they are stored in; the sum is float64."""

    class Mixed(eqx.Module):
        weight: jax.Array
        scale: jax.Array

        def __call__(self, x):
            return self.weight @ x * self.scale.astype(x.dtype)

    model = Mixed(jnp.ones((2, 3)), jnp.ones((2,), jnp.bfloat16))
    x = ZOO["custom"].samples(2)
    for implementation in (None, "jacobian", "ntk_vector_products"):
        theta = ntt.ntk(model, x, implementation=implementation)
        assert theta.dtype == jnp.float64
        gram = x @ x.T + (x.sum(1)[:, None] * x.sum(1)[None, :])
        expected = gram[:, :, None, None] * jnp.eye(2)[None, None]
        assert relative_error(theta, expected) < 0.02


@pytest.mark.parametrize("shape", [(9,), (4, 9)])
@pytest.mark.parametrize("density", [1.0, 0.6, 0.1])
def test_narrow_samples_of_wide_weights(shape, density, gathers):
    """A product of float32 samples and float64 weights takes both as they are."""

    class Mixed(eqx.Module):
        first: eqx.nn.Linear
        second: eqx.nn.Linear

        def __call__(self, x):
            return (jnp.tanh(x @ self.first.weight) @ self.second.weight).reshape(-1)

    layer = functools.partial(eqx.nn.Linear, use_bias=False, dtype=jnp.float64)
    model = Mixed(layer(20, 9, key=jax.random.key(0)), layer(2, 20, key=jax.random.key(1)))
    model = ntt.prune(model, ntt.scores.Magnitude(), density) if density < 1 else model
    x = jax.random.normal(jax.random.key(2), (3, *shape), jnp.float32)
    with jax.numpy_dtype_promotion("standard"):
        found, expected = ntt.ntk(model, x), ntt.ntk(model, x, implementation="jacobian")
    assert found.dtype == expected.dtype == jnp.float64
    assert relative_error(found, expected) < EXACT


def test_gathered_paths_are_taken(gathers):
    """A mask with few entries is gathered where the weight keeps its order, and only there."""
    taken = set()
    for name in ("raw", "images", "tokens"):
        case = ZOO[name]
        sparse = ntt.sparsify(built(name), every_array)
        mask = random_mask(sparse.mask, 0.02, seed=3)
        traced, layers, _ = analysed(sparse.to_dense(), case.samples(1))
        paths = {p.name.split(" ")[0]: p.path for p in
                 ntt.explain(sparse.with_mask(mask), case.samples(2)).parameters}  # fmt: skip
        support = known_index(kernel_spec(), sparse.with_mask(mask))
        for layer in layers:
            gathered = paths[traced.parameters[layer.weight].path].startswith("gathered")
            many = layer.positions > 1
            plain = layer.keeps_order and (many or layer.groups == 1)
            few = support[layer.weight] is not None
            assert gathered == (plain and few)
            taken.add((many, gathered))
    assert taken == {(many, gathered) for many in (False, True) for gathered in (False, True)}


LOOKUPS = {
    "mapped": lambda table, x: jax.vmap(lambda i: table[i])(x),
    "one row": lambda table, x: table[x[0]][None],
    "clipped": lambda table, x: jnp.take(table, x, axis=0, mode="clip"),
    "filled": lambda table, x: table.at[x].get(mode="fill", fill_value=0),
    "of matrices": lambda table, x: table.reshape(6, 2, 2)[x].reshape(-1, 4),
    "turned": lambda table, x: table.T[:, x].T,
}


@pytest.mark.parametrize("name", LOOKUPS)
def test_embeddings(name, x64):
    """Rows by number, some of them negative or past the end; columns take the explicit Jacobian."""

    class Lookup(eqx.Module):
        table: jax.Array

        def __call__(self, x):
            return jnp.sum(jnp.tanh(LOOKUPS[name](self.table, x)), axis=0)

    model = Lookup(jax.random.normal(jax.random.key(0), (6, 4), jnp.float64))
    _, layers, rest = analysed(model, jnp.zeros((1, 5), int))
    assert [layer.kind for layer in layers] == ([] if name == "turned" else ["embedding"])
    sparse = ntt.sparsify(model, every_array)
    sparse = sparse.with_mask(random_mask(sparse.mask, 0.6, seed=1))
    x = jax.random.randint(jax.random.key(1), (3, 5), -2, 6 if name == "of matrices" else 8)
    expected = ntt.ntk(sparse, x, implementation="jacobian")
    assert relative_error(ntt.ntk(sparse, x), expected) < EXACT


def test_models_and_samples_that_share_nothing():
    """A batch of one against a batch of one, and a model whose only parameter is its output."""

    class Constant(eqx.Module):
        value: jax.Array

        def __call__(self, x):
            return self.value

    theta = ntt.ntk(Constant(jnp.arange(3.0)), jnp.ones((2, 1)), jnp.ones((1, 1)))
    assert theta.shape == (2, 1, 3, 3)
    assert relative_error(theta, jnp.broadcast_to(jnp.eye(3), (2, 1, 3, 3))) == 0
