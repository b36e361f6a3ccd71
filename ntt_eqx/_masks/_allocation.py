"""How a density is shared out over the layers."""

import math
from collections.abc import Mapping
from typing import Literal, TypeAlias

import jax.tree_util as jtu
from jaxtyping import PyTree

Density: TypeAlias = float | int | Mapping[str, float | int]
"""One density, or one for every layer by its path (`".layers[0].weight"`)."""

Allocation: TypeAlias = Literal["uniform", "erk"]


def allocate(
    tree: PyTree, density: Density, allocation: Allocation = "uniform"
) -> dict[str, float]:
    """The density of every layer.

    - `"uniform"`: the same in all.
    - `"erk"`: Erdős–Rényi kernel (Evci et al., ICML 2020, arXiv 1911.11134): proportional to
      `sum(shape) / prod(shape)`, so that small layers stay denser; a layer that would exceed 1
      stays dense and the others share the rest. The whole network has the given density.

    **Arguments:**

    - `tree`: a mask or score tree.
    - `density`: share of weights to keep, in `(0, 1]`; or a mapping from the path of every layer
      to its own density, which is returned as it is.
    - `allocation`: how one density is shared out.

    **Returns:**

    Densities in `(0, 1]` by path, in tree order.

    **Raises:**

    `ValueError` for a density outside `(0, 1]`, or paths that are not those of the layers.
    """
    named = jtu.tree_leaves_with_path(tree)
    shapes = {jtu.keystr(path): tuple(leaf.shape) for path, leaf in named}
    if allocation not in ("uniform", "erk"):
        raise ValueError(f"allocate: allocation must be 'uniform' or 'erk', got {allocation!r}.")
    if isinstance(density, Mapping):
        if allocation != "uniform":
            raise ValueError("allocate: densities given per layer leave nothing to allocate.")
        return _in_tree_order(density, shapes)
    density = check_density(density, "allocate")
    if allocation == "erk":
        return _erdos_renyi_kernel(shapes, density)
    return dict.fromkeys(shapes, density)


def check_density(density: float | int, caller: str) -> float:
    """The density as a Python float.

    **Raises:**

    `ValueError` when it is not a number in `(0, 1]` that is known before tracing.
    """
    try:
        value = math.nan if isinstance(density, bool | str | bytes) else float(density)
    except Exception:  # whatever it is, and tracers have their own errors, it is no number
        value = math.nan
    if not 0.0 < value <= 1.0:
        raise ValueError(f"{caller}: density must be a number in (0, 1], got {density!r}.")
    return value


def round_together(amounts: list[float], total: int) -> list[int]:
    """Round to integers that add up to `total`: largest remainders first, ties to the first."""
    counts = [math.floor(amount) for amount in amounts]
    remainders = [amount - count for amount, count in zip(amounts, counts, strict=True)]
    order = sorted(range(len(amounts)), key=lambda i: -remainders[i])
    for i in order[: total - sum(counts)]:
        counts[i] += 1
    return counts


def _in_tree_order(
    density: Mapping[str, float | int], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, float]:
    missing, unknown = set(shapes) - set(density), set(density) - set(shapes)
    if missing or unknown:
        raise ValueError(
            "allocate: densities by layer must name every layer and no other; "
            f"missing {sorted(missing)}, unknown {sorted(unknown)}."
        )
    return {name: check_density(density[name], f"allocate: {name}") for name in shapes}


def _erdos_renyi_kernel(shapes: Mapping[str, tuple[int, ...]], density: float) -> dict[str, float]:
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    raw = {name: sum(shape) / sizes[name] for name, shape in shapes.items()}
    dense: set[str] = set()
    while True:
        # scale · Σ raw·size over the sparse layers = what the dense layers leave of the budget
        budget = density * sum(sizes.values()) - sum(sizes[name] for name in dense)
        sparse = [name for name in shapes if name not in dense]
        if not sparse:
            return dict.fromkeys(shapes, 1.0)
        scale = budget / sum(raw[name] * sizes[name] for name in sparse)
        full = [name for name in sparse if scale * raw[name] >= 1.0]
        if not full:
            return {name: 1.0 if name in dense else scale * raw[name] for name in shapes}
        # the layer that exceeds 1 by most first: freezing it changes the scale of the others
        dense.add(max(full, key=raw.__getitem__))
