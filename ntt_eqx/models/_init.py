"""The initialisation of the published experiments, for any model made of `eqx.nn` layers."""

from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import PRNGKeyArray

_Model = TypeVar("_Model")


def glorot_init(model: _Model, *, key: PRNGKeyArray) -> _Model:
    """Draw the weights and biases of every linear and convolutional layer anew.

    Weights come from the (truncated) Glorot-normal distribution of variance
    `2 / (fan_in + fan_out)`, where the fans of a convolution are its channels times the size of
    its filter; biases from `N(0, 0.01^2)`. This is the initialisation of Liu & Zenke (2020).

    **Arguments:**

    - `model`: any PyTree with `eqx.nn.Linear` and `eqx.nn.Conv` layers in it; all other leaves
      (normalisations, embeddings, bare arrays) are kept.
    - `key`: the random key; each layer gets its own.

    **Returns:**

    The same model with new parameters of the same shapes and dtypes.
    """
    nodes, treedef = jax.tree.flatten(model, is_leaf=_is_layer)
    keys = jr.split(key, max(len(nodes), 1))
    nodes = [_draw(n, k) if _is_layer(n) else n for n, k in zip(nodes, keys, strict=False)]
    return jax.tree.unflatten(treedef, nodes)


def linear(in_features: int, out_features: int, *, key: PRNGKeyArray) -> eqx.nn.Linear:
    """A dense layer with the published initialisation."""
    layer = eqx.filter_eval_shape(eqx.nn.Linear, in_features, out_features, key=key)
    return glorot_init(layer, key=key)


def conv(
    in_channels: int, out_channels: int, kernel_size: int, *, key: PRNGKeyArray, **options: Any
) -> eqx.nn.Conv2d:
    """A 2D convolution with the published initialisation; `options` go to `eqx.nn.Conv2d`."""
    layer = eqx.filter_eval_shape(
        eqx.nn.Conv2d, in_channels, out_channels, kernel_size, key=key, **options
    )
    return glorot_init(layer, key=key)


def group_norm(name: str, channels: int) -> eqx.nn.GroupNorm:
    """Group normalisation over 8 groups of channels, for the model called `name`."""
    if channels < 8 or channels % 8:
        raise ValueError(f"{name}: width must be a multiple of 8, got {channels}.")
    return eqx.nn.GroupNorm(8, channels)


def _is_layer(node: Any) -> bool:
    return isinstance(node, eqx.nn.Linear | eqx.nn.Conv)


def _draw(layer: Any, key: PRNGKeyArray) -> Any:
    weight_key, bias_key = jr.split(key)
    # Equinox's order is (out, in, *window); jax counts the window into both fans
    glorot_normal = jax.nn.initializers.glorot_normal(in_axis=1, out_axis=0)
    weight = glorot_normal(weight_key, layer.weight.shape, layer.weight.dtype)
    layer = eqx.tree_at(lambda node: node.weight, layer, weight)
    if layer.bias is None:
        return layer
    dtype = layer.bias.dtype
    bias = jr.normal(bias_key, layer.bias.shape, dtype) * jnp.asarray(0.01, dtype)
    return eqx.tree_at(lambda node: node.bias, layer, bias)
