"""Small models that between them use their parameters in every way the engine tells apart.

`ZOO` names them; each comes with samples for it and the path that every parameter must take:
"dense" or "convolution" as the weight of a layer, "bias" folded into one, or "rest".
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array


@dataclasses.dataclass(frozen=True)
class Case:
    build: Callable[[Array], Any]
    shape: tuple[int, ...]
    paths: dict[str, str]
    tokens: int = 0  # samples are integers below this

    def samples(self, n, seed=0, dtype=None):
        rng = np.random.default_rng(seed)
        if self.tokens:
            return jnp.asarray(rng.integers(0, self.tokens, (n, *self.shape)))
        x = rng.normal(size=(n, *self.shape))
        return jnp.asarray(x, jnp.zeros(()).dtype if dtype is None else dtype)


class Images(eqx.Module):
    """2-D: stride, padding, dilation, groups, pooling, a transposed convolution."""

    stride: eqx.nn.Conv2d
    groups: eqx.nn.Conv2d
    pointwise: eqx.nn.Conv2d
    up: eqx.nn.ConvTranspose2d
    whole: eqx.nn.Conv2d
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 6)
        self.stride = eqx.nn.Conv2d(2, 4, 3, stride=2, padding=1, key=keys[0])
        self.groups = eqx.nn.Conv2d(
            4, 4, (2, 1), groups=2, dilation=(2, 1), padding=(1, 0), key=keys[1]
        )
        self.pointwise = eqx.nn.Conv2d(4, 3, 1, use_bias=False, key=keys[2])
        self.up = eqx.nn.ConvTranspose2d(3, 2, 2, stride=2, padding=1, key=keys[3])
        self.whole = eqx.nn.Conv2d(2, 4, 2, groups=2, key=keys[4])  # one position
        self.head = eqx.nn.Linear(4, 2, key=keys[5])

    def __call__(self, x):
        h = jax.nn.relu(self.stride(x))  # [4, 4, 4]
        h = eqx.nn.MaxPool2d(2, 2)(h)  # [4, 2, 2]
        h = jnp.tanh(self.groups(h))  # [4, 2, 2]
        h = jnp.tanh(self.pointwise(h))
        h = eqx.nn.MaxPool2d(2, 1)(jnp.pad(h, ((0, 0), (0, 1), (0, 1))))  # windows overlap
        h = jnp.tanh(self.up(h))  # [2, 2, 2]
        h = jnp.tanh(self.whole(h)).reshape(-1)
        return self.head(h)


class Lines(eqx.Module):
    """1-D and 3-D convolutions and average pooling; the features of one are the channels' mean."""

    line: eqx.nn.Conv1d
    back: eqx.nn.ConvTranspose1d
    volume: eqx.nn.Conv3d

    def __init__(self, key):
        first, second, third = jax.random.split(key, 3)
        self.line = eqx.nn.Conv1d(2, 4, 3, stride=2, padding=2, dilation=2, key=first)
        self.back = eqx.nn.ConvTranspose1d(4, 2, 3, dilation=2, groups=2, key=second)
        self.volume = eqx.nn.Conv3d(2, 4, (1, 2, 1), groups=2, stride=(2, 1, 1), key=third)

    def __call__(self, x):
        h = jnp.tanh(self.line(x))
        h = jnp.tanh(self.back(h))
        h = eqx.nn.AvgPool1d(2, 1)(h)[:, :6].reshape(2, 3, 2, 1)
        return jnp.mean(self.volume(h), axis=(1, 2, 3))


class Norms(eqx.Module):
    """Scale and shift of every normalisation, BatchNorm with frozen statistics."""

    first: eqx.nn.Conv1d
    group: eqx.nn.GroupNorm
    batch: eqx.nn.BatchNorm
    layer: eqx.nn.LayerNorm
    rms: eqx.nn.RMSNorm
    head: eqx.nn.Linear
    state: Callable[[], eqx.nn.State] = eqx.field(static=True)

    def __init__(self, key):
        first, head = jax.random.split(key)
        self.first = eqx.nn.Conv1d(2, 4, 2, key=first)
        self.group = eqx.nn.GroupNorm(2, 4)
        batch, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(4, "batch", mode="ema")
        self.batch = eqx.nn.inference_mode(batch)
        self.layer = eqx.nn.LayerNorm((4, 3))
        self.rms = eqx.nn.RMSNorm(12)
        self.head = eqx.nn.Linear(12, 2, key=head)
        self.state = lambda: state

    def __call__(self, x):
        h = self.group(jnp.tanh(self.first(x)))
        h, _ = self.batch(jnp.tanh(h), self.state())
        h = self.layer(jnp.sin(h))
        return self.head(self.rms(h.reshape(-1)))


