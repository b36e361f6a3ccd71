"""`effective_sparsity`: which kept weights lie on a path from the input to an output."""

import dataclasses

import numpy as np
from jaxtyping import Array, Shaped

from .._sparse import SparseModel
from ._compact import _given
from ._flow import flow_backwards, flow_forwards
from ._traced import trace


@dataclasses.dataclass(frozen=True)
class EffectiveLayer:
    """A prunable weight.

    Attributes:
        name: its path.
        weights: number of its entries.
        kept: number that are kept.
        on_path: number that are kept and lie on a path from the input to an output.
        units: length of its first axis (outputs of a layer).
        live_units: how many of these have a weight on a path.
    """

    name: str
    weights: int
    kept: int
    on_path: int
    units: int
    live_units: int


@dataclasses.dataclass(frozen=True)
class EffectiveSparsity:
    """The weights of a sparse network that can change an output.

    Attributes:
        layers: one entry for each prunable weight, in the model's order.
    """

    layers: tuple[EffectiveLayer, ...]

    @property
    def density(self) -> float:
        """Share of prunable weights that lie on a path."""
        return self._sum("on_path") / max(self._sum("weights"), 1)

    @property
    def share(self) -> float:
        """Share of kept weights that lie on a path."""
        return self._sum("on_path") / max(self._sum("kept"), 1)

    def _sum(self, name: str) -> int:
        return sum(getattr(layer, name) for layer in self.layers)


def effective_sparsity(
    sparse: SparseModel, x: Shaped[Array | np.ndarray, "n ..."]
) -> EffectiveSparsity:
    """How many of the kept weights lie on a path from the input to an output.

    A weight is on a path where what it multiplies depends on the input, and an output depends on
    what it adds to. A path is followed through the traced program, entry by entry; a convolution
    is taken as a whole over its positions. What a step does that is not known counts as a
    path between all that it reads and writes.

    **Arguments:**

    - `sparse`: a `SparseModel` of any Equinox model of one sample, looked at in inference mode.
    - `x`: inputs `[n, ...]`, of which the first is traced.

    **Returns:**

    An `EffectiveSparsity`.

    **Raises:**

    `ValueError` for what is no `SparseModel`, or inputs that do not suit it.
    """
    x = _given("effective_sparsity", sparse, x)
    traced = trace("effective_sparsity", sparse, x)
    needs = flow_backwards(traced, flow_forwards(traced), paths=True)
    layers = []
    for slot, (name, mask) in enumerate(zip(traced.names, traced.masks, strict=True)):
        if mask is None:
            continue
        found = needs.slots[slot] & mask
        live = found.reshape(len(found), -1).any(axis=1) if found.ndim else found
        sizes = (mask.size, int(mask.sum()), int(found.sum()), int(live.size), int(live.sum()))
        layers.append(EffectiveLayer(name.strip("."), *sizes))
    return EffectiveSparsity(tuple(layers))
