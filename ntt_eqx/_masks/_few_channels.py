"""`FewChannels`: single weights, all of them between a part of a network's channels."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, Float

from .._types import MaskTree
from ._allocation import Allocation, Share, densities_of
from ._pattern import AbstractPattern


@dataclasses.dataclass(frozen=True)
class ChosenIndices:
    """The indices along one axis of a weight that belong to the part.

    Attributes:
        weight: path of the weight.
        axis: the axis.
        size: its length.
        indices: int32, ascending, as bytes: these hash and compare fast.
    """

    weight: str
    axis: int
    size: int
    indices: bytes = dataclasses.field(repr=False)

    @property
    def numbers(self) -> np.ndarray:
        """`indices` as an array."""
        return np.frombuffer(self.indices, np.int32)


class FewChannels(AbstractPattern):
    """Keep single weights, all of them between a part of the network's channels.

    Channels are the units of hidden layers and the filters of convolutions. The network's inputs
    and outputs all take part. `few_channels(model, x, share, key=key)` draws a part of the channels
    at random. Masks, refreshes of transfers and of trainings stay within it, and `compact` leaves
    the rest of the network out.

    A density counts the weights of whole layers, as without a pattern, so that masks on few
    channels have as many weights as others. ERK shares are those of whole layers, too. A layer of
    which the part has fewer weights keeps all of these, and the others share the rest. (By the
    shapes of the part ERK gives later layers fewer weights: LeNet-300-100 at 1 % on a sixth of its
    units, MNIST, seed 0: 92.8 % instead of 93.8 % with random masks, 93.7 % instead of 95.5 % after
    transfers.)

    Attributes:
        chosen: the part's indices along each axis that has channels.
        whole: path and shape of each whole weight, where the masks are those of the part alone; see
            `inside`.
    """

    chosen: tuple[ChosenIndices, ...] = eqx.field(static=True)
    whole: tuple[tuple[str, tuple[int, ...]], ...] = eqx.field(static=True, default=())

    def __check_init__(self) -> None:
        """Reject a model instead of its channels."""
        if not isinstance(self.chosen, tuple):
            raise ValueError(
                f"FewChannels: chosen must be a tuple, got {type(self.chosen).__name__}; "
                "few_channels(model, x, share, key=key) makes the pattern of a model."
            )

    @classmethod
    def of_mask(cls, mask: MaskTree) -> "FewChannels":
        """The part that a concrete mask of whole channels keeps, as `CoupledChannels` makes it.

        **Raises:**

        `ValueError` for a mask that keeps other weights than all between some outputs and inputs.
        """
        chosen = []
        for path, leaf in jtu.tree_leaves_with_path(mask):
            kept, name = np.asarray(leaf), jtu.keystr(path)
            axes = range(kept.ndim)
            along = [kept.any(tuple(n for n in axes if n != axis)) for axis in axes]
            if not kept.any() or not (kept == _product(along)).all():
                raise ValueError(
                    f"FewChannels: the mask of {name} is not made of whole channels; make it by "
                    "Sparsity(share, pattern=coupled_channels(model, x))."
                )
            for axis, used in enumerate(along):
                if not used.all():
                    indices = np.flatnonzero(used).astype(np.int32).tobytes()
                    chosen.append(ChosenIndices(name, axis, kept.shape[axis], indices))
        return cls(tuple(chosen))

    def inside(self, whole: MaskTree, part: MaskTree) -> "FewChannels":
        """The pattern for a network that is hardly more than the part: the same counts and places.

        **Arguments:**

        - `whole`: a mask of the whole network, of which the shapes count.
        - `part`: the mask of the smaller network that keeps all weights of the part, `model.mask`
          of the `Compacted`. Where the model fixes the number of some channels that is not every
          weight which it has.

        **Raises:**

        `ValueError` for a `part` that is not made of whole channels.
        """
        named = jtu.tree_leaves_with_path(whole)
        shapes = tuple((jtu.keystr(path), tuple(m.shape)) for path, m in named)
        return FewChannels(FewChannels.of_mask(part).chosen, shapes)

    def __repr__(self) -> str:
        """Short: the channels of a network may be thousands."""
        shares = [len(one.numbers) / one.size for one in self.chosen]
        if not shares:
            return "FewChannels(inside)"
        return f"FewChannels({len(shares)} axes, up to {max(shares):.3g} of each)"

    def densities(
        self, shapes: Mapping[str, tuple[int, ...]], density: Any, allocation: Allocation
    ) -> dict[str, Share]:
        """The density of each layer, as a share of all of its weights.

        The part may have fewer weights than a density of the whole network asks for.
        """
        self._check(shapes)
        inner = {name: self._part(name, shape) for name, shape in shapes.items()}
        shapes = self._whole(shapes)
        most = {name: math.prod(inner[name]) / math.prod(shapes[name]) for name in shapes}
        if isinstance(density, float | int):
            # More than the whole part is told with the counts, which then exceed every layer's.
            size = {name: math.prod(shape) for name, shape in shapes.items()}
            over = density * sum(size.values()) / sum(most[name] * size[name] for name in size)
            if allocation == "erk" and over > 1:
                return {name: over * share for name, share in most.items()}
        return densities_of(shapes, density, allocation, most)

    def group_scores(
        self, scores: Mapping[str, Float[Array, "..."]], densities: Mapping[str, Share] | None
    ) -> dict[str, Float[Array, "..."]]:
        """The scores of the part's weights of each layer.

        **Raises:**

        `ValueError` for scores of other weights than those of the model that it was made of.
        """
        del densities  # the part is the same at every density
        return self._of_part(scores)

    def totals(
        self, shapes: Mapping[str, tuple[int, ...]], groups: Mapping[str, int]
    ) -> dict[str, int]:
        """The number of all weights of each layer."""
        return {name: math.prod(self._whole(shapes)[name]) for name in groups}

    def masks(
        self, marks: Mapping[str, Bool[Array, "..."]], shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, Bool[Array, "..."]]:
        """The marks of the part's weights, and no other weight."""
        found = {}
        for name, shape in shapes.items():
            places = [np.arange(size) for size in shape]
            for one in self.chosen:
                if one.weight == name:
                    places[one.axis] = one.numbers
            found[name] = jnp.zeros(shape, bool).at[np.ix_(*places)].set(marks[name])
        return found

    def marks_of(self, masks: Mapping[str, Bool[Array, "..."]]) -> dict[str, Bool[Array, "..."]]:
        """The entries of the masks that lie in the part, by layer."""
        return self._of_part(masks)

    def pools_of(self, name: str) -> tuple[str, ...]:
        """The layer itself."""
        return (name,)

    def keeps_count(self, shape: tuple[int, ...]) -> bool:
        """Single weights are kept, as many as the density says."""
        return True

    def _of_part(self, leaves: Mapping[str, Array]) -> dict[str, Array]:
        """The entries of each weight that lie in the part."""
        self._check({name: leaf.shape for name, leaf in leaves.items()})
        found = dict(leaves)
        for one in self.chosen:
            found[one.weight] = jnp.take(found[one.weight], one.numbers, axis=one.axis)
        return found

    def _whole(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """The shapes of whole weights."""
        known = dict(self.whole)
        return {name: known.get(name, shape) for name, shape in shapes.items()}

    def _part(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a weight's part."""
        sizes = list(shape)
        for one in self.chosen:
            if one.weight == name:
                sizes[one.axis] = len(one.numbers)
        return tuple(sizes)

    def _check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        for one in self.chosen:
            shape = shapes.get(one.weight, ())
            if one.axis >= len(shape) or shape[one.axis] != one.size:
                raise ValueError(
                    f"make_mask: the few channels are those of another model: {one.weight} has "
                    f"{one.size} along axis {one.axis} there, and its shape is {tuple(shape)} "
                    "here. Make them of this model: few_channels(model, x, key=key)."
                )


def _product(along: Sequence[Any]) -> np.ndarray:
    """The mask of all entries whose index along every axis is kept."""
    found = np.ones((), bool)
    for used in along:
        found = found[..., None] & used
    return found
