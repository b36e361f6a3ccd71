"""Small versions of the architectures that people bring: what `ntk` and a transfer must take.

Unlike those of `zoo`, they were not drawn for the engine. Each is written as its users write it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax


@dataclasses.dataclass(frozen=True)
class Case:
    build: Callable[[Any], Any]
    shape: tuple[int, ...]
    kind: str = "real"  # of the samples: real numbers, integers below 6, or booleans
    jacobian: tuple[str, ...] = ()  # matrices and larger that enter the kernel by their Jacobians
    density: float = 0.3  # of a transfer; where a row without weights has no norm, more

    def samples(self, n, seed=0):
        rng = np.random.default_rng(seed)
        if self.kind == "real":
            return jnp.asarray(rng.normal(size=(n, *self.shape)), jnp.zeros(()).dtype)
        if self.kind == "int":
            return jnp.asarray(rng.integers(0, 6, (n, *self.shape)), jnp.int32)
        return jnp.asarray(rng.random((n, *self.shape)) < 0.5)


def weight(key, *shape):
    return jr.normal(key, shape) / np.sqrt(shape[-1])


class MobileNet(eqx.Module):
    """An inverted residual block with squeeze-excitation and hard swish (Howard et al. 2019)."""

    stem: eqx.nn.Conv2d
    expand: eqx.nn.Conv2d
    depthwise: eqx.nn.Conv2d
    squeeze: eqx.nn.Linear
    excite: eqx.nn.Linear
    project: eqx.nn.Conv2d
    head: eqx.nn.Linear

    def __init__(self, key):
        k = jr.split(key, 7)
        self.stem = eqx.nn.Conv2d(2, 3, 3, stride=2, padding=1, key=k[0])
        self.expand = eqx.nn.Conv2d(3, 4, 1, key=k[1])
        self.depthwise = eqx.nn.Conv2d(4, 4, 3, padding=1, groups=4, key=k[2])
        self.squeeze = eqx.nn.Linear(4, 2, key=k[3])
        self.excite = eqx.nn.Linear(2, 4, key=k[4])
        self.project = eqx.nn.Conv2d(4, 3, 1, key=k[5])
        self.head = eqx.nn.Linear(3, 2, key=k[6])

    def __call__(self, x):
        x = jax.nn.hard_swish(self.stem(x))
        h = jax.nn.hard_swish(self.depthwise(jax.nn.relu6(self.expand(x))))
        gate = self.excite(jax.nn.relu(self.squeeze(jnp.mean(h, axis=(1, 2)))))
        h = x + self.project(h * jax.nn.hard_sigmoid(gate)[:, None, None])
        return self.head(jnp.mean(h, axis=(1, 2)))


class TiedAutoencoder(eqx.Module):
    """The decoder is the encoder transposed."""

    weight: jax.Array
    hidden: jax.Array
    seen: jax.Array

    def __init__(self, key):
        self.weight = weight(key, 3, 5)
        self.hidden, self.seen = jnp.zeros(3), jnp.zeros(5)

    def __call__(self, x):
        return self.weight.T @ jnp.tanh(self.weight @ x + self.hidden) + self.seen


class Mamba(eqx.Module):
    """A selective state space (Gu & Dao 2023), as a loop or as an associative scan."""

    enter: eqx.nn.Linear
    line: eqx.nn.Conv1d
    select: eqx.nn.Linear
    log_a: jax.Array
    skip: jax.Array
    leave: eqx.nn.Linear
    associative: bool = eqx.field(static=True)

    def __init__(self, key, associative=False):
        k = jr.split(key, 4)
        self.enter = eqx.nn.Linear(3, 8, key=k[0])
        self.line = eqx.nn.Conv1d(4, 4, 2, padding=((1, 0),), groups=4, key=k[1])
        self.select = eqx.nn.Linear(4, 4 + 2 * 2, key=k[2])
        self.log_a = jnp.tile(jnp.log(jnp.arange(1.0, 3.0))[None], (4, 1))
        self.skip = jnp.ones(4)
        self.leave = eqx.nn.Linear(4, 2, key=k[3])
        self.associative = associative

    def __call__(self, x):  # [length, 3]
        u, z = jnp.split(jax.vmap(self.enter)(x), 2, axis=1)
        u = jax.nn.silu(self.line(u.T).T)
        step, b, c = jnp.split(jax.vmap(self.select)(u), (4, 6), axis=1)
        step = jax.nn.softplus(step)
        decay = jnp.exp(-step[:, :, None] * jnp.exp(self.log_a)[None])  # [length, 4, 2]
        drive = (step * u)[:, :, None] * b[:, None, :]
        if self.associative:
            join = lambda one, two: (one[0] * two[0], two[0] * one[1] + two[1])
            _, states = lax.associative_scan(join, (decay, drive))
        else:

            def one(h, row):
                h = row[0] * h + row[1]
                return h, h

            _, states = lax.scan(one, jnp.zeros_like(drive[0]), (decay, drive))
        y = jnp.einsum("tds,ts->td", states, c) + u * self.skip[None]
        return self.leave(jnp.mean(y * jax.nn.silu(z), axis=0))


class Recurrent(eqx.Module):
    """A cell along a sequence, read at its end."""

    cell: eqx.Module
    head: eqx.nn.Linear

    def __init__(self, key, cell=eqx.nn.GRUCell):
        self.cell = cell(3, 4, key=key)
        self.head = eqx.nn.Linear(4, 2, key=jr.fold_in(key, 1))

    def __call__(self, x):
        lstm = isinstance(self.cell, eqx.nn.LSTMCell)
        zero = jnp.zeros((4,), x.dtype)
        start = (zero, zero) if lstm else zero
        last, _ = lax.scan(lambda h, row: (self.cell(row, h), None), start, x)
        return self.head(last[0] if lstm else last)


class Transformer(eqx.Module):
    """A causal block with rotary positions, on tokens; embedding and read-out are one matrix."""

    embedding: jax.Array
    rope: eqx.nn.RotaryPositionalEmbedding
    norms: list
    attention: eqx.nn.MultiheadAttention
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, key):
        k = jr.split(key, 4)
        self.embedding = weight(k[0], 6, 4)
        self.rope = eqx.nn.RotaryPositionalEmbedding(2, theta=100.0, dtype=jnp.zeros(()).dtype)
        self.norms = [eqx.nn.RMSNorm(4), eqx.nn.LayerNorm(4)]
        self.attention = eqx.nn.MultiheadAttention(2, 4, key=k[1])
        self.up = eqx.nn.Linear(4, 6, key=k[2])
        self.down = eqx.nn.Linear(6, 4, key=k[3])

    def __call__(self, tokens):
        h = self.embedding[tokens]
        n = jax.vmap(self.norms[0])(h)
        turn = lambda q, k, v: (jax.vmap(self.rope, 1, 1)(q), jax.vmap(self.rope, 1, 1)(k), v)
        mask = jnp.tril(jnp.ones((len(h), len(h)), bool))
        h = h + self.attention(n, n, n, mask=mask, process_heads=turn)
        n = jax.vmap(self.norms[1])(h)
        h = h + jax.vmap(self.down)(jax.nn.gelu(jax.vmap(self.up)(n)))
        return self.embedding @ h[-1]


class Experts(eqx.Module):
    """The two best of three experts: a stack under `vmap`, or one array and an einsum."""

    router: eqx.nn.Linear
    experts: Any
    vmapped: bool = eqx.field(static=True)

    def __init__(self, key, vmapped=True):
        keys = jr.split(key, 3)
        self.router = eqx.nn.Linear(4, 3, key=jr.fold_in(key, 1))
        if vmapped:
            self.experts = eqx.filter_vmap(lambda k: eqx.nn.MLP(4, 2, 3, 1, key=k))(keys)
        else:
            self.experts = [weight(keys[0], 3, 5, 4), weight(keys[1], 3, 2, 5)]
        self.vmapped = vmapped

    def __call__(self, x):
        score, which = lax.top_k(self.router(x), 2)
        if self.vmapped:
            y = eqx.filter_vmap(lambda e, x: e(x), in_axes=(eqx.if_array(0), None))(self.experts, x)
        else:
            h = jax.nn.relu(jnp.einsum("ehi,i->eh", self.experts[0], x))
            y = jnp.einsum("eoh,eh->eo", self.experts[1], h)
        return jax.nn.softmax(score) @ y[which]


class Mixer(eqx.Module):
    """MLP-Mixer (Tolstikhin et al. 2021): patches, then layers along either axis."""

    patches: eqx.nn.Conv2d
    norms: list
    tokens: eqx.nn.MLP
    channels: eqx.nn.MLP
    head: eqx.nn.Linear

    def __init__(self, key):
        k = jr.split(key, 4)
        self.patches = eqx.nn.Conv2d(2, 3, 2, stride=2, key=k[0])
        self.norms = [eqx.nn.LayerNorm((3, 4)) for _ in range(2)]
        self.tokens = eqx.nn.MLP(4, 4, 5, 1, activation=jax.nn.gelu, key=k[1])
        self.channels = eqx.nn.MLP(3, 3, 4, 1, activation=jax.nn.gelu, key=k[2])
        self.head = eqx.nn.Linear(3, 2, key=k[3])

    def __call__(self, x):
        h = self.patches(x).reshape(3, -1)
        h = h + jax.vmap(self.tokens)(self.norms[0](h))
        h = h + jax.vmap(self.channels, 1, 1)(self.norms[1](h))
        return self.head(jnp.mean(h, axis=1))


class GraphAttention(eqx.Module):
    """Two heads on a fixed graph of four nodes (Velickovic et al. 2018)."""

    lift: jax.Array
    source: jax.Array
    target: jax.Array
    head: eqx.nn.Linear
    edges: jax.Array

    def __init__(self, key):
        k = jr.split(key, 4)
        self.lift = weight(k[0], 2, 3, 3)
        self.source, self.target = weight(k[1], 2, 3), weight(k[2], 2, 3)
        self.head = eqx.nn.Linear(6, 2, key=k[3])
        self.edges = jnp.asarray(np.eye(4) + np.eye(4, k=1) + np.eye(4, k=-2)) > 0

    def __call__(self, x):  # [nodes, 3]
        h = jnp.einsum("hoi,ni->hno", self.lift, x)
        one = jnp.einsum("hno,ho->hn", h, self.source)
        two = jnp.einsum("hno,ho->hn", h, self.target)
        score = jax.nn.leaky_relu(one[:, :, None] + two[:, None, :], 0.2)
        score = jnp.where(self.edges[None], score, -jnp.inf)
        h = jax.nn.elu(jnp.einsum("hnm,hmo->nho", jax.nn.softmax(score, axis=2), h))
        return self.head(jnp.mean(h.reshape(4, -1), axis=0))


class UNet(eqx.Module):
    """Down, up by a transposed convolution, and the skip beside it; one map of outputs."""

    down: eqx.nn.Conv2d
    middle: eqx.nn.Conv2d
    up: eqx.nn.ConvTranspose2d
    out: eqx.nn.Conv2d

    def __init__(self, key):
        k = jr.split(key, 4)
        self.down = eqx.nn.Conv2d(1, 2, 3, padding=1, key=k[0])
        self.middle = eqx.nn.Conv2d(2, 3, 3, padding=1, key=k[1])
        self.up = eqx.nn.ConvTranspose2d(3, 2, 2, stride=2, key=k[2])
        self.out = eqx.nn.Conv2d(4, 1, 1, key=k[3])

    def __call__(self, x):
        skip = jax.nn.relu(self.down(x))
        h = jax.nn.relu(self.middle(eqx.nn.MaxPool2d(2, 2)(skip)))
        return self.out(jnp.concatenate([skip, self.up(h)]))[0]


class WeightNormed(eqx.Module):
    """Weight normalisation of a convolution and of a dense layer."""

    conv: eqx.nn.WeightNorm
    dense: eqx.nn.WeightNorm

    def __init__(self, key):
        one, two = jr.split(key)
        self.conv = eqx.nn.WeightNorm(eqx.nn.Conv1d(2, 3, 2, key=one))
        self.dense = eqx.nn.WeightNorm(eqx.nn.Linear(12, 2, key=two))

    def __call__(self, x):
        return self.dense(jnp.tanh(self.conv(x)).reshape(-1))


class SpectralNormed(eqx.Module):
    """Spectral normalisation, with its state held in the model."""

    layer: eqx.nn.SpectralNorm
    head: eqx.nn.Linear
    state: eqx.nn.State

    def __init__(self, key):
        one, two, three = jr.split(key, 3)
        make = eqx.nn.make_with_state(
            lambda: eqx.nn.SpectralNorm(eqx.nn.Linear(4, 3, key=one), "weight", key=two)
        )
        layer, self.state = make()
        self.layer = eqx.nn.inference_mode(layer)
        self.head = eqx.nn.Linear(3, 2, key=three)

    def __call__(self, x):
        y, _ = self.layer(x, self.state)
        return self.head(jnp.tanh(y))


class Fourier(eqx.Module):
    """A Fourier neural operator (Li et al. 2021), its spectral weights complex or as pairs."""

    lift: eqx.nn.Linear
    spectral: Any
    local: eqx.nn.Conv1d
    head: eqx.nn.Linear

    def __init__(self, key, pairs=False):
        k = jr.split(key, 5)
        self.lift = eqx.nn.Linear(1, 3, key=k[0])
        re, im = weight(k[1], 2, 3, 3), weight(k[2], 2, 3, 3)
        self.spectral = (re, im) if pairs else lax.complex(re, im)
        self.local = eqx.nn.Conv1d(3, 3, 1, key=k[3])
        self.head = eqx.nn.Linear(3, 2, key=k[4])

    def __call__(self, x):  # [points]
        h = jax.vmap(self.lift)(x[:, None]).T
        w = lax.complex(*self.spectral) if isinstance(self.spectral, tuple) else self.spectral
        modes = jnp.fft.rfft(h)
        low = jnp.einsum("moi,im->om", w, modes[:, :2])
        modes = jnp.zeros_like(modes).at[:, :2].set(low)
        h = jax.nn.gelu(jnp.fft.irfft(modes, n=h.shape[1]) + self.local(h))
        return self.head(jnp.mean(h, axis=1))


class LoRA(eqx.Module):
    """A dense layer with an update of low rank beside it."""

    base: eqx.nn.Linear
    down: jax.Array
    up: jax.Array
    head: eqx.nn.Linear

    def __init__(self, key):
        k = jr.split(key, 4)
        self.base = eqx.nn.Linear(4, 5, key=k[0])
        self.down, self.up = weight(k[1], 2, 4), weight(k[2], 5, 2)
        self.head = eqx.nn.Linear(5, 2, key=k[3])

    def __call__(self, x):
        frozen = jax.tree.map(lax.stop_gradient, self.base)
        return self.head(jnp.tanh(frozen(x) + self.up @ (self.down @ x)))


class Normed(eqx.Module):
    """BatchNorm with the statistics it has gathered, held in the model."""

    conv: eqx.nn.Conv1d
    norm: eqx.nn.BatchNorm
    head: eqx.nn.Linear
    state: eqx.nn.State

    def __init__(self, key):
        one, two = jr.split(key)
        self.conv = eqx.nn.Conv1d(2, 3, 2, key=one)
        norm, self.state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(3, "batch", mode="ema")
        self.norm = eqx.nn.inference_mode(norm)
        self.head = eqx.nn.Linear(12, 2, key=two)

    def __call__(self, x):
        h, _ = self.norm(self.conv(x), self.state)
        return self.head(jax.nn.relu(h).reshape(-1))


class Siren(eqx.Module):
    """Sines of coordinates (Sitzmann et al. 2020)."""

    layers: list

    def __init__(self, key):
        widths = (2, 5, 4, 3)
        keys = jr.split(key, 3)
        self.layers = [
            eqx.nn.Linear(i, o, key=k)
            for i, o, k in zip(widths[:-1], widths[1:], keys, strict=True)
        ]

    def __call__(self, x):
        for layer in self.layers[:-1]:
            x = jnp.sin(3.0 * layer(x))
        return self.layers[-1](x)


class Chebyshev(eqx.Module):
    """A Kolmogorov-Arnold network of Chebyshev polynomials."""

    layers: list

    def __init__(self, key):
        one, two = jr.split(key)
        self.layers = [weight(one, 4, 3, 4), weight(two, 2, 4, 4)]

    def __call__(self, x):
        for w in self.layers:
            x = jnp.tanh(x)
            basis = [jnp.ones_like(x), x]
            for _ in range(2):
                basis.append(2 * x * basis[-1] - basis[-2])
            x = jnp.einsum("oid,id->o", w, jnp.stack(basis, axis=1))
        return x


class Splines(eqx.Module):
    """A Kolmogorov-Arnold network of linear B-splines beside a plain layer (Liu et al. 2024)."""

    base_weight: jax.Array
    spline_weight: jax.Array
    head: eqx.nn.Linear
    grid: tuple[float, ...] = eqx.field(static=True)

    def __init__(self, key):
        k = jr.split(key, 3)
        self.base_weight, self.spline_weight = weight(k[0], 4, 3), weight(k[1], 4, 3, 5)
        self.head = eqx.nn.Linear(4, 2, key=k[2])
        self.grid = (-2.0, -1.0, 0.0, 1.0, 2.0)

    def __call__(self, x):
        hats = jax.nn.relu(1 - jnp.abs(x[:, None] - jnp.asarray(self.grid, x.dtype)[None]))
        y = self.base_weight @ jax.nn.silu(x) + jnp.einsum("oig,ig->o", self.spline_weight, hats)
        return self.head(y)


class Perceiver(eqx.Module):
    """Learned queries, turned by a layer of their own, pool the features of a convolution.

    What the queries alone say is read once more behind the first dense layer.
    """

    conv: eqx.nn.Conv1d
    learned: jax.Array
    query: eqx.nn.Linear
    key_value: eqx.nn.Linear
    middle: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(self, key):
        k = jr.split(key, 6)
        self.conv = eqx.nn.Conv1d(2, 3, 2, key=k[0])
        self.learned = weight(k[1], 2, 4)
        self.query = eqx.nn.Linear(4, 3, key=k[2])
        self.key_value = eqx.nn.Linear(3, 6, key=k[3])
        self.middle = eqx.nn.Linear(6, 3, key=k[4])
        self.head = eqx.nn.Linear(3, 2, key=k[5])

    def __call__(self, x):
        q = jax.vmap(self.query)(jnp.tanh(self.learned))
        keys, values = jnp.split(jax.vmap(self.key_value)(jnp.tanh(self.conv(x)).T), 2, axis=1)
        pooled = jax.nn.softmax(q @ keys.T, axis=1) @ values
        return self.head(jnp.tanh(self.middle(pooled.reshape(-1))) + jnp.mean(q, axis=0))


class Bag(eqx.Module):
    """Words that are there or not: booleans choose rows of a table and open a gate."""

    table: eqx.nn.Embedding
    gate: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(self, key):
        k = jr.split(key, 3)
        self.table = eqx.nn.Embedding(2, 4, key=k[0])
        self.gate = eqx.nn.Linear(5, 4, key=k[1])
        self.head = eqx.nn.Linear(4, 2, key=k[2])

    def __call__(self, x):
        rows = jax.vmap(self.table)(x.astype(jnp.int32))
        gate = jax.nn.sigmoid(self.gate(x.astype(rows.dtype)))
        return self.head(jnp.sum(jnp.where(x[:, None], rows, -rows), axis=0) * gate)


NORMS = tuple(f".norms[{n}].{name}" for n in range(2) for name in ("weight", "bias"))
WEIGHT_NORM = (".conv.layer.weight", ".dense.layer.weight")
PAIRS = (".spectral[0]", ".spectral[1]")

ZOO = {
    "mobilenet, squeeze-excitation": Case(MobileNet, (2, 5, 5)),
    "tied autoencoder": Case(TiedAutoencoder, (5,), jacobian=(".weight",)),
    "mamba, scan": Case(Mamba, (4, 3), jacobian=(".log_a",)),
    "mamba, associative scan": Case(lambda key: Mamba(key, True), (4, 3), jacobian=(".log_a",)),
    "gru": Case(Recurrent, (4, 3)),
    "lstm": Case(lambda key: Recurrent(key, eqx.nn.LSTMCell), (4, 3)),
    "transformer, rope, tied tokens": Case(Transformer, (3,), "int", (".embedding",)),
    "experts, vmapped": Case(Experts, (4,)),
    "experts, einsum": Case(lambda key: Experts(key, False), (4,)),
    "mlp-mixer": Case(Mixer, (2, 4, 4), jacobian=NORMS),
    "graph attention": Case(GraphAttention, (4, 3)),
    "u-net": Case(UNet, (1, 4, 4)),
    "weight norm": Case(WeightNormed, (2, 5), jacobian=WEIGHT_NORM, density=0.6),
    "spectral norm": Case(SpectralNormed, (4,), jacobian=(".layer.layer.weight",)),
    "fno, complex": Case(Fourier, (6,), jacobian=(".spectral",)),
    "fno, pairs": Case(lambda key: Fourier(key, True), (6,), jacobian=PAIRS),
    "lora": Case(LoRA, (4,), jacobian=(".base.weight",)),
    "batch norm": Case(Normed, (2, 5)),
    "siren": Case(Siren, (2,)),
    "kan, chebyshev": Case(Chebyshev, (3,)),
    "kan, splines": Case(Splines, (3,)),
    "perceiver": Case(Perceiver, (2, 6), jacobian=(".learned",)),
    "booleans": Case(Bag, (5,), "bool"),
}
