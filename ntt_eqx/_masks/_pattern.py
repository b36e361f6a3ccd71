"""Patterns: which weights a mask keeps or drops together."""

import abc
import functools
import math
import re
from collections.abc import Collection, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.core import Tracer
from jaxtyping import Array, Bool, Float

from .._types import widen
from ._allocation import Allocation, Share, StackShape, densities_of, layer_shapes
from ._select import by_index, order_keys


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


class NM(AbstractOrdered):
    """N of every M consecutive inputs of an output are kept (2:4 is what sparse tensor cores take).

    Groups run along a weight's second axis, the one that the layer's sum runs over, which M must
    divide. Every group keeps its own N highest scores, ties to the lowest index.

    Attributes:
        n: weights kept in each group.
        m: size of a group.
    """

    n: int = eqx.field(static=True, default=2)
    m: int = eqx.field(static=True, default=4)

    def __check_init__(self) -> None:
        """Reject an impossible pattern."""
        if not 0 < self.n <= self.m:
            raise ValueError(f"NM: needs 0 < n <= m, got n={self.n} and m={self.m}.")

    def groups(
        self, scores: Float[Array, "..."], name: str, density: float | Array | None
    ) -> Float[Array, "..."]:
        """1 for the `n` highest of every group of `m` along the second axis, 0 for the others.

        All scores are NaN if ties decide most groups.
        """
        if density is None:
            raise ValueError(
                "make_mask: scope='global' takes one density, no allocation and no N:M pattern; "
                "these set the densities of layers, which only scope='layer' keeps."
            )
        if not isinstance(density, Tracer) and density == 1.0:
            return scores
        if isinstance(density, Tracer) or round(float(density) * self.m, 9) != self.n:
            given = "a schedule" if isinstance(density, Tracer) else f"{float(density):g}"
            raise ValueError(
                f"make_mask: the pattern {self.n}:{self.m} has density {self.n / self.m:g}, but "
                f"{name} was given {given}; an N:M pattern has one density, so it takes one step."
            )
        if scores.ndim < 2 or scores.shape[1] % self.m:
            raise ValueError(
                f"make_mask: {self.n}:{self.m} needs a multiple of {self.m} inputs, but {name} has "
                f"shape {scores.shape}; give it density 1 or leave it out with `where=`."
            )
        marks, undecided = _keep_in_groups(scores, self.n, self.m)
        return jnp.where(undecided, jnp.nan, marks.astype(scores.dtype))

    def spread(
        self, marks: Bool[Array, "..."], shape: tuple[int, ...], name: str
    ) -> Bool[Array, "..."]:
        """The marks themselves."""
        return marks

    def keeps_count(self, shape: tuple[int, ...]) -> bool:
        """Every group keeps `n` weights."""
        return True


class AbstractTiling(AbstractOrdered):
    """Tiles of a weight that are kept or dropped as a whole, by the mean of their scores."""

    @abc.abstractmethod
    def sizes(self, shape: tuple[int, ...], name: str) -> tuple[int, ...]:
        """The sizes of a tile of a weight of this `shape`, one for each axis."""

    def groups(
        self, scores: Float[Array, "..."], name: str, density: float | Array | None
    ) -> Float[Array, "..."]:
        """The mean score of every tile."""
        return pool(scores, self.sizes(scores.shape, name))

    def spread(
        self, marks: Bool[Array, "..."], shape: tuple[int, ...], name: str
    ) -> Bool[Array, "..."]:
        """Every weight of a tile gets the tile's mark."""
        return spread(marks, self.sizes(shape, name), shape)

    def keeps_count(self, shape: tuple[int, ...]) -> bool:
        """Whether no tile at an edge is cut, so that all tiles have the same size."""
        return not any(s % b for s, b in zip(shape, self.sizes(shape, "a weight"), strict=True))

    def alike_outputs(self, shape: tuple[int, ...]) -> int:
        """Number of output rows of a tile, which share one mask row."""
        return self.sizes(shape, "a weight")[0]

    def averages(self, shape: tuple[int, ...]) -> bool:
        """Whether a tile holds several weights."""
        return math.prod(self.sizes(shape, "a weight")) > 1