class Tokens(eqx.Module):
    """A small transformer on integer tokens: embedding, positions, attention, a vmapped MLP."""

    embedding: eqx.nn.Embedding
    places: Array
    norm: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    expand: eqx.nn.Linear
    shrink: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 6)
        self.embedding = eqx.nn.Embedding(5, 4, key=keys[0])
        self.places = jax.random.normal(keys[1], (3, 4))
        self.norm = eqx.nn.LayerNorm(4)
        self.attention = eqx.nn.MultiheadAttention(
            2, 4, use_query_bias=True, use_output_bias=True, key=keys[2]
        )
        self.expand = eqx.nn.Linear(4, 5, key=keys[3])
        self.shrink = eqx.nn.Linear(5, 4, key=keys[4])
        self.head = eqx.nn.Linear(4, 3, key=keys[5])

    def __call__(self, x):
        h = jax.vmap(self.embedding)(x) + self.places
        n = jax.vmap(self.norm)(h)
        h = h + self.attention(n, n, n)
        h = h + jax.vmap(self.shrink)(jax.nn.gelu(jax.vmap(self.expand)(h)))
        return self.head(jnp.mean(h, axis=0))


class Tied(eqx.Module):
    """Embedding and read-out share a weight; one Linear is used twice, another once."""

    shared: eqx.nn.Shared
    twice: eqx.nn.Linear
    once: eqx.nn.Linear

    def __init__(self, key):
        first, second, third, fourth = jax.random.split(key, 4)
        embedding = eqx.nn.Embedding(4, 3, key=first)
        readout = eqx.nn.Linear(3, 4, use_bias=True, key=second)
        where = lambda pair: pair[1].weight
        get = lambda pair: pair[0].weight
        self.shared = eqx.nn.Shared((embedding, readout), where, get)
        self.twice = eqx.nn.Linear(3, 3, key=third)
        self.once = eqx.nn.Linear(3, 3, key=fourth)

    def __call__(self, x):
        embedding, readout = self.shared()
        h = jnp.sum(jax.vmap(embedding)(x), axis=0)
        h = self.once(jnp.tanh(self.twice(jnp.tanh(self.twice(h)))))
        return readout(jnp.tanh(h))


class Recurrent(eqx.Module):
    """A GRU in `lax.scan`, a layer under `jax.checkpoint`, one under a nested `jit`, `lax.cond`."""

    cell: eqx.nn.GRUCell
    saved: eqx.nn.Linear
    compiled: eqx.nn.Linear
    branch: Array

    def __init__(self, key):
        first, second, third, fourth = jax.random.split(key, 4)
        self.cell = eqx.nn.GRUCell(2, 3, key=first)
        self.saved = eqx.nn.Linear(3, 4, key=second)
        self.compiled = eqx.nn.Linear(4, 2, key=third)
        self.branch = jax.random.normal(fourth, (2,))

    def __call__(self, x):
        step = lambda h, row: (self.cell(row, h), None)
        h, _ = jax.lax.scan(step, jnp.zeros((3,), x.dtype), x)
        h = jax.checkpoint(lambda h: jnp.tanh(self.saved(h)))(h)
        h = eqx.filter_jit(lambda layer, h: layer(jax.jit(jnp.sin)(h)))(self.compiled, h)
        return jax.lax.cond(h[0] > 0, lambda b: h * b, lambda b: h + b, self.branch)


class Raw(eqx.Module):
    """Arrays used by hand: products from either side, einsum, transposed, sliced, flipped, scaled.

    A bias that is used twice, and a layer whose output is used with and without its bias.
    """

    left: Array
    right: Array
    einsum: Array
    flipped: Array
    sliced: Array
    outer: Array
    blocks: Array
    scale: Array
    double: Array
    bias: Array
    plain: eqx.nn.Linear
    column: Array
    unused: Array

    def __init__(self, key):
        shapes = [(4, 3), (4, 3), (3, 2, 2), (4, 4), (6, 4), (4,), (2, 3, 2), (), (4, 4), (4,)]
        keys = jax.random.split(key, len(shapes) + 2)
        arrays = [jax.random.normal(k, s) / 2 for k, s in zip(keys, shapes, strict=False)]
        (self.left, self.right, self.einsum, self.flipped, self.sliced,
         self.outer, self.blocks, self.scale, self.double, self.bias) = arrays  # fmt: skip
        self.plain = eqx.nn.Linear(4, 4, key=keys[-2])
        self.column = jax.random.normal(keys[-1], (3, 2))
        self.unused = jnp.ones((2,))

    def __call__(self, x):  # [3]
        h = jnp.tanh(self.left @ x)  # [4]
        h = jnp.tanh(h @ self.right)  # [3]
        h = jnp.tanh(jnp.einsum("ijk,i->kj", self.einsum, h).reshape(-1))  # [4]
        h = jnp.tanh(self.scale * (h @ self.flipped[::-1].T))
        h = jnp.tanh(self.sliced[1:5] @ h)  # only a part is used
        h = jnp.sin(jnp.einsum("i,j->ij", self.outer, h)).sum(0)  # [4]
        h = jnp.einsum("goi,gi->go", self.blocks, h.reshape(2, 2)).reshape(-1)[:4]
        h = jnp.tanh(self.double @ h + self.bias) * self.bias
        dry = self.plain.weight @ h
        h = jnp.tanh(dry + self.plain.bias) + dry
        return (h[:3] @ self.column).reshape(1, 2)


