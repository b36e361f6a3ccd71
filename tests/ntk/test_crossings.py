"""What crosses from one part of a program into another: parameters' own layers, complex numbers."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from helpers.comparison import every_array, random_mask, relative_error, weighted_sum
from helpers.tiers import default_only

import ntt_eqx as ntt

pytestmark = pytest.mark.usefixtures("x64")


class LearnedQueries(eqx.Module):
    """A layer of learned queries alone, read behind the first dense layer of the end."""

    keys: eqx.nn.Linear
    queries: eqx.nn.Linear
    mid: eqx.nn.Linear
    head: eqx.nn.Linear
    learned: jax.Array

    def __init__(self, key, width=8):
        ks = jax.random.split(key, 5)
        self.keys = eqx.nn.Linear(4, width, key=ks[0])
        self.queries = eqx.nn.Linear(4, width, key=ks[1])
        self.mid = eqx.nn.Linear(width, width, key=ks[2])
        self.head = eqx.nn.Linear(width, 3, key=ks[3])
        self.learned = jax.random.normal(ks[4], (5, 4))

    def __call__(self, x):
        q = jax.vmap(self.queries)(jnp.tanh(self.learned))
        k = jax.vmap(self.keys)(x)
        v = jnp.tanh(self.mid(k.mean(0)))
        return self.head(v + q.mean(0))


class Spectrum(eqx.Module):
    """Complex values made in front of the first dense layer of the end and read behind it."""

    conv: eqx.nn.Conv1d
    mid: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(self, key):
        ks = jax.random.split(key, 3)
        self.conv = eqx.nn.Conv1d(4, 3, 2, key=ks[0])
        self.mid = eqx.nn.Linear(6, 4, key=ks[1])
        self.head = eqx.nn.Linear(4, 3, key=ks[2])

    def __call__(self, x):
        h = jnp.tanh(self.conv(x.T))
        spectrum = jnp.fft.rfft(h, axis=1)
        m = jnp.tanh(self.mid(h.reshape(-1)))
        return self.head(m) * jnp.abs(spectrum).sum() + spectrum[:, 0].real


class ComplexWeight(eqx.Module):
    """A complex matrix between transforms, as in a Fourier neural operator."""

    lift: eqx.nn.Linear
    weight: jax.Array

    def __init__(self, key):
        a, b, c = jax.random.split(key, 3)
        self.lift = eqx.nn.Linear(4, 2, key=a)
        real, imaginary = jax.random.normal(b, (2, 3, 2)), jax.random.normal(c, (2, 3, 2))
        self.weight = jax.lax.complex(real, imaginary)

    def __call__(self, x):
        h = jax.vmap(self.lift)(x)
        found = jnp.einsum("kj,koj->ko", jnp.fft.rfft(h, axis=0), self.weight)
        return jnp.tanh(jnp.fft.irfft(found, n=3, axis=0)).sum(0)


class AsPairs(eqx.Module):
    """The same function of two real matrices."""

    lift: eqx.nn.Linear
    real: jax.Array
    imaginary: jax.Array

    def __call__(self, x):
        weight = jax.lax.complex(self.real, self.imaginary)
        return eqx.tree_at(
            lambda m: (m.lift, m.weight), ComplexWeight(jax.random.key(0)), (self.lift, weight)
        )(x)


class Normalised(eqx.Module):
    """Spectral normalisation, with its state held in the model."""

    layer: eqx.nn.SpectralNorm
    state: eqx.nn.State
    head: eqx.nn.Linear

    def __init__(self, key):
        a, b, c = jax.random.split(key, 3)
        make = lambda: eqx.nn.SpectralNorm(eqx.nn.Linear(12, 4, key=a), "weight", key=b)
        self.layer, self.state = eqx.nn.make_with_state(make)()
        self.head = eqx.nn.Linear(4, 3, key=c)

    def __call__(self, x):
        y, _ = self.layer(x.reshape(-1), self.state, inference=True)
        return self.head(jnp.tanh(y))


class Recurrent(eqx.Module):
    """Weights inside `scan`: shared by all iterations, and one layer's after the other's."""

    cell: eqx.nn.GRUCell
    stack: jax.Array
    shifts: jax.Array
    head: eqx.nn.Linear

    def __init__(self, key):
        ks = jax.random.split(key, 4)
        self.cell = eqx.nn.GRUCell(4, 5, key=ks[0])
        self.stack = jax.random.normal(ks[1], (2, 5, 5))
        self.shifts = jax.random.normal(ks[2], (2, 5))
        self.head = eqx.nn.Linear(5, 3, key=ks[3])

    def __call__(self, x):
        h, _ = jax.lax.scan(lambda h, x: (self.cell(x, h), None), jnp.zeros(5, x.dtype), x)
        one = lambda h, row: (jnp.tanh(row[0] @ h + row[1]), h.sum())
        h, sums = jax.lax.scan(one, h, (self.stack, self.shifts))
        return self.head(h) * sums.sum()


class LowRank(eqx.Module):
    """A matrix and a product of two others (LoRA): both factors of a product are parameters."""

    weight: jax.Array
    left: jax.Array
    right: jax.Array

    def __init__(self, key):
        ks = jax.random.split(key, 3)
        self.weight = jax.random.normal(ks[0], (3, 12))
        self.left = jax.random.normal(ks[1], (3, 3))
        self.right = jax.random.normal(ks[2], (3, 12))

    def __call__(self, x):
        square = self.left @ self.left.T  # used twice
        return jnp.tanh((self.weight + self.left @ self.right) @ x.reshape(-1)) + square[0]


class Square(eqx.Module):
    """Two square parameters in one product: either could be taken for the other."""

    left: jax.Array
    right: jax.Array

    def __init__(self, key):
        self.left, self.right = jax.random.normal(key, (2, 4, 4))

    def __call__(self, x):
        return jnp.tanh((self.left @ self.right) @ x[0])[:3]


@jax.custom_vjp
def straight_through(x):
    return jnp.sign(x) * jnp.abs(x) ** 1.5


straight_through.defvjp(lambda x: (straight_through(x), None), lambda _, g: (g,))


class Estimated(eqx.Module):
    """A function whose rule is not its derivative, in front of the first dense layer of the end."""

    conv: eqx.nn.Conv1d
    mid: eqx.nn.Linear

    def __init__(self, key):
        a, b = jax.random.split(key)
        self.conv = eqx.nn.Conv1d(4, 3, 2, key=a)
        self.mid = eqx.nn.Linear(6, 3, key=b)

    def __call__(self, x):
        h = straight_through(self.conv(x.T))
        return jnp.tanh(self.mid(h.reshape(-1))) * h.sum()


class Nothing(eqx.Module):
    """Outputs that depend on no parameter."""

    idle: eqx.nn.Linear

    def __call__(self, x):
        self.idle(x[0])
        return x[0, :3]


MODELS = {
    "learned queries": LearnedQueries,
    "complex values": Spectrum,
    "complex weight": ComplexWeight,
    "spectral norm": Normalised,
    "recurrent": Recurrent,
    "low rank": LowRank,
    "square": Square,
    "straight through": Estimated,
    "nothing": lambda key: Nothing(eqx.nn.Linear(4, 2, key=key)),
}


def widened(model):
    wide = lambda a: a.astype(jnp.float64) if a.dtype == jnp.float32 else a
    return jax.tree.map(lambda a: wide(a) if eqx.is_inexact_array(a) else a, model)


def real(tree):
    return jax.tree.map(lambda a: jnp.stack([a.real, a.imag]), tree)


@pytest.mark.parametrize(
    "name", default_only(MODELS, "complex values", "learned queries", "low rank")
)
def test_kernel_and_gradient(name):
    """Active, ambient and under a metric, against the explicit Jacobian."""
    model = widened(MODELS[name](jax.random.key(0)))
    sparse = ntt.sparsify(model, every_array)
    sparse = sparse.with_mask(random_mask(sparse.mask, 0.6))
    x = jax.random.normal(jax.random.key(1), (2, 3, 4))
    params, static = eqx.partition(sparse, eqx.is_inexact_array)
    rate = jax.tree.map(
        lambda w: jnp.linspace(0, 2, w.size).reshape(w.shape),
        eqx.filter(model, eqx.is_inexact_array),
    )

    def run(params, implementation):
        """The active kernel with the gradient of a sum of it, and two kernels more."""

        def kernel(params, **options):
            return ntt.ntk(eqx.combine(params, static), x, implementation=implementation, **options)

        def loss(params):
            theta = kernel(params)
            return weighted_sum(theta), theta

        (_, theta), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        ambient = kernel(params, kernel="ambient", outputs="trace")
        return [theta, ambient, kernel(params, metric=rate, outputs="diagonal")], real(gradient)

    compiled = jax.jit(run, static_argnums=1)
    (found, gradient), (expected, slope) = compiled(params, None), compiled(params, "jacobian")
    assert relative_error(found, expected) < 1e-12
    assert relative_error(gradient, slope) < 1e-12


@pytest.mark.parametrize("name", ["complex weight", "recurrent"])
def test_the_second_oracle_agrees(name):
    model = widened(MODELS[name](jax.random.key(0)))
    x = jax.random.normal(jax.random.key(1), (2, 3, 4))
    of = jax.jit(
        lambda implementation: ntt.ntk(model, x, implementation=implementation),
        static_argnums=0,
    )
    assert relative_error(of("ntk_vector_products"), of("jacobian")) < 1e-12


def test_a_complex_weight_is_a_pair_of_real_ones():
    model = widened(ComplexWeight(jax.random.key(0)))
    pairs = AsPairs(model.lift, model.weight.real, model.weight.imag)
    x = jax.random.normal(jax.random.key(1), (3, 3, 4))
    assert relative_error(ntt.ntk(model, x), ntt.ntk(pairs, x)) < 1e-12


def test_paths_of_weights_inside_loops():
    x = jnp.ones((2, 3, 4))
    found = {p.name: p.path for p in ntt.explain(Recurrent(jax.random.key(0)), x).parameters}
    assert found[".cell.weight_ih + .cell.bias"] == found[".cell.weight_hh"] == "tangents"
    assert found[".stack + .shifts"] == "factors"


@pytest.mark.parametrize("name", ["nothing", "recurrent"])
def test_each_side_has_directions_of_its_own_number(name):
    model, x = MODELS[name](jax.random.key(0)), jax.random.normal(jax.random.key(1), (3, 3, 4))
    one, two = jnp.eye(jnp.size(model(x[0])))[:2], jnp.eye(jnp.size(model(x[0])))[:1]
    found = ntt.ntk(model, x, x[:2], directions=(one, two))
    assert found.shape == (3, 2, 2, 1)
    assert relative_error(found, ntt.ntk(model, x, x[:2])[:, :, :2, :1]) < 1e-5


def test_unused_parameters_are_named():
    (weight, bias) = ntt.explain(
        MODELS["nothing"](jax.random.key(0)), jnp.ones((2, 3, 4))
    ).parameters
    assert (weight.path, bias.path) == ("unused", "unused")
    assert weight.flops == weight.bytes == 0
