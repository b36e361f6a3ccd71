"""`AbstractKeptLayer`: what layers that store kept weights alone have in common."""

import abc
from typing import Any

import equinox as eqx
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float

from ._types import PyTree


class AbstractKeptLayer(eqx.Module):
    """A layer that stores the kept entries of its weight and nothing of the others.

    Attributes:
        values: the kept entries, row by row, as `weight[mask]` has them.
        bias: as in the layer that this one stands for.
    """

    values: eqx.AbstractVar[Float[Array, " kept"]]
    bias: eqx.AbstractVar[Array | None]

    @property
    @abc.abstractmethod
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the whole weight."""

    @property
    def weight(self) -> Array:
        """There is none: models that read it, as tied ones do, need the layer whole."""
        raise AttributeError(
            f"{type(self).__name__} stores kept weights alone and has no `weight`. Leave layers "
            "whose weight the model reads as they are: sparse_layers(sparse, where=...)."
        )

    @abc.abstractmethod
    def mask(self) -> Bool[Array, "..."]:
        """The mask of the weight."""

    @abc.abstractmethod
    def dense(self) -> Any:
        """The layer of Equinox with the whole weight, zeros included."""


def is_kept_layer(node: Any) -> bool:
    """Whether a node of a model is such a layer."""
    return isinstance(node, AbstractKeptLayer)


def kept_layers(model: PyTree) -> dict[str, AbstractKeptLayer]:
    """All layers of a model that store kept weights alone, by their key strings."""
    named = jtu.tree_leaves_with_path(model, is_leaf=is_kept_layer)
    return {jtu.keystr(path): node for path, node in named if is_kept_layer(node)}


def check_masked_form(caller: str, model: PyTree) -> None:
    """Raise `ValueError` if a model has layers without the weights that are not kept."""
    layers = kept_layers(model)
    if layers:
        first = next(iter(layers.values()))
        raise ValueError(
            f"{caller}: {type(first).__name__} stores kept weights alone, and this needs all "
            "of them; ntt.masked_layers(sparse) brings them back."
        )
