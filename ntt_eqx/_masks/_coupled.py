"""`CoupledChannels`: whole channels of a network, each in every layer that makes or reads it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from .._types import widen
from ._allocation import Allocation, Share, densities_of
from ._pattern import AbstractPattern


@dataclasses.dataclass(frozen=True)
class CoupledAxis:
    """The channels along one axis of a weight.

    Attributes:
        weight: path of the weight.
        axis: the axis.
        channels: int32, for each index the number of its channel, -1 for none, as bytes: these
            hash and compare fast, once for every call of a jitted function.
    """

    weight: str
    axis: int
    channels: bytes = dataclasses.field(repr=False)

    @property
    def numbers(self) -> np.ndarray:
        """`channels` as an array."""
        return np.frombuffer(self.channels, np.int32)


class CoupledChannels(AbstractPattern):
    """Keep or drop whole channels of a network, in all layers that make or read them.

    A filter goes with the inputs of the next layer that read it, and channels that a residual sum
    adds to each other go together (Li et al., ICLR 2017, arXiv 1608.08710, section 3.3; the groups
    are those of Fang et al., CVPR 2023, arXiv 2301.12900). `compact` then leaves out every dropped
    channel, so that what is left is a smaller dense network. `coupled_channels(model, x)` makes the
    pattern of a model.

    Channels that the same layers make and read form a set. A channel's score is the mean of those
    of all of its weights, and a density counts channels: it is kept in every set with
    `scope="layer"`, over all channels with `scope="global"`. The density of weights is lower, about
    its square in the middle of a network. Weights without such channels are left whole.

    Attributes:
        sets: name and number of channels of each set. Its name is the path of the first weight that
            has its channels; densities by layer name sets.
        axes: which channel each index of each axis belongs to. Channels are numbered through all
            sets.
    """

    sets: tuple[tuple[str, int], ...] = eqx.field(static=True)
    axes: tuple[CoupledAxis, ...] = eqx.field(static=True)

    def __check_init__(self) -> None:
        """Reject a network without channels to choose from, and a model instead of its channels."""
        if not isinstance(self.sets, tuple):
            raise ValueError(
                f"CoupledChannels: sets must be a tuple, got {type(self.sets).__name__}; "
                "coupled_channels(model, x) makes the pattern of a model."
            )
        if not self.sets:
            raise ValueError(
                "coupled_channels: the model has no channels that could go: its inputs and outputs "
                "stay, and so do channels of which the program needs all, such as those that it "
                "normalises together."
            )

    def __repr__(self) -> str:
        """Short: the channels of a network may be thousands."""
        return f"CoupledChannels({len(self.sets)} sets of {self._size:,} channels)"

    def densities(
        self, shapes: Mapping[str, tuple[int, ...]], density: Any, allocation: Allocation
    ) -> dict[str, Share]:
        """The density of each set.

        **Raises:**

        `ValueError` for ERK shares, which are those of layers.
        """
        if allocation == "erk":
            raise ValueError(
                "make_mask: allocation='erk' distributes weights over layers, and CoupledChannels "
                "counts channels, by sets; give a density, or a mapping from the sets to theirs."
            )
        return densities_of({name: (size,) for name, size in self.sets}, density, allocation)

    def averages(self, shape: tuple[int, ...]) -> bool:
        """A channel's score is the mean of those of all of its weights."""
        return True

    def group_scores(
        self, scores: Mapping[str, Float[Array, "..."]], densities: Mapping[str, Share] | None
    ) -> dict[str, Float[Array, " channels"]]:
        """The mean score of each channel's weights by set; those that are `-inf` do not count.

        A channel of which all weights are `-inf`, as those of a dropped one are, has the score
        `-inf`.

        **Raises:**

        `ValueError` for scores of other weights than those of the model that it was made of.
        """
        del densities  # which channels compete does not depend on how many are kept
        self._check({name: leaf.shape for name, leaf in scores.items()})
        number = self._size
        wide = {axis.weight: widen(scores[axis.weight]) for axis in self.axes}
        dtype = max((leaf.dtype for leaf in wide.values()), key=lambda dtype: dtype.itemsize)
        totals, counts = jnp.zeros(number, dtype), jnp.zeros(number, dtype)
        for axis in self.axes:
            leaf = wide[axis.weight].astype(dtype)
            barred = leaf == -jnp.inf
            others = tuple(n for n in range(leaf.ndim) if n != axis.axis)
            total = jnp.sum(jnp.where(barred, 0, leaf), axis=others)
            count = jnp.sum(~barred, axis=others, dtype=dtype)
            # An index without a channel is out of range, and dropped.
            channels = self._channels(axis)
            totals = totals.at[channels].add(total, mode="drop")
            counts = counts.at[channels].add(count, mode="drop")
        means = jnp.where(counts > 0, totals / jnp.maximum(counts, 1), -jnp.inf)
        stops = np.cumsum([size for _, size in self.sets])
        return {
            name: means[stop - size : stop]
            for (name, size), stop in zip(self.sets, stops.tolist(), strict=True)
        }

    def masks(
        self, marks: Mapping[str, Bool[Array, " channels"]], shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, Bool[Array, "..."]]:
        """The mask of each weight: it keeps what lies in kept channels along all axes.

        **Arguments:**

        - `marks`: which channels are kept, by set.
        - `shapes`: the shape of each prunable weight by path.
        """
        self._check(shapes)
        kept = jnp.concatenate([*(marks[name] for name, _ in self.sets), jnp.ones(1, bool)])
        found = {name: jnp.ones(shape, bool) for name, shape in shapes.items()}
        for axis in self.axes:
            along = kept[self._channels(axis)]
            mask = found[axis.weight]
            found[axis.weight] = mask & along.reshape(
                [-1 if n == axis.axis else 1 for n in range(mask.ndim)]
            )
        return found

    def marks_of(
        self, masks: Mapping[str, Bool[Array, "..."]]
    ) -> dict[str, Bool[Array, " channels"]]:
        """The channels of which the masks keep a weight."""
        scores = {name: mask.astype(jnp.float32) for name, mask in masks.items()}
        return {name: found > 0 for name, found in self.group_scores(scores, None).items()}

    def pools_of(self, name: str) -> tuple[str, ...]:
        """The sets of which a weight has channels."""
        stops = np.cumsum([size for _, size in self.sets])
        numbers = [axis.numbers for axis in self.axes if axis.weight == name]
        found = {int(n) for one in numbers for n in np.searchsorted(stops, one[one >= 0], "right")}
        return tuple(self.sets[n][0] for n in sorted(found))

    @property
    def _size(self) -> int:
        return sum(size for _, size in self.sets)

    def _channels(self, axis: CoupledAxis) -> np.ndarray:
        """The channel of each index; for none the number of all channels, which no channel has."""
        return np.where(axis.numbers < 0, self._size, axis.numbers)

    def _check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        for axis in self.axes:
            shape = shapes.get(axis.weight, ())
            if axis.axis >= len(shape) or shape[axis.axis] != len(axis.numbers):
                raise ValueError(
                    f"make_mask: the coupled channels are those of another model: {axis.weight} "
                    f"has {len(axis.numbers)} along axis {axis.axis} there, and its shape is "
                    f"{tuple(shape)} here. Make them of this model: coupled_channels(model, x)."
                )
