"""The sizes that layers hold beside their arrays, after their arrays have become smaller."""

import copy
from typing import Any

import equinox as eqx
import jax

from .._types import PyTree

_LAYERS = (
    eqx.nn.Linear,
    eqx.nn.Conv,
    eqx.nn.ConvTranspose,
    eqx.nn.GroupNorm,
    eqx.nn.BatchNorm,
    eqx.nn.Embedding,
)


def with_sizes(model: PyTree) -> PyTree:
    """`model` with every layer's sizes as its arrays have them."""
    is_layer = lambda node: isinstance(node, _LAYERS)
    return jax.tree.map(
        lambda node: _sized(node) if is_layer(node) else node, model, is_leaf=is_layer
    )


def _sized(layer: Any) -> Any:
    sizes = {name: size for name, size in _sizes(layer).items() if getattr(layer, name) != size}
    if not sizes:
        return layer
    layer = copy.copy(layer)
    for name, size in sizes.items():
        object.__setattr__(layer, name, size)  # a Module is frozen, and this one is new
    return layer


def _sizes(layer: Any) -> dict[str, Any]:
    shape = getattr(layer.weight, "shape", None)
    if shape is None:  # no weight, or that of another layer (`eqx.nn.Shared`)
        return {}
    if isinstance(layer, eqx.nn.Linear):
        sizes = {"out_features": shape[0], "in_features": shape[1]}
        return {n: size for n, size in sizes.items() if getattr(layer, n) != "scalar"}
    if isinstance(layer, eqx.nn.Conv | eqx.nn.ConvTranspose):
        alone = 1 < layer.groups == layer.in_channels == layer.out_channels
        groups = shape[0] if alone else layer.groups
        return {"out_channels": shape[0], "in_channels": shape[1] * groups, "groups": groups}
    if isinstance(layer, eqx.nn.GroupNorm):
        return {"channels": shape[0]}
    if isinstance(layer, eqx.nn.BatchNorm):
        return {"input_size": shape[0]}
    return {"num_embeddings": shape[0], "embedding_size": shape[1]}
