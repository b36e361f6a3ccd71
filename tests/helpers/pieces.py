"""What random programs are made of: one small function a piece, with the weights that it uses.

A piece reads values of a sample (real, complex or integer arrays of any shape), has settings that
are drawn, and says which weights it needs. It takes any shape: `rows`, `image` and `fit` bring a
value into the one that it works on.
"""

import contextlib
import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

WIDTHS, YES = (3, 2, 4), (False, True)
INTEGERS = (
    "uint8",
    "int8",
    "int32",
    "uint8",
    "int8",
    "uint16",
    "int16",
    "uint32",
    "int64",
    "uint64",
)
# Around what a byte holds, and what two do: tables of more rows than a dtype has numbers.
ROWS, MANY_ROWS = (300, 5, 257, 129, 128, 127, 255, 256), (32767, 32768, 32769, 65537)

_real: list = []


@contextlib.contextmanager
def reals(dtype):
    """Let pieces make real numbers of this dtype; without, of JAX's own."""
    _real.append(dtype)
    try:
        yield
    finally:
        _real.pop()


def real_dtype():
    return jnp.dtype((_real and _real[-1]) or jnp.zeros(()).dtype)


@dataclasses.dataclass(frozen=True)
class Piece:
    """One kind of step.

    Attributes:
        takes: kinds of the values that it reads: "real", "complex" or "int".
        settings: its settings, each with the values it may have.
        weights: `(*shapes, **settings) -> weights`, any tree of shapes (tuples in a dict, or a
            module of `jax.ShapeDtypeStruct`s).
        apply: `(weights, *values, **settings) -> value`.
    """

    takes: tuple[str, ...]
    settings: dict[str, tuple]
    weights: Callable[..., Any]
    apply: Callable[..., Any]


PIECES: dict[str, Piece] = {}


def piece(*takes: str, weights: Callable[..., Any] = lambda *shapes, **settings: {}, **settings):
    """Register the function below as a piece."""

    def register(apply):
        PIECES[apply.__name__] = Piece(takes, settings, weights, apply)
        return apply

    return register


def shaped(make: Callable[..., Any]) -> Any:
    """The module that `make(key=...)` builds, with shapes for arrays."""
    return eqx.filter_eval_shape(make, key=jax.random.key(0))


