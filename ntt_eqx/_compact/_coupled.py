"""`coupled_channels`: which channels of which layers go together, found on a model's program.

`few_channels`: a part of them, drawn at random.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, PRNGKeyArray, Shaped

from .._batch import as_array
from .._checks import check_batch, check_key
from .._masks import CoupledAxis, CoupledChannels, FewChannels, make_mask
from .._sparse import SparseModel, sparsify
from ._axes import Units
from ._traced import trace


def coupled_channels(model: Any, x: Shaped[Array | np.ndarray, "n ..."]) -> CoupledChannels:
    """The channels of a model that can go as a whole, as a pattern for masks.

    They are found on the program of one sample, as `compact` finds them: through residual sums,
    concatenation, flattening, pooling and batch norm. The network's inputs and outputs stay, and so
    do channels of which the program needs all: those that layer norm averages over, heads of
    attention, groups of a convolution.

    **Arguments:**

    - `model`: any Equinox model of one sample, or a `SparseModel`, whose masked leaves are then the
      prunable weights.
    - `x`: inputs `[n, ...]`; the first is used.

    **Returns:**

    A `CoupledChannels`, for `Sparsity`, `make_mask` and `prune`.

    **Raises:**

    `ValueError` for a model without such channels, or inputs that do not suit it.
    """
    sparse = model if isinstance(model, SparseModel) else sparsify(model)
    check_batch("coupled_channels: x", x := as_array("coupled_channels", "x", x))
    traced = trace("coupled_channels", sparse, x)
    units = Units(traced, fragile=False)
    axes = [
        (slot, axis, units.root(labels))
        for slot, mask in enumerate(traced.masks)
        if mask is not None
        for axis, labels in enumerate(units.labels[slot])
    ]
    # Channels that occur along the same axes form a set: they compete for its density.
    places: dict[int, list[tuple[int, int]]] = {}
    for slot, axis, roots in axes:
        for root in np.unique(roots).tolist():
            if root not in units.reasons:
                places.setdefault(root, []).append((slot, axis))
    sets: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for root, where in places.items():
        sets.setdefault(tuple(where), []).append(root)
    # One weight alone either makes or reads a channel: padding that a layer reads, for example.
    sets = {where: roots for where, roots in sets.items() if len(where) > 1 and len(roots) > 1}
    numbers = {root: n for n, root in enumerate(r for roots in sets.values() for r in roots)}
    firsts = [traced.names[where[0][0]] for where in sets]
    again = [firsts[:n].count(path) for n, path in enumerate(firsts)]
    names = [path if n == 0 else f"{path} ({n + 1})" for path, n in zip(firsts, again, strict=True)]
    found = []
    for slot, axis, roots in axes:
        along = np.array([numbers.get(root, -1) for root in roots.tolist()], np.int32)
        if (along >= 0).any():
            found.append(CoupledAxis(traced.names[slot], axis, along.tobytes()))
    sizes = map(len, sets.values())
    return CoupledChannels(tuple(zip(names, sizes, strict=True)), tuple(found))


def few_channels(
    model: Any,
    x: Shaped[Array | np.ndarray, "n ..."],
    share: float | Mapping[str, float] = 1 / 6,
    *,
    key: PRNGKeyArray,
) -> FewChannels:
    """A part of a model's channels, drawn at random, as a pattern: masks keep weights between them.

    The same share is drawn of every set of channels that go together (see `coupled_channels`).

    **Arguments:**

    - `model`: any Equinox model of one sample, or a `SparseModel`, whose masked leaves are then the
      prunable weights.
    - `x`: inputs `[n, ...]`; the first is used.
    - `share`: the share of the channels, in `(0, 1]`; or a mapping from every set to its own.
    - `key`: the PRNG key.

    **Returns:**

    A `FewChannels`, for `Sparsity`, `make_mask` and `prune`.

    **Raises:**

    `ValueError` for a model without such channels, for inputs that do not suit it, and for a share
    that is out of range or leaves a set without a channel.
    """
    check_key("few_channels", key)
    sparse = model if isinstance(model, SparseModel) else sparsify(model)
    pattern = coupled_channels(sparse, x)
    drawn = iter(jax.random.split(key, len(jax.tree.leaves(sparse.mask))))
    scores = jax.tree.map(lambda m: jax.random.uniform(next(drawn), m.shape), sparse.mask)
    return FewChannels.of_mask(make_mask(scores, share, pattern=pattern))
