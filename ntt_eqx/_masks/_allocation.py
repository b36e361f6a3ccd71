"""Distribute a density over the layers."""

import math
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from .._types import PyTree

Density: TypeAlias = float | int | Mapping[str, float | int]
"""One density, or one for every layer by its path (`".layers[0].weight"`)."""

Allocation: TypeAlias = Literal["uniform", "erk"]

Share: TypeAlias = float | Float[Array, ""]
"""A density that is known, or one that a schedule gives inside `jit`."""


class StackShape(tuple[int, ...]):
    """The shape of a stack of layers, whose first axes `eqx.filter_vmap` made."""

    one: tuple[int, ...]  # that of one layer

    def __new__(cls, shape: tuple[int, ...], one: tuple[int, ...]) -> "StackShape":
        """Make one from the shape of the whole array and that of one layer."""
        self = super().__new__(cls, shape)
        self.one = one
        return self


def layer_shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
    """The shape of each leaf by its path; of stacked layers of Equinox a `StackShape`."""
    found = {jtu.keystr(p): tuple(leaf.shape) for p, leaf in jtu.tree_leaves_with_path(tree)}
    for path, node in jtu.tree_leaves_with_path(tree, is_leaf=lambda n: bool(_axes(n))):
        for field, axes in _axes(node).items():
            name = f"{jtu.keystr(path)}.{field}"
            if len(found.get(name, ())) > axes:
                found[name] = StackShape(found[name], found[name][-axes:])
    return found


def _axes(node: Any) -> dict[str, int]:
    """How many axes the weights of one layer have, if a node is a layer of Equinox."""
    if isinstance(node, eqx.nn.Linear | eqx.nn.Embedding):
        return {"weight": 2}
    if isinstance(node, eqx.nn.Conv | eqx.nn.ConvTranspose):
        return {"weight": 2 + node.num_spatial_dims}
    if isinstance(node, eqx.nn.GRUCell | eqx.nn.LSTMCell):
        return {"weight_ih": 2, "weight_hh": 2}
    return {}


def allocate(
    tree: PyTree, density: Density, allocation: Allocation = "uniform"
) -> dict[str, float]:
    """The density of every layer.

    - `"uniform"`: the same in all.
    - `"erk"`: Erdős–Rényi kernel (Evci et al., ICML 2020, arXiv 1911.11134): proportional to
      `sum(shape) / prod(shape)`, so that small layers stay denser; a layer that would exceed 1
      stays dense and the others share the rest. The whole network has the given density. Layers
      that `eqx.filter_vmap` stacked have the shares that each would have by itself.

    **Arguments:**

    - `tree`: a mask or score tree.
    - `density`: share of weights to keep, in `(0, 1]`; or a mapping from the path of every layer
      to its own density, which is returned as it is.
    - `allocation`: how one density is shared out.

    **Returns:**

    Densities in `(0, 1]` by path, in tree order.

    **Raises:**

    `ValueError` for a density outside `(0, 1]`, paths that are not those of the layers, or a model.
    """
    if not all(hasattr(leaf, "shape") for leaf in jax.tree.leaves(tree)):
        raise ValueError(
            f"allocate: needs a mask or a score tree, got a {type(tree).__name__} with leaves that "
            "are no arrays; a SparseModel has a mask in `.mask`, `sparsify(model)` makes one."
        )
    return allocate_shapes(layer_shapes(tree), density, allocation)


