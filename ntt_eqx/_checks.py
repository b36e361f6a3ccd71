"""Checks of user input, which run before anything is computed."""

import contextlib
import numbers
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool

from ._types import PyTree, at_trace_time


def is_count(value: Any, least: int = 1) -> bool:
    """Whether `value` is an integer of at least `least`."""
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    return whole and int(value) >= least


def check_key(caller: str, key: Any) -> None:
    """Raise `ValueError` unless `key` is one random key: of `jax.random.key`, or an older one."""
    dtype, shape = getattr(key, "dtype", None), tuple(getattr(key, "shape", ()))
    if dtype is None:
        simple = key is None or isinstance(key, int | float | str)
        got = f"{key!r:.60}" if simple else f"a {type(key).__name__}"
    elif eqx.is_array(key) and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        if shape == ():
            return
        got = f"a batch of keys of shape {list(shape)}"
    else:
        words = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))).shape
        if dtype == np.uint32 and shape == words:
            return
        got = f"an array of {dtype}{list(shape)}"
    raise ValueError(f"{caller}: needs one random key, got {got}; use jax.random.key(0).")


MOST = 2**31 - 1
"""The largest count: steps are counted in int32."""


def check_count(what: str, value: Any, least: int = 1, *, none: bool = False) -> None:
    """Raise `ValueError` unless `value` is an integer from `least` to `MOST`, or allowed `None`.

    **Arguments:**

    - `what`: begins the message, as in `"fit: num_steps"`.
    - `value`: the count.
    - `least`: the lowest that is allowed.
    - `none`: whether `None` is allowed, too.
    """
    if none and value is None:
        return
    if not is_count(value, least):
        raise ValueError(
            f"{what} must be an integer of at least {least}{' or None' if none else ''}, got "
            f"{value!r}."
        )
    if int(value) > MOST:
        raise ValueError(f"{what} must be at most 2**31 - 1, for it counts in int32, got {value}.")


@contextlib.contextmanager
def asked_for_values(what: str) -> Iterator[None]:
    """Raise `ValueError` where a function of a user's asks for the value of what is traced.

    **Arguments:**

    - `what`: begins the message: the function, and its argument.
    """
    asked = jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError
    try:
        yield
    except (*asked, jax.errors.TracerIntegerConversionError) as error:
        raise ValueError(
            f"{what}, which a compiled step does not know: write jnp.where(step < n, a, b) for an "
            "`if`, and jnp for math and numpy."
        ) from error


def check_weight(name: str, value: Any) -> None:
    """Raise `ValueError` unless the weight of a loss term is a number in `[0, inf)`."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    number: Any = value
    if not (real and 0 <= number <= sys.float_info.max):
        raise ValueError(f"{name} must be finite and >= 0, got {value!r}.")


def check_batch(caller: str, x: Any) -> None:
    """Raise `ValueError` unless `x` is an array with one sample at least on its leading axis."""
    if not hasattr(x, "dtype") or len(getattr(x, "shape", ())) < 1:
        kind = f"a scalar {x.dtype}" if hasattr(x, "dtype") else type(x).__name__
        raise ValueError(f"{caller}: needs an array of inputs [batch, ...], got {kind}.")
    if not (jnp.issubdtype(x.dtype, jnp.number) or x.dtype == bool):
        raise ValueError(f"{caller}: needs an array of numbers, got one of {x.dtype}.")
    if x.shape[0] == 0:
        raise ValueError(
            f"{caller}: a batch must hold at least one sample, got shape {tuple(x.shape)}."
        )


def check_finite(caller: str, name: str, x: Any) -> None:
    """Raise `ValueError` when an entry of `x` is known to be NaN or infinite."""
    _check_each(caller, [(name, x)])


def is_finite(x: Any) -> bool:
    """Whether no entry of `x` is NaN or infinite; its values must be known."""
    return are_finite([x])[0]


def in_host_memory(x: Any) -> Any:
    """A CPU's array as NumPy's, which copies and compiles nothing; others as they are."""
    if not isinstance(x, jax.Array) or isinstance(x, Tracer):
        return x
    devices = list(x.devices())
    here = len(devices) == 1 and devices[0].platform == "cpu" and x.is_fully_addressable
    return np.asarray(x) if here else x


def are_finite(arrays: Sequence[Any]) -> list[bool]:
    """`is_finite` of each array, by one program for all that are not in the host's memory."""
    arrays = [in_host_memory(x) for x in arrays]
    on_device = [x for x in arrays if not isinstance(x, np.ndarray)]
    with at_trace_time():  # constants, also inside `jit`
        known = iter(jax.device_get(_finite(on_device)) if on_device else ())
    return [
        bool(np.isfinite(x).all() if isinstance(x, np.ndarray) else next(known)) for x in arrays
    ]


