"""Evaluate a traced function with NumPy: small programs that run once are not worth compiling.

XLA takes seconds for the gradient of a kernel, NumPy milliseconds. What is rare, or has many
options (convolutions, gathers, windows), is left to JAX itself, one compiled primitive at a time.
"""

import functools
import math
import operator

import jax
import jax.extend.core as jex_core
import jax.numpy as jnp
import numpy as np
from scipy import special


def interpreted(function):
    """`function` of arrays, traced at every call and evaluated by NumPy.

    As under `jax_debug_nans` with nothing compiled, a step that makes a NaN of numbers is an error.
    """

    def call(*arguments):
        closed, shape = jax.make_jaxpr(function, return_shape=True)(*arguments)
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(arguments)]
        with np.errstate(all="ignore"):
            out = evaluate(closed.jaxpr, closed.consts, leaves)
        return jax.tree.unflatten(jax.tree.structure(shape), out)

    return call


def evaluate(jaxpr, consts, arguments):
    """The outputs of a jaxpr for NumPy arrays."""
    env = dict(zip(jaxpr.constvars, map(np.asarray, consts), strict=True))
    env.update(zip(jaxpr.invars, arguments, strict=True))
    read = lambda v: np.asarray(v.val) if isinstance(v, jex_core.Literal) else env[v]
    for eqn in jaxpr.eqns:
        inputs = [read(v) for v in eqn.invars]
        name = eqn.primitive.name
        if name in CALLS:
            out = CALLS[name](eqn.params, inputs)
        elif name in SIMPLE:
            out = [SIMPLE[name](*map(wide, inputs))]
        elif name in WITH_SETTINGS:
            out = [WITH_SETTINGS[name](eqn, *map(wide, inputs))]
        else:
            out = eqn.primitive.bind(
                *(jnp.array(np.array(a)) for a in inputs),
                **eqn.primitive.get_bind_params(eqn.params),
            )
            out = out if eqn.primitive.multiple_results else [out]
        for v, value in zip(eqn.outvars, out, strict=True):
            env[v] = np.asarray(value, v.aval.dtype)
            assert env[v].shape == v.aval.shape, eqn
            if has_nan(env[v]) and not any(map(has_nan, inputs)):
                raise FloatingPointError(f"a NaN out of numbers: {eqn}")
    return [read(v) for v in jaxpr.outvars]


def wide(a):
    """Numbers of less than 32 bits as float32, in which NumPy can do everything."""
    return a.astype(np.float32) if jnp.issubdtype(a.dtype, np.inexact) and a.itemsize < 4 else a


def has_nan(a):
    return jnp.issubdtype(a.dtype, np.inexact) and bool(np.isnan(a).any())


def closed_call(closed, inputs):
    return evaluate(closed.jaxpr, closed.consts, inputs)


def scan(p, inputs):
    if "num_consts" in p:
        first, last = p["num_consts"], p["num_consts"] + p["num_carry"]
    else:  # JAX 0.12
        consts, carry, _ = p["ft_in"].unpack()
        first, last = len(consts), len(consts) + len(carry)
    consts, carry, xs, rows = inputs[:first], inputs[first:last], inputs[last:], []
    order = range(p["length"])
    for t in reversed(order) if p["reverse"] else order:
        out = closed_call(p["jaxpr"], [*consts, *carry, *(x[t] for x in xs)])
        carry = out[: len(carry)]
        rows.append(out[len(carry) :])
    if p["reverse"]:
        rows = rows[::-1]
    empty = [np.zeros((0, *v.shape), v.dtype) for v in p["jaxpr"].out_avals[len(carry) :]]
    return [*carry, *(map(np.stack, zip(*rows, strict=True)) if rows else empty)]


def while_loop(p, inputs):
    first, second = p["cond_nconsts"], p["cond_nconsts"] + p["body_nconsts"]
    going, consts, carry = inputs[:first], inputs[first:second], inputs[second:]
    while (more := closed_call(p["cond_jaxpr"], [*going, *carry])[0]).any():
        after = closed_call(p["body_jaxpr"], [*consts, *carry])
        wide = [more.reshape(more.shape + (1,) * (a.ndim - more.ndim)) for a in after]
        carry = [np.where(w, a, c) for w, a, c in zip(wide, after, carry, strict=True)]
    return carry


def cond(p, inputs):
    branch = int(np.clip(inputs[0], 0, len(p["branches"]) - 1))
    return closed_call(p["branches"][branch], inputs[1:])


def inner(p, inputs):
    jaxpr = p["jaxpr"] if "jaxpr" in p else p["call_jaxpr"]
    if hasattr(jaxpr, "consts"):
        return closed_call(jaxpr, inputs)
    return evaluate(jaxpr, (), inputs)


def dot_general(eqn, a, b):
    (ca, cb), (ba, bb) = eqn.params["dimension_numbers"]
    fa = [n for n in range(a.ndim) if n not in (*ca, *ba)]
    fb = [n for n in range(b.ndim) if n not in (*cb, *bb)]
    size = lambda v, axes: math.prod(v.shape[n] for n in axes)
    left = a.transpose(*ba, *fa, *ca).reshape(size(a, ba), size(a, fa), size(a, ca))
    right = b.transpose(*bb, *cb, *fb).reshape(size(b, bb), size(b, cb), size(b, fb))
    return (left @ right).reshape(eqn.outvars[0].aval.shape)


def broadcast(eqn, a, *_):
    shape = [1] * len(eqn.params["shape"])
    for axis, size in zip(eqn.params["broadcast_dimensions"], a.shape, strict=True):
        shape[axis] = size
    return np.broadcast_to(a.reshape(shape), eqn.params["shape"])