@jax.custom_jvp
def clipped(x):
    return jnp.clip(x, -0.5, 0.5)


@clipped.defjvp
def _(primals, tangents):
    (x,), (t,) = primals, tangents
    return clipped(x), t * jnp.cos(x)  # a surrogate, not the derivative


@jax.custom_vjp
def product(w, x):
    return w @ x


product.defvjp(
    lambda w, x: (w @ x, (w, x)),
    lambda saved, g: (1.5 * g[:, None] * saved[1][None, :], 0.5 * g @ saved[0]),
)


class Custom(eqx.Module):
    """Functions with rules of their own, on activations and on weights; one scalar output."""

    first: eqx.nn.Linear
    ruled: Array
    surrogate: Array
    head: eqx.nn.Linear

    def __init__(self, key):
        first, second, third, head = jax.random.split(key, 4)
        self.first = eqx.nn.Linear(3, 4, key=first)
        self.ruled = jax.random.normal(second, (4, 4))
        self.surrogate = jax.random.normal(third, (4,))
        self.head = eqx.nn.Linear(4, "scalar", key=head)

    def __call__(self, x):
        h = clipped(self.first(x))
        h = jnp.tanh(product(self.ruled, h)) + clipped(self.surrogate)
        return self.head(h)


class Half(eqx.Module):
    """Weights that are kept in bfloat16 and computed with in the precision of the sample."""

    first: Array
    bias: Array
    conv: Array
    head: Array

    def __init__(self, key):
        keys = jax.random.split(key, 4)
        shapes = [(6, 3), (6,), (2, 1, 3), (2, 8)]
        self.first, self.bias, self.conv, self.head = (
            jax.random.normal(k, s, jnp.bfloat16) for k, s in zip(keys, shapes, strict=True)
        )

    def __call__(self, x):
        up = lambda w: w.astype(x.dtype)
        h = jnp.tanh(up(self.first) @ x + up(self.bias))
        h = jax.lax.conv_general_dilated(h.reshape(1, 1, 6), up(self.conv), (1,), "VALID")
        return up(self.head) @ jnp.tanh(h.reshape(-1))


def _of(weights, kind, *, bias=True):
    found = {f".{name}.weight": kind for name in weights}
    return found | {f".{name}.bias": "bias" for name in weights if bias}


def _rest(*names):
    return dict.fromkeys(names, "rest")


ZOO = {
    "images": Case(
        Images,
        (2, 8, 8),
        _of(("stride", "groups", "up", "whole"), "convolution")
        | _of(("pointwise",), "convolution", bias=False)
        | _of(("head",), "dense"),
    ),
    "lines": Case(Lines, (2, 9), _of(("line", "back", "volume"), "convolution")),
    "norms": Case(
        Norms,
        (2, 4),
        _of(("first",), "convolution")
        | _of(("head",), "dense")
        | _of(("group", "batch", "layer", "rms"), "rest")
        | _rest(".group.bias", ".batch.bias", ".layer.bias", ".rms.bias"),
    ),
    "tokens": Case(
        Tokens,
        (3,),
        _of(("attention.query_proj", "attention.output_proj", "expand", "shrink", "head"), "dense")
        | _of(("attention.key_proj", "attention.value_proj"), "dense", bias=False)
        | {".embedding.weight": "embedding"}
        | _rest(".places", ".norm.weight", ".norm.bias"),
        tokens=5,
    ),
    "tied": Case(
        Tied,
        (2,),
        _of(("once",), "dense")
        | {".shared.pytree[1].bias": "rest"}
        | _rest(".shared.pytree[0].weight", ".twice.weight", ".twice.bias"),
        tokens=4,
    ),
    "recurrent": Case(
        Recurrent,
        (3, 2),
        _of(("saved", "compiled"), "dense")
        | {".cell.weight_ih": "dense", ".cell.weight_hh": "dense", ".cell.bias": "bias"}
        | _rest(".cell.bias_n", ".branch"),
    ),
    "raw": Case(
        Raw,
        (3,),
        dict.fromkeys(
            (".left", ".right", ".einsum", ".flipped", ".outer", ".blocks", ".double",
             ".plain.weight", ".column"),
            "dense",
        )
        | _rest(".sliced", ".scale", ".bias", ".plain.bias", ".unused"),
    ),  # fmt: skip
    "custom": Case(
        Custom, (3,), _of(("first", "head"), "dense") | _rest(".ruled", ".surrogate")
    ),
    "half": Case(
        Half,
        (3,),
        {".first": "dense", ".bias": "bias", ".conv": "convolution", ".head": "dense"},
    ),
}  # fmt: skip