@jax.jit
def _finite(arrays: list[Any]) -> list[Bool[Array, ""]]:
    return [jnp.isfinite(x).all() for x in arrays]


def check_weights(caller: str, model: PyTree, name: str = "model") -> None:
    """`check_finite` for every floating-point leaf of `model`."""
    leaves = jtu.tree_leaves_with_path(eqx.filter(model, eqx.is_inexact_array))
    _check_each(caller, [(f"{name}{jtu.keystr(path)}", leaf) for path, leaf in leaves])


def _check_each(caller: str, named: Sequence[tuple[str, Any]]) -> None:
    known = [
        (name, x)
        for name, x in named
        if not isinstance(x, Tracer) and jnp.issubdtype(x.dtype, jnp.inexact)
    ]
    for (name, _), finite in zip(known, are_finite([x for _, x in known]), strict=True):
        if not finite:
            raise ValueError(f"{caller}: {name} has NaN or infinite entries.")


def check_optimizer(caller: str, optimizer: Any) -> None:
    """Raise `ValueError` unless `optimizer` is an optax transformation.

    This does not run the optimiser; `check_first_update` checks its first step.
    """
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise ValueError(
            f"{caller}: the optimizer must be an optax transformation, such as optax.adam(1e-3), "
            f"got {type(optimizer).__name__}."
        )


def sample_output(caller: str, model: PyTree, sample: Any) -> jax.ShapeDtypeStruct:
    """The shape and dtype of `model`'s output for one sample.

    **Raises:**

    `ValueError` when it does not map one sample, and nothing else, to one floating-point array.
    """
    with calling_model(caller, model, sample):
        out = eqx.filter_eval_shape(lambda m, x: m(x), model, sample)
    return checked_output(caller, out)


def sample_of(x: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of one sample of the batch `x`, as jax would hold it."""
    return jax.ShapeDtypeStruct(x.shape[1:], jax.dtypes.canonicalize_dtype(x.dtype))


@contextlib.contextmanager
def calling_model(caller: str, model: PyTree, sample: Any) -> Iterator[None]:
    """Turn any error of `model` on one sample into a message that says what it must take."""
    what = f"one sample, {sample.dtype}{list(sample.shape)}"
    weights = jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))
    dtypes = sorted({str(w.dtype) for w in weights})
    if sample.dtype == jnp.float64 and dtypes == ["float32"]:
        raise ValueError(
            f"{caller}: the inputs are float64, but the model's weights are float32; cast one of "
            "them."
        )
    try:
        yield
    except Exception as error:
        reason = str(error).strip().split("\n")[0][:300]
        raise ValueError(
            f"{caller}: the model fails on {what} ({type(error).__name__}: {reason}). It is called "
            "as model(x), for a sample without a batch axis and of the dtype of its weights "
            f"({', '.join(dtypes)}). eqx.nn.inference_mode turns dropout off; a model that needs "
            "a key goes into a module that holds it; pair `model(x, state)` with its state by "
            "ntt.StatefulModel(model, state)."
        ) from error


def checked_output(caller: str, out: Any) -> jax.ShapeDtypeStruct:
    """`out`, the shape and dtype of a model's output.

    **Raises:**

    `ValueError` unless it is one floating-point array.
    """
    if not isinstance(out, jax.ShapeDtypeStruct) or not jnp.issubdtype(out.dtype, jnp.floating):
        raise ValueError(
            f"{caller}: the model must map one sample to one floating-point array of outputs, but "
            f"it returned {out!r}. A model that also returns a state is paired with its state by "
            "ntt.StatefulModel(model, state)."
        )
    if out.size == 0:
        raise ValueError(
            f"{caller}: the model maps one sample to no outputs, an array {out.dtype}"
            f"{list(out.shape)}; it must have one at least."
        )
    return out