class Block(AbstractTiling):
    """Keep or drop whole blocks, by the mean of their scores.

    Blocks tile a weight's first axes from index 0; axes that `shape` does not reach (a
    convolution's kernel) are in one block whole, and blocks at the far edges may be smaller. A
    density counts blocks. In a model the last layer, whose outputs are the network's, is left
    whole.

    Attributes:
        shape: sizes of a block along the first axes (outputs, inputs).
        spare: paths of the layers that are left whole instead, such as `(".head.weight",)`; `()`
            leaves none whole.
    """

    shape: tuple[int, ...] = eqx.field(static=True, default=(4, 4))
    spare: tuple[str, ...] | None = eqx.field(static=True, default=None)

    def __check_init__(self) -> None:
        """Reject empty blocks."""
        _check_spare("Block", self.spare)
        if not self.shape or any(size < 1 for size in self.shape):
            raise ValueError(f"Block: sizes must be at least 1, got {self.shape}.")

    def spared(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
        """The layers in `spare`; by default the ends of the network."""
        return _left_whole(self, shapes, self.spare)

    def sizes(self, shape: tuple[int, ...], name: str) -> tuple[int, ...]:
        """The sizes of a block, at most those of the weight."""
        if len(shape) < len(self.shape):
            raise ValueError(
                f"make_mask: blocks {self.shape} have more axes than {name} of shape {shape}."
            )
        given = tuple(min(b, s) for b, s in zip(self.shape, shape, strict=False))
        return given + shape[len(given) :]


class Channels(AbstractTiling):
    """Keep or drop whole channels, by the mean of their scores. A density counts channels.

    In a model the network's own ends are left whole: of filters the last layer, whose outputs are
    the network's, so that no class is cut off; of input channels a first convolution, which reads
    the channels of the images, and layers that have one. The first prunable weight of the model's
    leaves is taken for the first layer, the last one for the last.

    Attributes:
        axis: 0 for filters (all that feeds one output), 1 for input channels.
        spare: paths of the layers that are left whole instead, such as `(".head.weight",)`; `()`
            leaves none whole.
    """

    axis: int = eqx.field(static=True, default=0)
    spare: tuple[str, ...] | None = eqx.field(static=True, default=None)

    def __check_init__(self) -> None:
        """Reject other axes."""
        _check_spare("Channels", self.spare)
        if self.axis not in (0, 1):
            raise ValueError(f"Channels: axis must be 0 (outputs) or 1 (inputs), got {self.axis}.")

    def spared(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
        """The layers in `spare`; by default the ends of the network."""
        return _left_whole(self, shapes, self.spare)

    def sizes(self, shape: tuple[int, ...], name: str) -> tuple[int, ...]:
        """One along the axis of the channels, all along the others."""
        if len(shape) <= self.axis:
            raise ValueError(f"make_mask: {name} of shape {shape} has no axis {self.axis}.")
        return tuple(1 if axis == self.axis else size for axis, size in enumerate(shape))


@functools.partial(jax.jit, static_argnums=1)
def pool(scores: Float[Array, "..."], sizes: tuple[int, ...]) -> Float[Array, "..."]:
    """The mean score of every tile of `sizes`, smaller tiles at the far edges included."""
    scores = widen(scores)  # sums in 16 bits would overflow, and make ties
    counts = tuple(math.ceil(s / b) for s, b in zip(scores.shape, sizes, strict=True))
    padding = [(0, c * b - s) for s, b, c in zip(scores.shape, sizes, counts, strict=True)]
    tiled = jnp.pad(scores, padding).reshape(_interleave(counts, sizes))
    area = jnp.pad(jnp.ones(scores.shape, scores.dtype), padding).reshape(tiled.shape)
    inner = tuple(range(1, tiled.ndim, 2))
    return jnp.sum(tiled, axis=inner) / jnp.sum(area, axis=inner)


@functools.partial(jax.jit, static_argnums=(1, 2))
def spread(
    marks: Bool[Array, "..."], sizes: tuple[int, ...], shape: tuple[int, ...]
) -> Bool[Array, "..."]:
    """The inverse of `pool`: every entry of a tile gets the tile's mark."""
    for axis, size in enumerate(sizes):
        marks = jnp.repeat(marks, size, axis=axis, total_repeat_length=marks.shape[axis] * size)
    return marks[tuple(slice(0, s) for s in shape)]


@functools.partial(jax.jit, static_argnums=(1, 2))
def _keep_in_groups(
    scores: Float[Array, "..."], n: int, m: int
) -> tuple[Bool[Array, "..."], Bool[Array, ""]]:
    """The marks, and whether ties decide most groups."""
    last = jnp.moveaxis(order_keys(scores), 1, -1)
    keys = last.reshape(*last.shape[:-1], -1, m)
    # rank_i = #{j : key_j > key_i, or key_j = key_i and j < i}
    mine, other = keys[..., :, None], keys[..., None, :]
    index = jnp.arange(m, dtype=jnp.int32)
    before = (index[None, :] < index[:, None]).reshape((1,) * (keys.ndim - 1) + (m, m))
    rank = jnp.sum((other > mine) | ((other == mine) & before), axis=-1, dtype=jnp.int32)
    kept = rank < n
    # tied with one that the index treats otherwise
    ties = jnp.any((other == mine) & (kept[..., :, None] != kept[..., None, :]), axis=-1)
    undecided = by_index(keys, ties, jnp.sum(ties, dtype=jnp.int32), scores.dtype)
    return jnp.moveaxis(kept.reshape(last.shape), -1, 1), undecided


def _left_whole(
    pattern: AbstractTiling, shapes: Mapping[str, tuple[int, ...]], spare: tuple[str, ...] | None
) -> tuple[str, ...]:
    """The layers in `spare`; by default the ends of the network.

    The last layer is left whole where a tile holds some of its outputs alone, so that no class
    is cut off; the first one, a convolution, where a tile is one channel of the images; and
    layers that are one tile, in which there is nothing to choose.

    Raises:
        ValueError: `spare` names no layer, or all are left whole.
    """
    names, sizes = list(shapes), {name: pattern.sizes(s, name) for name, s in shapes.items()}
    if spare is not None:
        if unknown := sorted(set(spare) - set(names)):
            raise ValueError(f"make_mask: spare={unknown} names no layer; there are {names}.")
        found = set(spare)
    else:
        found = {name for name in names if sizes[name] == shapes[name]}
        first, last = names[0], names[-1]
        if sizes[last][0] < shapes[last][0]:
            found.add(last)
        if len(shapes[first]) > 2 and sizes[first][0] == shapes[first][0]:
            found.add(first)
    if len(found) == len(names):
        raise ValueError(
            f"make_mask: the pattern {pattern} leaves every layer whole: the network's own inputs "
            "and outputs are not pruned by it; spare=() prunes them, too."
        )
    return tuple(name for name in names if name in found)


def _check_spare(caller: str, spare: Any) -> None:
    if spare is not None and not (
        isinstance(spare, tuple) and all(isinstance(name, str) for name in spare)
    ):
        raise ValueError(
            f'{caller}: spare must be a tuple of paths, such as (".layers[2].weight",), or None, '
            f"got {spare!r}."
        )


def _interleave(outer: tuple[int, ...], inner: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n for pair in zip(outer, inner, strict=True) for n in pair)