def fit(v, shape):
    """The first entries of a value, or all of them several times, in another shape."""
    flat, size = v.reshape(-1), math.prod(shape)
    if flat.size < size:
        flat = jnp.concatenate([flat] * -(-size // flat.size))
    return flat[:size].reshape(shape)


def rows_of(shape):
    """A sequence `[length, channels]` of as many entries."""
    if len(shape) == 1:
        length = next(n for n in (3, 2, 1) if shape[0] % n == 0)
        return (length, shape[0] // length)
    return (shape[0], math.prod(shape[1:]))


def rows(v):
    return v.reshape(rows_of(v.shape))


def image_of(shape, ndim):
    """An image `[channels, *space]` of as many entries."""
    channels, size = rows_of(shape)
    if ndim == 1:
        return (channels, size)
    if len(shape) == 3:
        return shape
    return (channels, size // 2, 2) if size % 2 == 0 else (channels, size, 1)


def spread(b, like):
    """An array along the last axis, for each position of `like`."""
    return jnp.broadcast_to(b, like.shape)


# Layers


def dense_weights(shape, features, bias, form, whole):
    inputs = math.prod(shape) if whole else shape[-1]
    found = {"w": (inputs, features) if form == "right" else (features, inputs)}
    if form == "stretched":
        found["w"] = (features * inputs,)
    if form == "sliced":
        found["w"] = (features + 1, inputs)
    if form == "low rank":
        found |= {"a": (features, 1), "b": (1, inputs)}
    if form == "normalised":
        found["g"] = (features,)
    return found | ({"bias": (features,)} if bias else {})


def dense_matrix(p, form, inputs):
    w = p["w"]
    if form == "right":
        return w.T
    if form == "flipped":
        return w[::-1]
    if form == "stretched":
        return w.reshape(-1, inputs)
    if form == "sliced":
        return w[1:]
    if form == "low rank":
        return w + p["a"] @ p["b"]
    if form == "normalised":
        norm = jnp.sqrt(jnp.sum(w**2, axis=1, keepdims=True) + 0.1)
        return p["g"][:, None] * w / norm
    return w


FORMS = ("left", "right", "flipped", "stretched", "sliced", "low rank", "normalised", "jitted",
         "checkpointed")  # fmt: skip


@piece("real", weights=dense_weights, features=WIDTHS, bias=YES, form=FORMS, whole=YES)
def dense(p, v, features, bias, form, whole):
    """A matrix times all of a value, or times its last axis at every position."""
    v = v.reshape(-1) if whole else v
    inputs = v.shape[-1]

    def layer(p, v):
        y = dense_matrix(p, form, inputs) @ v
        return y + p["bias"] if bias else y

    if form in ("jitted", "checkpointed"):
        layer = (jax.jit if form == "jitted" else jax.checkpoint)(layer)
    if v.ndim == 1:
        return layer(p, v)
    y = jax.vmap(layer, (None, 0))(p, v.reshape(-1, inputs))
    return y.reshape(*v.shape[:-1], features)


def convolution_weights(shape, ndim, features, kernel, stride, padding, dilation, groups, up, bias):
    channels = image_of(shape, ndim)[0]
    groups = groups if channels % groups == 0 else 1
    make = eqx.nn.ConvTranspose if up else eqx.nn.Conv
    return shaped(
        functools.partial(
            make, ndim, channels, 2 * features if groups == 2 else features, kernel, stride=stride,
            padding=padding if up else padding + kernel * dilation - dilation, dilation=dilation,
            groups=groups, use_bias=bias,
        )
    )  # fmt: skip


@piece(
    "real",
    weights=convolution_weights,
    ndim=(1, 2),
    features=(2, 1, 3),
    kernel=(2, 1, 3),
    stride=(1, 2),
    padding=(0, 1),
    dilation=(1, 2),
    groups=(1, 2),
    up=YES,
    bias=YES,
)
def convolution(p, v, ndim, **settings):
    """A convolution, or a transposed one."""
    y = p(v.reshape(image_of(v.shape, ndim)))
    return y[tuple(slice(0, 4) for _ in y.shape)] if y.size > 32 else y


@piece("real", kind=("max", "mean"), stride=(2, 1))
def pool(p, v, kind, stride):
    """Windows of two along the last axis."""
    v = rows(v)
    make = eqx.nn.MaxPool1d if kind == "max" else eqx.nn.AvgPool1d
    return make(min(2, v.shape[1]), stride)(v)


def table_weights(shape, features, form, rows, index):
    return {"table": (rows, features)}


def of_each(call, places):
    return jax.vmap(call)(places)


# Places inside the table; a mode that says what a place outside is takes any number of the dtype.
INSIDE = {
    "index": lambda table, v: table[v],
    "taken": lambda table, v: jnp.take(table, v, axis=0),
    "mapped": lambda table, v: of_each(lambda i: table[i], v),
    "promised": lambda table, v: table.at[v].get(mode="promise_in_bounds"),
    "along": lambda table, v: jnp.take_along_axis(table, v[:, None], axis=0),
    "hot": lambda table, v: jax.nn.one_hot(v, len(table), dtype=table.dtype) @ table,
}
OUTSIDE = {
    "clipped": lambda table, v: jnp.take(table, v, axis=0, mode="clip"),
    "filled": lambda table, v: table.at[v].get(mode="fill", fill_value=0),
    "wrapped": lambda table, v: jnp.take(table, v, axis=0, mode="wrap"),
    "sliced": lambda table, v: lax.dynamic_slice_in_dim(table, v[0], 1),
    "indexed": lambda table, v: lax.dynamic_index_in_dim(table, v[-1], keepdims=False),
    "each sliced": lambda table, v: of_each(lambda i: lax.dynamic_slice_in_dim(table, i, 1)[0], v),
}


@piece(
    "int",
    weights=table_weights,
    features=WIDTHS,
    form=(*INSIDE, *OUTSIDE),
    rows=ROWS,
    index=INTEGERS,
)
def embedding(p, v, features, form, rows, index):
    """Rows of a table by numbers of any dtype; past its end where a mode says what they are.

    By default JAX reads the last row for those and drops their gradient, so that a gradient of a
    gradient depends on how often it was turned round. What JAX itself cannot do (a table with more
    rows than the dtype has numbers, by an index that may be negative) is drawn again.
    """
    v = v.reshape(-1)
    v = v.astype(int)  # JAX's own, which holds all that is drawn
    v = v * jnp.asarray(rows // 4 + 1, v.dtype)  # spread over the rows
    if form in INSIDE:
        v = jnp.minimum(v % jnp.asarray(rows, v.dtype), min(jnp.iinfo(index).max, 2**31 - 1))
    return (INSIDE | OUTSIDE)[form](p["table"], v.astype(index))


def norm_weights(shape, kind):
    make = {"layer": eqx.nn.LayerNorm, "rms": eqx.nn.RMSNorm}.get(kind)
    if make is not None:
        return eqx.filter_eval_shape(make, shape)
    return eqx.filter_eval_shape(eqx.nn.GroupNorm, 1, shape[0])


@piece("real", weights=norm_weights, kind=("layer", "rms", "group"))
def norm(p, v, kind):
    """A normalisation with scale and shift."""
    return p(v)


def cell_weights(shape, kind, all_states):
    width = rows_of(shape)[1]
    if kind == "gru":
        return shaped(functools.partial(eqx.nn.GRUCell, width, 2))
    if kind == "lstm":
        return shaped(functools.partial(eqx.nn.LSTMCell, width, 2))
    return {"u": (2, width), "w": (2, 2)}


@piece("real", weights=cell_weights, kind=("plain", "gru", "lstm"), all_states=YES)
def recurrence(p, v, kind, all_states):
    """A recurrent cell along a sequence, its weights used inside the loop."""
    zero = jnp.zeros((2,), v.dtype)

    def step(h, row):
        if kind == "plain":
            h = jnp.tanh(p["u"] @ row + p["w"] @ h)
            return h, h
        h = p(row, h)
        return h, h[0] if kind == "lstm" else h

    last, states = lax.scan(step, (zero, zero) if kind == "lstm" else zero, rows(v))
    return states if all_states else (last[0] if kind == "lstm" else last)


@piece("real", weights=lambda shape: {"rate": rows_of(shape)[1:], "in": rows_of(shape)[1:]})
def decay(p, v):
    """A linear recurrence as an associative scan."""
    v = rows(v)
    rate = spread(jax.nn.sigmoid(p["rate"]), v)
    join = lambda one, two: (one[0] * two[0], two[0] * one[1] + two[1])
    return lax.associative_scan(join, (rate, spread(p["in"], v) * v))[1]


def attention_weights(q, kv):
    (_, a), (_, b) = rows_of(q), rows_of(kv)
    return {"q": (2, a), "k": (2, b), "v": (3, b)}


@piece("real", "real", weights=attention_weights)
def attention(p, q, kv):
    """The first value asks, the second answers."""
    q, kv = rows(q), rows(kv)
    match = (q @ p["q"].T) @ (kv @ p["k"].T).T
    return jax.nn.softmax(match, axis=1) @ (kv @ p["v"].T)


@piece("real", "real", weights=lambda a, b: {"w": (math.prod(b), a[-1]), "shift": b})
def gate(p, a, b):
    """Part of the first value opens and closes the second."""
    opened = (p["w"] @ a.reshape(-1, a.shape[-1])[0]).reshape(b.shape) + p["shift"]
    return jax.nn.sigmoid(opened) * b


@piece(
    "real",
    weights=lambda shape, routed: {"w": (2, 3, math.prod(shape)), "r": (2, math.prod(shape))},
    routed=YES,
)
def experts(p, v, routed):
    """Two layers under `vmap`, mixed by a third; or the one with the larger score alone."""
    v = v.reshape(-1)
    score = p["r"] @ v
    y = jax.vmap(lambda w: jnp.tanh(w @ v))(p["w"])
    if routed:
        return jax.nn.softmax(score)[jnp.argmax(score)] * y[jnp.argmax(score)]
    return jnp.einsum("e,eo->o", jax.nn.softmax(score), y)


# What has no weights, or one for each entry


@jax.custom_jvp
def surrogate(v):
    return jnp.clip(v, -0.5, 0.5)


@surrogate.defjvp
def _(primals, tangents):
    (v,), (t,) = primals, tangents
    return surrogate(v), t * jnp.cos(v)


FUNCTIONS = {
    "tanh": jnp.tanh,
    "sin": jnp.sin,
    "relu": jax.nn.relu,
    "abs": jnp.abs,
    "sort": lambda v: jnp.sort(v, axis=-1),
    "gelu": jax.nn.gelu,
    "softmax": lambda v: jax.nn.softmax(v, axis=-1),
    "square": lambda v: jnp.square(v) / 2,
    "where": lambda v: jnp.where(v > 0, v, jnp.sin(2 * v)),
    "cumsum": lambda v: jnp.cumsum(v, axis=-1),
    "logsumexp": lambda v: jax.nn.logsumexp(v, axis=-1, keepdims=True),
    "neighbour": lambda v: jnp.maximum(v, jnp.roll(v, 1, axis=-1)),
    "surrogate": surrogate,
    "half stopped": lambda v: lax.stop_gradient(v) * v,
}


@piece("real", name=tuple(FUNCTIONS))
def function(p, v, name):
    return FUNCTIONS[name](v)


REARRANGED = {
    "transposed": lambda v: rows(v).T,
    "flipped": lambda v: jnp.flip(v, axis=0),
    "mean": lambda v: jnp.mean(rows(v), axis=0),
    "total": lambda v: jnp.sum(v).reshape(1),
    "sliced": lambda v: v.reshape(-1)[: max(1, v.size // 2)],
    "padded": lambda v: jnp.pad(v.reshape(-1), (1, 0)),
    "updated": lambda v: v.at[0].multiply(2.0),
    "repeated": lambda v: jnp.tile(v.reshape(1, -1), (2, 1)),
}


@piece("real", how=tuple(REARRANGED))
def rearrange(p, v, how):
    return REARRANGED[how](v)


@piece(
    "real",
    weights=lambda shape, how: {"w": () if how == "temperature" else shape[-1:]},
    how=("scale", "shift", "temperature", "both"),
)
def elementwise(p, v, how):
    """A weight for each channel, or one for all."""
    w = spread(p["w"], v)
    return {"scale": w * v, "shift": v + w, "temperature": w * v, "both": w * v + w}[how]


@piece("real", weights=lambda shape: {"mean": shape})
def buffer(p, v):
    """A floating-point state that the model holds, and no gradient reaches."""
    return v - lax.stop_gradient(p["mean"])


JOINED = {
    "add": lambda a, b: a + fit(b, a.shape),
    "multiply": lambda a, b: a * fit(b, a.shape),
    "concatenate": lambda a, b: jnp.concatenate([a.reshape(-1), b.reshape(-1)])[:16],
    "outer": lambda a, b: jnp.tanh(jnp.outer(a.reshape(-1)[:4], b.reshape(-1)[:4])),
    "largest": lambda a, b: jnp.maximum(a, fit(b, a.shape)),
    "divide": lambda a, b: a / (1.0 + jnp.square(fit(b, a.shape))),
}


@piece("real", "real", how=tuple(JOINED))
def join(p, a, b, how):
    return JOINED[how](a, b)


@piece(weights=lambda shape: {"w": shape}, shape=((4,), (2, 3), (2, 2, 2)))
def learned(p, shape):
    """A parameter by itself, such as learned queries."""
    return p["w"]


# Integers

NUMBERED = {
    "argmax": lambda v: jnp.argmax(v, axis=-1).reshape(-1),
    "signs": lambda v: (v.reshape(-1) > 0).astype(int),
    "order": lambda v: jnp.argsort(v.reshape(-1)),
    "steps": lambda v: lax.while_loop(
        lambda c: c[1] < 3.0, lambda c: (c[0] + 1, c[1] + 0.5 + jnp.square(c[2]), c[2]),
        (jnp.zeros((), int), jnp.zeros((), v.dtype), lax.stop_gradient(v.reshape(-1)[0])),
    )[0].reshape(1),
}  # fmt: skip


@piece("real", how=tuple(NUMBERED))
def number(p, v, how):
    return NUMBERED[how](v)


@piece("int", how=("hot", "float"))
def count(p, v, how):
    """Integers as real numbers."""
    if how == "hot":
        return jax.nn.one_hot(v.reshape(-1), 3, dtype=real_dtype())
    return v.astype(real_dtype()) / 64


@piece("real", "int")
def pick(p, v, i):
    """Entries of a value by number."""
    return jnp.take(v.reshape(-1), i.reshape(-1), mode="clip")


# Complex values


@piece("real", kind=("rfft", "fft", "pair"))
def spectrum(p, v, kind):
    if kind == "pair":
        half = fit(v, (2, max(1, v.size // 2)))
        return lax.complex(half[0], half[1])
    return jnp.fft.rfft(v) if kind == "rfft" else jnp.fft.fft(v)


@piece("complex", weights=lambda shape: {"angle": shape[-1:]})
def phase(p, v):
    angle = spread(p["angle"], v)
    return v * lax.complex(jnp.cos(angle), jnp.sin(angle))


@piece(
    "complex",
    weights=lambda shape, features: {"re": (features, shape[-1]), "im": (features, shape[-1])},
    features=WIDTHS,
)
def pair_of_weights(p, v, features):
    """A complex matrix whose parts are real weights."""
    w = lax.complex(p["re"], p["im"])
    return jnp.einsum("ij,...j->...i", w, v)


@piece(
    "complex",
    weights=lambda shape, features, how: {
        "complex": (features, shape[-1]) if how == "matrix" else shape[-1:]
    },
    features=WIDTHS,
    how=("matrix", "scale"),
)
def complex_weight(p, v, features, how):
    """A complex matrix, or a factor for each entry."""
    w = p["complex"]
    return jnp.einsum("ij,...j->...i", w, v) if how == "matrix" else v * spread(w, v)


@piece("complex", "complex", how=("add", "multiply"))
def join_complex(p, a, b, how):
    b = fit(b, a.shape)
    return a + b if how == "add" else a * b


REAL = {
    "real": jnp.real,
    "imaginary": jnp.imag,
    "power": lambda v: jnp.real(v) ** 2 + jnp.imag(v) ** 2,
    "both": lambda v: jnp.concatenate([jnp.real(v), jnp.imag(v)], axis=-1),
    "irfft": lambda v: jnp.fft.irfft(v, n=2 * v.shape[-1]),
}


@piece("complex", how=tuple(REAL))
def real(p, v, how):
    return REAL[how](v)


# Control flow, rules of its own, weights that are used again


@piece("real", weights=lambda shape, shared: {"a": (3, math.prod(shape)), "b": (3,)}, shared=YES)
def branch(p, v, shared):
    """One of two layers, by the sign of a sum."""
    v = v.reshape(-1)
    one = lambda p, v: p["a"] @ v
    two = (lambda p, v: jnp.sin(p["a"] @ v) + p["b"]) if shared else (lambda p, v: p["b"] * 2.0)
    return lax.cond(jnp.sum(v) > 0, one, two, p, v)


@piece(
    "real",
    weights=lambda shape, times: {"w": (shape[-1], shape[-1])},
    times=(2, 3, 1, 0),
)
def loop(p, v, times):
    """The same layer several times, in a loop of fixed length."""
    body = lambda _, v: jnp.tanh(jnp.einsum("ij,...j->...i", p["w"], v))
    return lax.fori_loop(0, times, body, v)


@piece(
    "real",
    weights=lambda shape, depth, bias: (
        {"w": (depth, shape[-1], shape[-1])} | ({"b": (depth, shape[-1])} if bias else {})
    ),
    depth=(2, 1, 0),
    bias=YES,
)
def stack(p, v, depth, bias):
    """Layers one after the other, in a `scan` over their weights; there may be none."""
    flat = v.reshape(-1, v.shape[-1])

    def layer(h, own):
        y = h @ own["w"].T
        return jnp.tanh(y + spread(own["b"], y) if bias else y), None

    return lax.scan(layer, flat, p)[0].reshape(v.shape)


HOLLOW = {
    "features": ({"w": lambda n: (0, n), "v": lambda n: (3, 0)},
                 lambda p, v: p["v"] @ jnp.tanh(p["w"] @ v)),
    "inputs": ({"w": lambda n: (3, 0)}, lambda p, v: p["w"] @ v[:0]),
    "positions": ({"w": lambda n: (3, n)},
                  lambda p, v: jnp.sum(jax.vmap(lambda row: p["w"] @ row)(v[None][:0]), axis=0)),
    "groups": ({"w": lambda n: (0, 3, n)},
               lambda p, v: jnp.sum(jax.vmap(lambda w: w @ v)(p["w"]), axis=0)),
    "channels": ({"w": lambda n: (3, 0, 1)},
                 lambda p, v: jnp.sum(lax.conv(v[None, None, :][:, :0], p["w"], (1,), "VALID"),
                                      axis=(0, 2))),
    "rows": ({"t": lambda n: (4, 0), "w": lambda n: (3, 0)},
             lambda p, v: p["w"] @ p["t"][jnp.argmax(v) % 4]),
    "entries": ({"w": lambda n: (0,)}, lambda p, v: jnp.sum(p["w"] * v[:0], keepdims=True)),
}  # fmt: skip


@piece(
    "real",
    weights=lambda shape, of: (
        {name: make(math.prod(shape)) for name, make in HOLLOW[of][0].items()} | {"bias": (3,)}
    ),
    of=tuple(HOLLOW),
)
def hollow(p, v, of):
    """A layer along an axis of length 0, which leaves its bias."""
    v = v.reshape(-1)
    return jnp.broadcast_to(HOLLOW[of][1](p, v), (3,)) + p["bias"] + fit(v, (3,))


@jax.custom_vjp
def ruled_product(w, v):
    return w @ v


ruled_product.defvjp(
    lambda w, v: (w @ v, (w, v)),
    lambda saved, g: (g[:, None] * saved[1][None, :], g @ saved[0]),
)


@piece("real", weights=lambda shape: {"w": (3, math.prod(shape))})
def ruled(p, v):
    """A layer with a derivative of its own, which has no forward mode.

    The rule is the true derivative: that of another (a straight-through estimator) has no second
    derivative that all orders of differentiation agree on.
    """
    return ruled_product(p["w"], v.reshape(-1))


@piece("real", turned=YES)
def again(p, v, turned):
    """The matrix of an earlier layer, as it is or transposed."""
    w = p["w"].T if turned else p["w"]
    return jnp.tanh(w @ fit(v, w.shape[1:]))


for _piece in PIECES.values():
    assert set(_piece.settings) <= set(inspect.signature(_piece.apply).parameters) or any(
        q.kind is q.VAR_KEYWORD for q in inspect.signature(_piece.apply).parameters.values()
    )
