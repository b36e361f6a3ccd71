"""How a density is shared out over the layers."""

import math
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.core import Tracer
from jaxtyping import Array, Float, Int, PyTree

Density: TypeAlias = float | int | Mapping[str, float | int]
"""One density, or one for every layer by its path (`".layers[0].weight"`)."""

Allocation: TypeAlias = Literal["uniform", "erk"]

Share: TypeAlias = float | Float[Array, ""]
"""A density that is known, or one that a schedule gives inside `jit`."""


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
    return allocate_shapes(shapes, density, allocation)


def allocate_shapes(
    shapes: Mapping[str, tuple[int, ...]], density: Density, allocation: Allocation
) -> dict[str, float]:
    """`allocate` for shapes by path."""
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


def densities_of(
    shapes: Mapping[str, tuple[int, ...]], density: Any, allocation: Allocation
) -> dict[str, Share]:
    """`allocate` for shapes by path; one density may be traced."""
    if isinstance(density, Tracer):
        shares = jnp.broadcast_to(jnp.clip(density.astype(jnp.float32), 0.0, 1.0), (len(shapes),))
        if allocation == "erk":
            shares = _traced_erk(list(shapes.values()), shares[0])
        return {name: shares[i] for i, name in enumerate(shapes)}
    return dict(allocate_shapes(shapes, density, allocation))


def whole_counts(shares: Mapping[str, Share], sizes: list[int], together: bool) -> list[Any]:
    """How many of each layer's choices are kept: integers, or int32 scalars for traced shares.

    **Arguments:**

    - `shares`: the density of every layer.
    - `sizes`: how many choices each layer has.
    - `together`: whether the counts shall add up to the rounded sum, as those of ERK do.
    """
    values = list(shares.values())
    if not any(isinstance(value, Tracer) for value in values):
        amounts = [float(d) * size for d, size in zip(values, sizes, strict=True)]
        return (
            round_together(amounts, round(sum(amounts))) if together else list(map(round, amounts))
        )
    amounts = jnp.stack(values) * jnp.asarray(sizes, jnp.float32)
    counts = _traced_round_together(amounts) if together else jnp.round(amounts)
    # nobody can be told of a layer that a schedule empties: it keeps one
    return list(jnp.clip(counts.astype(jnp.int32), 1, jnp.asarray(sizes, jnp.int32)))


def check_density(density: Any, caller: str) -> float:
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


def _traced_erk(shapes: list[tuple[int, ...]], density: Float[Array, ""]) -> Float[Array, " layer"]:
    """`_erdos_renyi_kernel` for a density that is known at run time only."""
    sizes = jnp.asarray([math.prod(shape) for shape in shapes], jnp.float32)
    sums = jnp.asarray([sum(shape) for shape in shapes], jnp.float32)
    raw = sums / sizes

    def scale(dense: Array) -> Array:
        budget = density * jnp.sum(sizes) - jnp.sum(jnp.where(dense, sizes, 0.0))
        left = jnp.sum(jnp.where(dense, 0.0, sums))
        return jnp.where(left > 0, budget / jnp.where(left > 0, left, 1.0), 1.0)

    def freeze_one(_: Array, dense: Array) -> Array:
        over = ~dense & (scale(dense) * raw >= 1.0)
        worst = jnp.argmax(jnp.where(over, raw, -1.0))
        return dense.at[worst].set(dense[worst] | over[worst])

    dense = jax.lax.fori_loop(0, len(shapes), freeze_one, jnp.zeros(len(shapes), bool))
    return jnp.where(dense, 1.0, jnp.clip(scale(dense) * raw, 0.0, 1.0))


def _traced_round_together(amounts: Float[Array, " layer"]) -> Int[Array, " layer"]:
    """`round_together` of amounts that are known at run time only."""
    counts = jnp.floor(amounts)
    more = jnp.round(jnp.sum(amounts)) - jnp.sum(counts)
    order = jnp.argsort(-(amounts - counts), stable=True)
    rank = (
        jnp.zeros(len(amounts), jnp.float32)
        .at[order]
        .set(jnp.arange(len(amounts), dtype=jnp.float32))
    )
    return counts.astype(jnp.int32) + (rank < more).astype(jnp.int32)
