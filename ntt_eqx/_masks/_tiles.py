"""Patterns of tiles: blocks and channels of a weight."""

import abc
import functools
import math
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .._types import widen
from ._pattern import AbstractOrdered


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
