"""Patterns: which weights a mask keeps or drops together."""

import abc
import re
from collections.abc import Collection, Mapping
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float

from ._allocation import Allocation, Share, StackShape, densities_of, layer_shapes


class AbstractPattern(eqx.Module):
    """Which weights of a network are kept or dropped together.

    A pattern names pools of groups of weights, and scores each group. A density counts the groups
    of a pool, or with `scope="global"` those of all pools; the mask keeps the groups with the
    highest scores. Most patterns are an `AbstractLayerPattern`, which has a pool in every layer.
    """

    @abc.abstractmethod
    def densities(
        self, shapes: Mapping[str, tuple[int, ...]], density: Any, allocation: Allocation
    ) -> dict[str, Share]:
        """The density of each pool by name.

        **Arguments:**

        - `shapes`: shape of each weight by path.
        - `density`: one for all; a mapping from pools to theirs; or an array, if it follows a
          schedule inside `jit`.
        - `allocation`: how one density is distributed; see `allocate`.
        """

    @abc.abstractmethod
    def group_scores(
        self, scores: Mapping[str, Float[Array, "..."]], densities: Mapping[str, Share] | None
    ) -> dict[str, Float[Array, "..."]]:
        """One score for each group, by pool.

        **Arguments:**

        - `scores`: scores of each weight by path.
        - `densities`: those of `densities`; `None` if all pools compete for one density
          (`scope="global"`).
        """

    @abc.abstractmethod
    def masks(
        self, marks: Mapping[str, Bool[Array, "..."]], shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, Bool[Array, "..."]]:
        """The mask of each weight that keeps the marked groups.

        **Arguments:**

        - `marks`: which groups are kept, by pool.
        - `shapes`: shape of each weight by path.
        """

    @abc.abstractmethod
    def marks_of(self, masks: Mapping[str, Bool[Array, "..."]]) -> dict[str, Bool[Array, "..."]]:
        """The groups that concrete masks keep, by pool; the inverse of `masks`."""

    @abc.abstractmethod
    def pools_of(self, name: str) -> tuple[str, ...]:
        """The pools that have weights of the layer with this path."""

    def totals(
        self, shapes: Mapping[str, tuple[int, ...]], groups: Mapping[str, int]
    ) -> Mapping[str, int]:
        """The number of groups by pool of which a density is a share: all, by default.

        **Arguments:**

        - `shapes`: shape of each weight by path.
        - `groups`: the number of groups of each pool.
        """
        del shapes
        return groups

    def spared(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
        """Paths of the layers that the pattern never prunes.

        **Arguments:**

        - `shapes`: shapes of all prunable weights by path, in the order of the model's leaves.
        """
        del shapes
        return ()

    def keeps_count(self, shape: tuple[int, ...]) -> bool:
        """Whether all masks of this `shape` at one density keep the same number of weights."""
        del shape
        return False

    def alike_outputs(self, shape: tuple[int, ...]) -> int:
        """Number of consecutive output rows that always share one mask row (1 if none)."""
        del shape
        return 1

    def averages(self, shape: tuple[int, ...]) -> bool:
        """Whether a group's score, of a weight of this `shape`, is the mean of several scores."""
        del shape
        return False


class AbstractLayerPattern(AbstractPattern):
    """Which weights of a layer are kept or dropped together, whatever the other layers keep.

    A custom pattern is a subclass with `groups` and `spread`.
    """

    @abc.abstractmethod
    def groups(
        self, scores: Float[Array, "..."], name: str, density: float | Array | None
    ) -> Float[Array, "..."]:
        """One score for each group of weights; groups with the highest are kept.

        **Arguments:**

        - `scores`: scores of a layer's weights.
        - `name`: the layer's path, for errors.
        - `density`: the layer's density; `None` if all layers compete for one density
          (`scope="global"`), an array if it follows a schedule inside `jit`.
        """

    @abc.abstractmethod
    def spread(
        self, marks: Bool[Array, "..."], shape: tuple[int, ...], name: str
    ) -> Bool[Array, "..."]:
        """The mask of a weight of this `shape` that keeps the marked groups."""

    def densities(
        self, shapes: Mapping[str, tuple[int, ...]], density: Any, allocation: Allocation
    ) -> dict[str, Share]:
        """The density of each layer."""
        return densities_of(shapes, density, allocation)

    def group_scores(
        self, scores: Mapping[str, Float[Array, "..."]], densities: Mapping[str, Share] | None
    ) -> dict[str, Float[Array, "..."]]:
        """The groups of each layer.

        **Raises:**

        `ValueError` when the order of a weight's axes is not known; see `check_layout`.
        """
        for name in scores:
            self.check_layout(name)
        shares = densities or dict.fromkeys(scores)
        return {name: self.groups(leaf, name, shares[name]) for name, leaf in scores.items()}

    def masks(
        self, marks: Mapping[str, Bool[Array, "..."]], shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, Bool[Array, "..."]]:
        """The mask of each layer."""
        return {name: self.spread(marks[name], shape, name) for name, shape in shapes.items()}

    def marks_of(self, masks: Mapping[str, Bool[Array, "..."]]) -> dict[str, Bool[Array, "..."]]:
        """The groups of each layer that rank in the upper half of the mask's own entries."""
        shares = {name: int(mask.sum()) / mask.size for name, mask in masks.items()}
        scores = {name: mask.astype(jnp.float32) for name, mask in masks.items()}
        return {name: g > 0.5 for name, g in self.group_scores(scores, shares).items()}

    def pools_of(self, name: str) -> tuple[str, ...]:
        """The layer itself."""
        return (name,)

    def check_layout(self, name: str) -> None:
        """Raise `ValueError` if the weight may have another order of axes than the pattern reads.

        A pattern of your own is asked for any weight, so it does not by default.
        """
        del name


class Unstructured(AbstractLayerPattern):
    """Every weight is kept or dropped by itself, which is what no pattern means."""

    def groups(
        self, scores: Float[Array, "..."], name: str, density: float | Array | None
    ) -> Float[Array, "..."]:
        """The scores themselves."""
        return scores

    def spread(
        self, marks: Bool[Array, "..."], shape: tuple[int, ...], name: str
    ) -> Bool[Array, "..."]:
        """The marks themselves."""
        return marks

    def marks_of(self, masks: Mapping[str, Bool[Array, "..."]]) -> dict[str, Bool[Array, "..."]]:
        """The masks themselves."""
        return dict(masks)

    def keeps_count(self, shape: tuple[int, ...]) -> bool:
        """Single weights are kept, as many as the density says."""
        return True


class AbstractOrdered(AbstractLayerPattern):
    """A pattern of the library's own, which reads a weight as `[outputs, inputs, *window]`."""

    def check_layout(self, name: str) -> None:
        """Raise `ValueError` for a parameter of a function, or one of Flax or Haiku.

        These have another order, in which the pattern would group the wrong weights in silence;
        and dicts are sorted by name, while the pattern takes the first and the last layer for the
        network's ends.
        """
        if _FOREIGN.search(name):
            raise ValueError(
                f"{_reads(self)}, as Equinox stores them, and nothing says that {name} has that "
                f"order; a `kernel` of Flax and a `w` of Haiku have another. {_GIVE_ORDER}."
            )


def check_order(pattern: AbstractOrdered, scores: Any, spared: Collection[str]) -> None:
    """Raise `ValueError` for scores of layers of Equinox whose weights have another order.

    Layers in `spared` stay whole, whatever their order is.

    `eqx.filter_vmap` over the making of layers stacks them, with an axis before the outputs; and an
    embedding is `[inputs, outputs]`.
    """
    for name, shape in layer_shapes(scores).items():
        if isinstance(shape, StackShape):
            raise ValueError(
                f"{_reads(pattern)}, but {name} of shape {tuple(shape)} is a stack of them. "
                f"{_GIVE_ORDER}."
            )
    is_embedding = lambda node: isinstance(node, eqx.nn.Embedding)
    for path, node in jtu.tree_leaves_with_path(scores, is_leaf=is_embedding):
        name = f"{jtu.keystr(path)}.weight"
        if is_embedding(node) and node.weight is not None and name not in spared:
            raise ValueError(
                f"{_reads(pattern)}, but {name} of an Embedding is [inputs, outputs]. "
                f"{_GIVE_ORDER}, or leave it dense: sparsify(model, where)."
            )


def _reads(pattern: AbstractOrdered) -> str:
    return f"make_mask: the pattern {pattern} reads weights as [outputs, inputs, *window]"


_GIVE_ORDER = "Give the order of all layers: InLayout(pattern, weight_layouts(model, x))"
# A parameter of `eqx.Partial(f, params)`; a name of Flax Linen, Haiku, Flax NNX.
_FOREIGN = re.compile(r"(^|\.)(args|keywords)\[|\['(kernel|w|embeddings?)'\]$|\.value$")
