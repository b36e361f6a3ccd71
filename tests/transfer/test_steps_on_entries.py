"""Steps that evaluate large layers on kept weights alone are masked steps, refreshes included."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.comparison import relative_error
from hypothesis import given, settings, strategies as st

import ntt_eqx as ntt
from ntt_eqx._sparse_layers._products import product
from ntt_eqx._sparse_layers._sorted_index import sorted_each
from ntt_eqx._transfer import _state

pytestmark = pytest.mark.usefixtures("x64")


def started(kept, density=0.2, optimizer=None, refresh=None, scope="layer", **options):
    """The state of a perceptron of odd sizes, whose layers take entries if `kept` says so."""
    model = eqx.nn.MLP(17, 3, 70, 1, key=jax.random.key(0))
    method = ntt.NeuralTangentTransfer(
        sparsity=ntt.Sparsity(density, scope=scope),
        loss=ntt.KernelMatching(kernel_weight=0.1, l2_weight=1e-3, probe=ntt.Sketch(2)),
        refresh=ntt.MagnitudeRefresh(2) if refresh is None else refresh,
        optimizer=optax.adam(0.01) if optimizer is None else optimizer,
        **options,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_state, "pays_in_a_transfer", lambda mask: kept)
        return ntt.ntt_init(model, method)


def run(state, steps=5):
    step, found = eqx.filter_jit(ntt.ntt_step), []
    for n in range(steps):
        state, metrics = step(state, jax.random.normal(jax.random.key(n), (6, 17)))
        found.append(metrics)
    return state, found


def assert_same(**options):
    """Weights under the mask and moments among them."""
    masked, want = run(started(False, **options))
    state = started(True, **options)
    kept, got = run(state)
    assert eqx.tree_equal(kept.student.masks, masked.student.masks)
    for name in ("student", "opt_state"):
        one, two = (eqx.filter(getattr(s, name), eqx.is_inexact_array) for s in (kept, masked))
        assert relative_error(one, two) < 1e-12
    assert relative_error(got, want) < 1e-6  # the metrics are float32
    return state


def test_what_a_step_evaluates():
    x = jax.random.normal(jax.random.key(1), (6, 17))
    masked, kept = started(False), started(True)
    assert masked.evaluated is masked.student
    assert relative_error(jax.vmap(kept.evaluated)(x), jax.vmap(masked.student)(x)) < 1e-12
    theta = ntt.ntk(kept.evaluated, x)
    assert relative_error(theta, ntt.ntk(masked.student, x)) < 1e-12
    first = ntt.explain(kept.evaluated, x).parameters[0]
    assert first.name.startswith(".layers[0].weight.values")
    assert first.kept == int(kept.student.mask.layers[0].weight.sum())


CASES = {
    "adam": {},
    "momentum, zero": dict(optimizer=optax.sgd(0.1, momentum=0.9), pruned="zero"),
    "decay, frozen": dict(optimizer=optax.adamw(0.01, weight_decay=0.1), pruned="frozen"),
    "rigl": dict(refresh=ntt.RigLRefresh(2, until=4)),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n != "adam" else ()) for n in CASES]
)
def test_steps_are_masked_steps(name):
    state = assert_same(**CASES[name])
    assert len(state.entries) == 2 and jax.tree.leaves(state.support) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [dict(scope="global", density=0.5), dict(density=lambda step: 0.3)]
)
def test_counts_that_change_stay_masked(options):
    state = assert_same(**options, **({"num_steps": 5} if "density" in options else {}))
    assert not state.entries


class Experts(eqx.Module):
    """A stack of layers under `vmap`, whose weight has three axes."""

    experts: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(self, key):
        one = lambda key: eqx.nn.Linear(17, 30, key=key)
        self.experts = eqx.filter_vmap(one)(jax.random.split(key, 2))
        self.head = eqx.nn.Linear(30, 3, key=key)

    def __call__(self, x):
        found = eqx.filter_vmap(lambda layer, x: layer(x), in_axes=(eqx.if_array(0), None))
        return self.head(jnp.tanh(found(self.experts, x)).sum(0))


def test_a_stack_of_layers_stays_masked(monkeypatch):
    """Were it large enough, its entries would be looked for, as those of one layer."""
    monkeypatch.setattr(_state, "pays_in_a_transfer", lambda mask: True)
    config = ntt.NTTConfig(density=0.2, num_steps=4, mask_every=2)
    state = ntt.ntt_init(Experts(jax.random.key(0)), config, optax.adam(0.01))
    assert list(state.entries) == [".head"]
    state, metrics = run(state, 3)
    assert all(bool(jnp.isfinite(m.loss)) for m in metrics)


def with_mask(state, change):
    masks = jax.tree.map(change, state.student.mask)
    return eqx.tree_at(lambda s: s.student, state, state.student.with_mask(masks))


def test_a_mask_that_a_user_puts_in_counts_at_once():
    """Empty rows, fewer entries, and more than there is room for."""
    x = jax.random.normal(jax.random.key(0), (6, 17))
    evaluate = eqx.filter_jit(ntt.ntt_evaluate)
    fewer = lambda m: jnp.roll(m, 1, axis=1).at[:3].set(False)
    want, got = (evaluate(with_mask(started(k), fewer), x) for k in (False, True))
    assert relative_error(got, want) < 1e-6
    none = lambda m: jnp.zeros_like(m)
    want, got = (evaluate(with_mask(started(k), none), x) for k in (False, True))
    assert relative_error(got, want) < 1e-6
    more = with_mask(started(True), lambda m: jnp.ones_like(m))
    assert jnp.isnan(evaluate(more, x).loss)
    with pytest.raises(ValueError, match="transfer: the mask keeps more weights"):
        ntt.transfer(more, x, num_steps=1)


def assert_index(shapes, density, room, seed):
    """Every product and its derivatives, of rows without entries and full ones."""
    rng = np.random.default_rng(seed)
    masks = [rng.random(s) < density * rng.random((s[0], 1)) ** 3 for s in shapes]
    masks[0][0] = True
    kept = tuple(max(1, int(m.sum()) + room) for m in masks)
    index_of = jax.jit(sorted_each, static_argnums=1)
    found, fits = index_of(list(map(jnp.asarray, masks)), kept)
    assert list(fits) == [m.sum() <= k for m, k in zip(masks, kept, strict=True)]
    for index, mask, fit in zip(found, masks, fits, strict=True):
        if not fit:
            continue
        np.testing.assert_array_equal(index.mask(), mask)
        matrix = jnp.asarray(rng.normal(size=mask.shape) * mask)
        x, y = (jnp.asarray(rng.normal(size=(n, 20))) for n in mask.shape[::-1])

        @jax.jit
        def of(matrix, x, index=index, y=y):
            outputs = lambda matrix, x: product(index.gather(matrix), x, index)
            bilinear = lambda matrix, x: jnp.sum(y * outputs(matrix, x))
            return outputs(matrix, x), jax.grad(bilinear, (0, 1))(matrix, x)

        want = matrix @ x, (jnp.where(mask, y @ x.T, 0.0), matrix.T @ y)
        assert relative_error(of(matrix, x), want) < 1e-12


def test_an_index_of_masks_that_change():
    assert_index([(150, 90), (1, 70)], 0.3, 2, 0)


@pytest.mark.slow
@settings(max_examples=5, deadline=None)
@given(st.data())
def test_drawn_indices(data):
    shapes = [(data.draw(st.integers(1, 150)), data.draw(st.integers(1, 90))) for _ in range(2)]
    density, room = data.draw(st.floats(0, 1)), data.draw(st.integers(-3, 2))
    assert_index(shapes, density, room, data.draw(st.integers(0, 99)))


class AsksForClasses(eqx.Module):
    """Applies its activation behind linear layers alone."""

    layers: list

    def __init__(self, key):
        one, two, three = jax.random.split(key, 3)
        norm = eqx.nn.LayerNorm(30)
        self.layers = [
            *(eqx.nn.Linear(17, 30, key=one), norm, eqx.nn.Linear(30, 30, key=two)),
            eqx.nn.Linear(30, 3, key=three),
        ]

    def __call__(self, x):
        for layer in self.layers[:-1]:
            x = layer(x)
            if isinstance(layer, eqx.nn.Linear) and type(layer) is eqx.nn.Linear:
                x = jnp.tanh(x)
        return self.layers[-1](x)


class ReadsWeights(eqx.Module):
    """Uses a weight twice, once the other way round, and the norm of another."""

    hidden: eqx.nn.Linear
    head: eqx.nn.WeightNorm

    def __init__(self, key):
        one, two = jax.random.split(key)
        self.hidden = eqx.nn.Linear(17, 30, key=one)
        self.head = eqx.nn.WeightNorm(eqx.nn.Linear(17, 3, key=two))

    def __call__(self, x):
        return self.head(self.hidden.weight.T @ jnp.tanh(self.hidden(x)))


class MapsArrays(eqx.Module):
    """Maps a function over its own arrays, of which kept entries are no matrix."""

    layers: list[eqx.nn.Linear]

    def __init__(self, key):
        one, two = jax.random.split(key)
        self.layers = [eqx.nn.Linear(17, 30, key=one), eqx.nn.Linear(30, 3, key=two)]

    def changed(self, array):
        raise NotImplementedError

    def __call__(self, x):
        arrays, static = eqx.partition(self, eqx.is_inexact_array)
        one, two = eqx.combine(jax.tree.map(self.changed, arrays), static).layers
        return two(jnp.tanh(one(x)))


class Standardises(MapsArrays):
    """The deviation of kept entries is not that of a matrix with zeros."""

    def changed(self, array):
        return array / jnp.std(array) if array.size > 30 else array


class ChangesMatrices(MapsArrays):
    """Kept entries are left as they are, for they have one axis."""

    def changed(self, array):
        return jnp.sin(9 * array) if array.ndim == 2 else array


@pytest.mark.parametrize("kind", [AsksForClasses, ReadsWeights, Standardises, ChangesMatrices])
def test_models_that_look_at_their_layers(kind, monkeypatch):
    """A step evaluates what the model computes with its own layers, whatever it asks of them."""
    model, x = kind(jax.random.key(0)), jax.random.normal(jax.random.key(1), (6, 17))
    method = ntt.NeuralTangentTransfer(
        sparsity=ntt.Sparsity(0.2), loss=ntt.KernelMatching(), optimizer=optax.sgd(0.1), num_steps=4
    )
    masked = ntt.ntt_init(model, method)
    monkeypatch.setattr(_state, "pays_in_a_transfer", lambda mask: True)
    kept = ntt.ntt_init(model, method)
    assert kept.entries and not masked.entries
    for _ in range(2):
        kept, one = eqx.filter_jit(ntt.ntt_step)(kept, x)
        masked, two = eqx.filter_jit(ntt.ntt_step)(masked, x)
        assert relative_error(one, two) < 1e-6
    arrays = [eqx.filter(state.student, eqx.is_inexact_array) for state in (kept, masked)]
    assert relative_error(*arrays) < 1e-12
