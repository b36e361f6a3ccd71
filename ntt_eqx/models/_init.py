"""Published initialisations, for any model made of `eqx.nn` layers."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, PRNGKeyArray

from .._checks import check_key

_Model = TypeVar("_Model")

_CUT_STD = 0.87962566103423978  # of a standard normal distribution that is cut off at -2 and 2


@dataclasses.dataclass(frozen=True)
class _Rule:
    """How weights are drawn, times a scale of their fans; and the scale of normal biases."""

    draw: Callable[..., Array]
    scale: Callable[[int, int], float]
    bias: float


_glorot = _Rule(
    lambda key, shape, dtype: jr.truncated_normal(key, -2.0, 2.0, shape, dtype),
    lambda fan_in, fan_out: math.sqrt(2 / (fan_in + fan_out)) / _CUT_STD,
    0.01,
)
_he = _Rule(jr.normal, lambda fan_in, _: math.sqrt(2 / fan_in), 0.0)


def glorot_init(model: _Model, *, key: PRNGKeyArray) -> _Model:
    """Draw the weights and biases of every linear and convolutional layer anew.

    Weights come from the Glorot-normal distribution of variance `2 / (fan_in + fan_out)`, cut off
    at two standard deviations, where the fans of a convolution are its channels times the size of
    its filter; biases from `N(0, 0.01^2)`. This is the initialisation of Liu & Zenke (2020).

    **Arguments:**

    - `model`: any PyTree with `eqx.nn.Linear` and `eqx.nn.Conv` layers in it, whose parameters may
      be arrays or only their shapes (`jax.ShapeDtypeStruct`); all other leaves (normalisations,
      embeddings, bare arrays) are kept.
    - `key`: the random key.

    **Returns:**

    The same model with new parameters of the same shapes and dtypes.

    **Raises:**

    `ValueError` when `key` is not one random key.
    """
    check_key("glorot_init", key)
    return _drawn(model, key, _glorot)


def he_init(model: _Model, *, key: PRNGKeyArray) -> _Model:
    """Draw the weights of every linear and convolutional layer anew; biases become zero.

    Weights come from `N(0, 2 / fan_in)`, where the fan of a convolution is its input channels times
    the size of its filter, as in He et al. (Delving deep into rectifiers, ICCV 2015).

    **Arguments:**

    - `model`, `key`: as `glorot_init`.

    **Returns:**

    The same model with new parameters of the same shapes and dtypes.

    **Raises:**

    `ValueError` when `key` is not one random key.
    """
    check_key("he_init", key)
    return _drawn(model, key, _he)


def linear(in_features: int, out_features: int) -> eqx.nn.Linear:
    """A dense layer that has shapes only, for an initialisation to fill."""
    return eqx.filter_eval_shape(eqx.nn.Linear, in_features, out_features, key=jr.key(0))


def conv(in_channels: int, out_channels: int, kernel_size: int, **options: Any) -> eqx.nn.Conv2d:
    """A 2D convolution that has shapes only; `options` go to `eqx.nn.Conv2d`."""
    return eqx.filter_eval_shape(
        eqx.nn.Conv2d, in_channels, out_channels, kernel_size, key=jr.key(0), **options
    )


def normalisation(name: str, kind: str, channels: int) -> Any:
    """The normalisation of `channels` feature maps, for the model called `name`.

    Group normalisation has 8 groups; batch normalisation averages over the axis `"batch"`, with
    the momentum 0.9 of He et al. (2016).
    """
    if kind not in ("group", "batch"):
        raise ValueError(f"{name}: norm must be 'group' or 'batch', got {kind!r}.")
    if channels < 8 or channels % 8:
        raise ValueError(f"{name}: width must be a multiple of 8, got {channels}.")
    if kind == "group":
        return eqx.nn.GroupNorm(8, channels)
    return eqx.nn.BatchNorm(channels, "batch", momentum=0.9, mode="batch")


def normalise(norm: Any, x: Array, state: Any) -> tuple[Array, Any]:
    """Normalised feature maps and the next state, which group normalisation does not have."""
    return (norm(x), None) if state is None else norm(x, state)


def _is_layer(node: Any) -> bool:
    return isinstance(node, eqx.nn.Linear | eqx.nn.Conv)


def _parameters(node: Any) -> list[Any]:
    """Weight and bias of a layer; nothing of anything else."""
    if not _is_layer(node):
        return []
    return [node.weight] if node.bias is None else [node.weight, node.bias]


def _drawn(model: _Model, key: PRNGKeyArray, rule: _Rule) -> _Model:
    nodes, treedef = jax.tree.flatten(model, is_leaf=_is_layer)
    parameters = [_parameters(node) for node in nodes]
    shapes = tuple(tuple(p.shape for p in group) for group in parameters)
    dtypes = tuple(tuple(p.dtype for p in group) for group in parameters)
    drawn = _draw(key, shapes, dtypes, rule)
    nodes = [
        eqx.tree_at(_parameters, node, new) if new else node
        for node, new in zip(nodes, drawn, strict=True)
    ]
    return jax.tree.unflatten(treedef, nodes)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _draw(key: PRNGKeyArray, shapes: tuple, dtypes: tuple, rule: _Rule) -> list[list[Array]]:
    """New parameters for each layer, cut from one long draw of weights and one of biases.

    To compile the random generator for a new size takes far longer than to run it, so that one
    draw per layer would make a deep model take tens of seconds to build.
    """
    wide = any(dtype == jnp.float64 for group in dtypes for dtype in group)
    dtype = jnp.float64 if wide else jnp.float32
    sizes = [sum(math.prod(group[n]) for group in shapes if len(group) > n) for n in (0, 1)]
    keys = jr.split(key)
    streams = [rule.draw(keys[0], (sizes[0],), dtype), jr.normal(keys[1], (sizes[1],), dtype)]
    starts, drawn = [0, 0], []
    for group, kinds in zip(shapes, dtypes, strict=True):
        scales = (rule.scale(*_fans(group[0])), rule.bias) if group else ()
        new = []
        for n, (shape, kind) in enumerate(zip(group, kinds, strict=True)):
            size = math.prod(shape)
            piece = streams[n][starts[n] : starts[n] + size]
            starts[n] += size
            new.append((piece.reshape(shape) * scales[n]).astype(kind))
        drawn.append(new)
    return drawn


def _fans(shape: tuple[int, ...]) -> tuple[int, int]:
    """Values that an output reads, and that read an input, of a weight `(out, in, *window)`."""
    out_features, in_features, *window = shape
    return in_features * math.prod(window), out_features * math.prod(window)