def iota(eqn):
    shape, axis = eqn.params["shape"], eqn.params["dimension"]
    line = np.arange(shape[axis]).reshape([-1 if n == axis else 1 for n in range(len(shape))])
    return np.broadcast_to(line, shape)


def cut(eqn, a):
    p = eqn.params
    steps = p["strides"] or (1,) * a.ndim
    return a[tuple(map(slice, p["start_indices"], p["limit_indices"], steps))]


def window(shape, sizes, starts):
    """Slices of these sizes whose starts are moved inside, as XLA does."""
    starts = [int(s) + (int(s) < 0) * n for s, n in zip(starts, shape, strict=True)]
    starts = [min(max(s, 0), n - k) for s, n, k in zip(starts, shape, sizes, strict=True)]
    return tuple(slice(s, s + k) for s, k in zip(starts, sizes, strict=True))


def dynamic_slice(eqn, a, *starts):
    return a[window(a.shape, eqn.params["slice_sizes"], starts)]


def dynamic_update_slice(eqn, a, b, *starts):
    a = a.copy()
    a[window(a.shape, b.shape, starts)] = b
    return a


def pad(eqn, a, value):
    config = eqn.params["padding_config"]
    sizes = zip(a.shape, config, strict=True)
    out = np.full([low + high + n + max(n - 1, 0) * gap for n, (low, high, gap) in sizes], value)
    places = [low + np.arange(n) * (inside + 1)
              for n, (low, _, inside) in zip(a.shape, config, strict=True)]  # fmt: skip
    kept = [(at >= 0) & (at < n) for at, n in zip(places, out.shape, strict=True)]
    out[np.ix_(*(at[k] for at, k in zip(places, kept, strict=True)))] = a[np.ix_(*kept)]
    return out


def reshape(eqn, a, *_):
    order = eqn.params["dimensions"]
    return (a if order is None else a.transpose(order)).reshape(eqn.params["new_sizes"])


def reduced(function):
    return lambda eqn, a: function(a, axis=tuple(eqn.params["axes"]))


def cumulative(function):
    def call(eqn, a):
        axis = eqn.params["axis"]
        if eqn.params["reverse"]:
            return np.flip(function(np.flip(a, axis), axis=axis), axis)
        return function(a, axis=axis)

    return call


def divide(a, b):
    if np.issubdtype(a.dtype, np.integer):
        return np.trunc(a / np.where(b == 0, 1, b)).astype(a.dtype)
    return a / b


def convert(eqn, a, *_):
    real = np.iscomplexobj(a) and not jnp.issubdtype(eqn.params["new_dtype"], np.complexfloating)
    return (a.real if real else a).astype(eqn.params["new_dtype"])


same = lambda a, *_: a
CALLS = dict.fromkeys(
    ("jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint", "custom_jvp_call",
     "custom_vjp_call"),
    inner,
) | {"scan": scan, "while": while_loop, "cond": cond}  # fmt: skip
SIMPLE = {
    "neg": operator.neg, "sin": np.sin, "cos": np.cos, "tan": np.tan, "tanh": np.tanh,
    "exp": np.exp, "exp2": np.exp2, "log": np.log, "log1p": np.log1p, "expm1": np.expm1,
    "sqrt": np.sqrt, "rsqrt": lambda a: 1 / np.sqrt(a), "logistic": special.expit,
    "abs": np.abs, "sign": np.sign, "floor": np.floor, "ceil": np.ceil, "square": np.square,
    "not": np.invert, "is_finite": np.isfinite, "real": np.real, "imag": np.imag,
    "conj": np.conj, "erf": special.erf, "erfc": special.erfc, "add": operator.add,
    "add_any": operator.add, "sub": operator.sub, "mul": operator.mul, "div": divide,
    "max": np.maximum, "min": np.minimum, "pow": np.power, "and": operator.and_,
    "or": operator.or_, "xor": operator.xor, "eq": operator.eq, "ne": operator.ne,
    "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge,
    "complex": lambda a, b: a + 1j * b, "copy": same, "copy_p": same, "stop_gradient": same,
    "clamp": lambda low, a, high: np.minimum(np.maximum(a, low), high),
    "select_n": lambda which, *cases: functools.reduce(
        lambda found, n: np.where(which == n, cases[n], found), range(1, len(cases)), cases[0]
    ),
}  # fmt: skip
WITH_SETTINGS = {
    "dot_general": dot_general, "broadcast_in_dim": broadcast, "iota": iota, "slice": cut,
    "dynamic_slice": dynamic_slice, "dynamic_update_slice": dynamic_update_slice, "pad": pad,
    "convert_element_type": convert,
    "integer_pow": lambda eqn, a: a ** np.asarray(eqn.params["y"], a.real.dtype),
    "reshape": reshape,
    "squeeze": lambda eqn, a: a.reshape(eqn.outvars[0].aval.shape),
    "expand_dims": lambda eqn, a: a.reshape(eqn.outvars[0].aval.shape),
    "transpose": lambda eqn, a: a.transpose(eqn.params["permutation"]),
    "rev": lambda eqn, a: np.flip(a, eqn.params["dimensions"]),
    "concatenate": lambda eqn, *a: np.concatenate(a, axis=eqn.params["dimension"]),
    "reduce_sum": reduced(np.sum), "reduce_max": reduced(np.max), "reduce_min": reduced(np.min),
    "reduce_prod": reduced(np.prod), "reduce_and": reduced(np.all), "reduce_or": reduced(np.any),
    "cumsum": cumulative(np.cumsum), "cumprod": cumulative(np.cumprod),
    "cummax": cumulative(np.maximum.accumulate),
}  # fmt: skip