def allocate_shapes(
    shapes: Mapping[str, tuple[int, ...]],
    density: Density,
    allocation: Allocation,
    most: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """`allocate` for shapes by path; `most` is the highest density of each layer with ERK."""
    if allocation not in ("uniform", "erk"):
        raise ValueError(f"allocate: allocation must be 'uniform' or 'erk', got {allocation!r}.")
    if isinstance(density, Mapping):
        if allocation != "uniform":
            raise ValueError("allocate: densities given per layer leave nothing to allocate.")
        return _in_tree_order(density, shapes)
    density = check_density(density, "allocate")
    if allocation == "erk":
        return _erdos_renyi_kernel(shapes, density, most or dict.fromkeys(shapes, 1.0))
    return dict.fromkeys(shapes, density)


def densities_of(
    shapes: Mapping[str, tuple[int, ...]],
    density: Any,
    allocation: Allocation,
    most: Mapping[str, float] | None = None,
) -> dict[str, Share]:
    """`allocate_shapes`; one density may be traced."""
    if isinstance(density, Tracer):
        shares = jnp.broadcast_to(jnp.clip(density.astype(jnp.float32), 0.0, 1.0), (len(shapes),))
        if allocation == "erk":
            ends = jnp.asarray([1.0 if most is None else most[name] for name in shapes])
            shares = _traced_erk(list(shapes.values()), shares[0], ends.astype(jnp.float32))
        return {name: shares[i] for i, name in enumerate(shapes)}
    return dict(allocate_shapes(shapes, density, allocation, most))


def whole_counts(
    shares: Mapping[str, Share], sizes: list[int], together: bool, density: Any = None
) -> list[Any]:
    """The number of groups that each layer keeps: integers, or int32 scalars for traced shares.

    **Arguments:**

    - `shares`: the density of every layer.
    - `sizes`: the number of groups of each layer.
    - `together`: whether the counts shall add up to the rounded sum, as those of ERK do.
    - `density`: of all choices together, where that is known: the counts add up to it, exactly.
    """
    values = list(shares.values())
    if not any(isinstance(value, Tracer) for value in values):
        amounts = [float(d) * size for d, size in zip(values, sizes, strict=True)]
        if not together:
            return list(map(round, amounts))
        asked, total = sum(sizes) * (density or 0.0), sum(amounts)
        # A sum has errors, by which a half would go the other way; what is capped is no such sum.
        return round_together(amounts, round(asked if abs(asked - total) < 1e-6 else total))
    whole = jnp.asarray(sizes, jnp.int32)
    counts, fraction = exact_product(jnp.stack(values), whole)
    if together:
        total = jnp.sum(counts, dtype=jnp.int32) + jnp.round(jnp.sum(fraction)).astype(jnp.int32)
        if density is not None:
            everything = jnp.asarray([sum(sizes)], jnp.int32)
            total = _round(*exact_product(density[None], everything))[0]
        return list(_rounded_together(counts, fraction, total, whole))
    # nobody can be told of a layer that a schedule empties: it keeps one
    return list(jnp.clip(_round(counts, fraction), 1, whole))


def _round(counts: Int[Array, " layer"], fraction: Float[Array, " layer"]) -> Int[Array, " layer"]:
    """To the nearest integer, halves to the even one, as Python does."""
    up = (fraction > 0.5) | ((fraction == 0.5) & (counts % 2 == 1))
    return counts + up.astype(jnp.int32)


def exact_product(
    shares: Float[Array, " layer"], sizes: Int[Array, " layer"]
) -> tuple[Int[Array, " layer"], Float[Array, " layer"]]:
    """`shares * sizes`, for shares in `[0, 1]`, as its whole part and what is left of it.

    In integers: a product in float32 is off by one from 2^24 entries on. The whole part is exact;
    what is left is so to float32, and exactly 1/2 if and only if the product's is.
    """
    mantissa, exponent = jnp.frexp(jnp.clip(shares.astype(jnp.float32), 0.0, 1.0))
    word = lambda value: jnp.asarray(value, jnp.uint32)
    digits = (mantissa * 2.0**24).astype(jnp.uint32)  # shares = digits · 2^(exponent - 24)
    size = sizes.astype(jnp.uint32)
    # digits · size in two words of 32 bits, from products of halves
    low_half = word(0xFFFF)
    top, bottom = digits >> word(16), digits & low_half
    high, low = size >> word(16), size & low_half
    middle, last = top * low + bottom * high, bottom * low
    lower = last + (middle << word(16))
    upper = top * high + (middle >> word(16)) + (lower < last).astype(jnp.uint32)
    # without 23 of its binary places, which are `more`
    product = (upper << word(9)) | (lower >> word(23))
    more = lower & word(2**23 - 1)
    places = jnp.clip(1 - exponent, 0, 31).astype(jnp.uint32)
    counts = (product >> places).astype(jnp.int32)
    left = product & ((word(1) << places) - word(1))
    scale = (word(1) << places).astype(jnp.float32)
    half = (word(1) << places) >> word(1)
    rest = left.astype(jnp.float32) + more.astype(jnp.float32) * jnp.float32(2.0**-23)
    fraction = jnp.minimum(rest / scale, jnp.float32(1 - 2.0**-24))
    beside = jnp.where(left >= half, jnp.float32(0.5 + 2.0**-24), jnp.float32(0.5 - 2.0**-25))
    exact = (left == half) & (more == word(0)) & (places > 0)
    fraction = jnp.where((fraction == 0.5) & ~exact, beside, fraction)
    tiny = 1 - exponent > 31  # shares below 2^-31: less than one of any layer
    none = tiny | (shares <= 0)
    return jnp.where(none, 0, counts), jnp.where(none, jnp.float32(0), fraction)


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


def _raw_share(shape: tuple[int, ...]) -> float:
    """`sum(shape) / prod(shape)` of a layer; a scalar counts as one axis of length 1."""
    one = shape.one if isinstance(shape, StackShape) else shape
    return (sum(one) or 1) / math.prod(one)


def _erdos_renyi_kernel(
    shapes: Mapping[str, tuple[int, ...]], density: float, most: Mapping[str, float]
) -> dict[str, float]:
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    raw = {name: _raw_share(shape) for name, shape in shapes.items()}
    full: set[str] = set()
    while True:
        # scale · Σ raw·size over the other layers = what the full layers leave of the budget
        budget = density * sum(sizes.values()) - sum(most[name] * sizes[name] for name in full)
        sparse = [name for name in shapes if name not in full]
        if not sparse:
            return dict(most)
        scale = budget / sum(raw[name] * sizes[name] for name in sparse)
        over = [name for name in sparse if scale * raw[name] >= most[name]]
        if not over:
            return {name: most[name] if name in full else scale * raw[name] for name in shapes}
        # the layer that exceeds its most by most first: freezing it changes the others' scale
        full.add(max(over, key=lambda name: raw[name] / most[name]))


def _traced_erk(
    shapes: list[tuple[int, ...]], density: Float[Array, ""], most: Float[Array, " layer"]
) -> Float[Array, " layer"]:
    """`_erdos_renyi_kernel` for a density that is known at run time only."""
    sizes = jnp.asarray([math.prod(shape) for shape in shapes], jnp.float32)
    raw = jnp.asarray([_raw_share(shape) for shape in shapes], jnp.float32)
    # not raw * sizes, which float32 would round where these are whole numbers
    sums = jnp.asarray([_raw_share(shape) * math.prod(shape) for shape in shapes], jnp.float32)

    def scale(full: Array) -> Array:
        budget = density * jnp.sum(sizes) - jnp.sum(jnp.where(full, most * sizes, 0.0))
        left = jnp.sum(jnp.where(full, 0.0, sums))
        return jnp.where(left > 0, budget / jnp.where(left > 0, left, 1.0), 1.0)

    def freeze_one(_: Array, full: Array) -> Array:
        over = ~full & (scale(full) * raw >= most)
        worst = jnp.argmax(jnp.where(over, raw / most, -1.0))
        return full.at[worst].set(full[worst] | over[worst])

    full = jax.lax.fori_loop(0, len(shapes), freeze_one, jnp.zeros(len(shapes), bool))
    return jnp.where(full, most, jnp.clip(scale(full) * raw, 0.0, most))


def _rounded_together(
    counts: Int[Array, " layer"],
    fraction: Float[Array, " layer"],
    total: Int[Array, ""],
    sizes: Int[Array, " layer"],
) -> Int[Array, " layer"]:
    """`round_together` of amounts that are known at run time only, at least one in each layer."""
    rising = jnp.argsort(fraction, stable=True)
    falling = jnp.argsort(-fraction, stable=True)

    def unfinished(state: tuple[Array, Array]) -> Array:
        counts, moved = state
        return moved & (total != jnp.sum(counts, dtype=jnp.int32))

    def one_each(state: tuple[Array, Array]) -> tuple[Array, Array]:
        counts, _ = state
        missing = total - jnp.sum(counts, dtype=jnp.int32)
        order = jnp.where(missing > 0, falling, rising)
        room = jnp.where(missing > 0, counts < sizes, counts > 1)[order]
        chosen = room & (jnp.cumsum(room, dtype=jnp.int32) <= jnp.abs(missing))
        change = jnp.sign(missing) * chosen.astype(jnp.int32)
        return counts.at[order].add(change), chosen.any()

    # nobody can be told of a layer that a schedule empties: it keeps one
    start = jnp.clip(counts, 1, sizes), jnp.ones((), bool)
    return jax.lax.while_loop(unfinished, one_each, start)[0]
