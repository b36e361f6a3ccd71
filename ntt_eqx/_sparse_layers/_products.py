"""Products with a matrix of which only the kept entries exist.

`W` is a matrix `[I, J]` whose entries `v[e]` stand at `(i[e], j[e])`; `x [J, B]` and `y [I, B]` are
features first, batch last:

    product             y[i, b] = sum over e with i[e] = i of v[e] x[j[e], b]
    product, transposed x[j, b] = sum over e with j[e] = j of v[e] y[i[e], b]
    sampled             v[e]    = sum over b of y[i[e], b] x[j[e], b]

Each is linear in both of its arguments, and the derivatives of one are the others: the three are
closed under derivatives of every order, and none forms a matrix. They are primitives, because
only a primitive can say what `vmap` does in both orders: the product of a vmapped layer is *one*
product with all samples side by side, whose gradient by `v` is one sum over the samples
(`custom_vjp` would form the gradient of every sample), and `vmap` of `grad` is still exact.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex_core
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

from .._types import wide_dtype
from ..kernels.manual_axes import like_varying, varying_alike
from ._index import SLOTS, AbstractIndex, Group
from ._shared_index import SharedIndex
from ._sorted_index import SortedIndex
from ._sorted_products import sorted_product, sorted_sampled

# Fewer samples than these are summed one by one.
_FEW = 16
# Samples that are taken together: what is gathered from stays in cache. Of a sampled product they
# are fewer, for it writes what it sums over: 64 take 0.18 ms where 128 at once take 0.5 (300 x 784
# at 3 %).
_BLOCK, _SAMPLED_BLOCK = 128, 64


def product(
    values: Float[Array, " kept"],
    x: Float[Array, "j *batch"],
    index: AbstractIndex,
    *,
    transposed: bool = False,
) -> Float[Array, "i *batch"]:
    """The matrix with these kept entries, or its transpose, times `x` over its first axis."""
    leaves, structure = jax.tree.flatten(index)
    values, flat = varying_alike(values, x.reshape(x.shape[0], math.prod(x.shape[1:])))
    y = _product.bind(values, flat, *leaves, structure=structure, transposed=transposed)
    return y.reshape(y.shape[0], *x.shape[1:])


def _computed_product(
    values: Array, x: Array, *leaves: Array, structure: Any, transposed: bool
) -> Array:
    index = jax.tree.unflatten(structure, leaves)
    if isinstance(index, SharedIndex):
        return _shared_product(values, x, index, transposed)
    side = index.columns if transposed else index.rows
    wide = _wide(x.dtype)
    if isinstance(index, SortedIndex):
        of = lambda x: sorted_product(values.astype(wide), x.astype(wide), side).astype(x.dtype)
        return _in_blocks(of, x)
    slots = [_filled(values.astype(wide), group.entries) for group in side.groups]

    def of(x: Array) -> Array:
        parts = [
            _rows_of(v, x.astype(wide), group) for v, group in zip(slots, side.groups, strict=True)
        ]
        if side.empty or not parts:
            parts.append(like_varying(jnp.zeros((1, x.shape[1]), wide), [x]))
        return _at(jnp.concatenate(parts), side.place).astype(x.dtype)

    return _in_blocks(of, x)


def _in_blocks(of: Callable[[Array], Array], x: Array) -> Array:
    """A product with `x`, some samples at a time."""
    whole, rest = _blocks(x, _BLOCK)
    if whole is None:
        return of(rest)
    y = lax.map(of, whole).swapaxes(0, 1)
    y = y.reshape(y.shape[0], whole.shape[0] * _BLOCK)
    return jnp.concatenate([y, of(rest)], axis=1)


def _rows_of(values: Array, x: Array, group: Group) -> Array:
    """The rows of a group, several slots at a time, for which sums are stored once."""
    slots, rows = values.shape

    def step(y: Array, part: tuple[Array, Array]) -> tuple[Array, None]:
        for v, other in zip(*part, strict=True):
            y = y + v[:, None] * _at(x, other)
        return y, None

    y = like_varying(jnp.zeros((rows, x.shape[1]), x.dtype), [x])
    whole = slots // SLOTS * SLOTS
    if whole:
        chunks = lambda a: a[:whole].reshape(-1, SLOTS, rows)
        y, _ = lax.scan(step, y, (chunks(values), chunks(group.others)))
    return step(y, (values[whole:], group.others[whole:]))[0]


def _computed_sampled(y: Array, x: Array, *leaves: Array, structure: Any) -> Array:
    index = jax.tree.unflatten(structure, leaves)
    wide = _wide(x.dtype)
    if isinstance(index, SharedIndex):
        return _shared_sampled(y.astype(wide), x.astype(wide), index).astype(x.dtype)
    sums = _sums_of_few if x.shape[1] < _FEW else _sums_of_many

    def of(y: Array, x: Array) -> Array:
        y, x = y.astype(wide), x.astype(wide)
        if isinstance(index, SortedIndex):
            return sorted_sampled(y, x, index)
        parts = [sums(_at(y, g.rows), x, g.others).reshape(-1) for g in index.rows.groups]
        return jnp.concatenate([*parts, jnp.zeros(0, wide)])

    narrow = x.dtype
    (ys, y), (xs, x) = _blocks(y, _SAMPLED_BLOCK), _blocks(x, _SAMPLED_BLOCK)
    total = of(y, x)
    if ys is not None and xs is not None:
        total, _ = lax.scan(lambda total, block: (total + of(*block), None), total, (ys, xs))
    return _at(total, index.order).astype(narrow)


def _shared_product(values: Array, x: Array, index: SharedIndex, transposed: bool) -> Array:
    """One dense product for each group of rows, of the inputs that they share."""
    wide = _wide(x.dtype)
    x, narrow = x.astype(wide), x.dtype
    weights = _filled(values.astype(wide), index.entries)  # [groups, rows, inputs]
    product = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
    if not transposed:
        y = product("ghk,gkb->ghb", weights, _at(x, index.inputs))
        return y.reshape(-1, x.shape[1])[: index.shape[0]].astype(narrow)
    parts = product("ghk,ghb->gkb", weights, _by_group(x, index))
    parts = parts.reshape(-1, x.shape[1])
    ones = jnp.ones(index.tiles, wide)
    sums = [_rows_of(_filled(ones, g.entries), parts, g) for g in index.columns.groups]
    sums.append(like_varying(jnp.zeros((1, x.shape[1]), wide), [x]))
    return _at(jnp.concatenate(sums), index.columns.place).astype(narrow)


def _shared_sampled(y: Array, x: Array, index: SharedIndex) -> Array:
    product = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
    found = product("ghb,gkb->ghk", _by_group(y, index), _at(x, index.inputs))
    return _at(found.reshape(-1), index.order)


def _by_group(y: Array, index: SharedIndex) -> Array:
    """Rows `[I, B]` as `[groups, height, B]`."""
    groups, height, _ = index.entries.shape
    missing = groups * height - len(y)
    return jnp.pad(y, ((0, missing), (0, 0))).reshape(groups, height, y.shape[1])


def _sums_of_few(y: Array, x: Array, others: Array) -> Array:
    total = like_varying(jnp.zeros(others.shape, x.dtype), [x])
    for b in range(x.shape[1]):
        total = total + y[None, :, b] * _at(x[:, b], others)
    return total


def _sums_of_many(y: Array, x: Array, others: Array) -> Array:
    """One slot of all rows after the other.

    The sum over samples is a product with ones, which stays in vector registers; XLA's own sums
    over the last axis are scalar on a CPU.
    """
    ones = jnp.ones(x.shape[1], x.dtype)
    one = lambda other: jnp.dot(y * _at(x, other), ones, precision=lax.Precision.HIGHEST)
    return lax.map(one, others)


def _blocks(x: Array, size: int) -> tuple[Array | None, Array]:
    """Samples `[J, B]` as blocks `[n, J, size]` and the rest; without blocks where they are few."""
    batch = x.shape[1]
    count = (batch - 1) // size
    if count < 1:
        return None, x
    blocks = x[:, : count * size].reshape(x.shape[0], count, size).swapaxes(0, 1)
    return blocks, x[:, count * size :]


def _at(x: Array, rows: Array) -> Array:
    return x.at[rows].get(mode="promise_in_bounds", wrap_negative_indices=False)


def _filled(values: Array, entries: Array) -> Array:
    return values.at[entries].get(mode="fill", fill_value=0, wrap_negative_indices=False)


def _wide(dtype: Any) -> Any:
    """The dtype of sums."""
    return dtype if jnp.issubdtype(dtype, jnp.complexfloating) else wide_dtype(dtype)


def _shape_of_product(
    values: Any, x: Any, *leaves: Any, structure: Any, transposed: bool
) -> ShapedArray:
    rows, columns = jax.tree.unflatten(structure, leaves).shape
    shape = (columns if transposed else rows, x.shape[1])
    return ShapedArray(shape, x.dtype, manual_axis_type=x.manual_axis_type)


def _shape_of_sampled(y: Any, x: Any, *leaves: Any, structure: Any) -> ShapedArray:
    kept = jax.tree.unflatten(structure, leaves).kept
    return ShapedArray((kept,), x.dtype, manual_axis_type=x.manual_axis_type)


def _tangent(primitive: Any) -> Callable[..., Any]:
    """The tangent of a product of two arrays, linear in each."""

    def jvp(primals: Sequence[Any], tangents: Sequence[Any], **params: Any) -> Any:
        one, two, *index = primals
        terms = []
        if type(tangents[0]) is not ad.Zero:
            terms.append(primitive.bind(tangents[0], two, *index, **params))
        if type(tangents[1]) is not ad.Zero:
            terms.append(primitive.bind(one, tangents[1], *index, **params))
        return primitive.bind(one, two, *index, **params), functools.reduce(ad.add_tangents, terms)

    return jvp


def _transposed_product(
    y: Any, values: Any, x: Any, *index: Any, structure: Any, transposed: bool
) -> list[Any]:
    none = [None] * len(index)
    if ad.is_undefined_primal(values):
        pair = (x, y) if transposed else (y, x)
        return [_sampled.bind(*pair, *index, structure=structure), None, *none]
    params = {"structure": structure, "transposed": not transposed}
    return [None, _product.bind(values, y, *index, **params), *none]


def _transposed_sampled(values: Any, y: Any, x: Any, *index: Any, structure: Any) -> list[Any]:
    none = [None] * len(index)
    of = lambda a, transposed: _product.bind(
        values, a, *index, structure=structure, transposed=transposed
    )
    if ad.is_undefined_primal(y):
        return [of(x, False), None, *none]
    return [None, of(y, True), *none]


def _batched_product(arguments: Sequence[Any], axes: Sequence[Any], **params: Any) -> Any:
    values, x, *index = arguments
    if any(axis is not None for axis in (axes[0], *axes[2:])):
        return _one_by_one(_product, arguments, axes, params)
    x = jnp.moveaxis(x, axes[1], 1)
    flat = x.reshape(x.shape[0], x.shape[1] * x.shape[2])
    y = _product.bind(values, flat, *index, **params)
    return y.reshape(y.shape[0], *x.shape[1:]), 1


def _batched_sampled(arguments: Sequence[Any], axes: Sequence[Any], **params: Any) -> Any:
    y, x, *index = arguments
    if any(axis is not None for axis in axes[2:]) or x.shape[-1] >= _FEW:
        return _one_by_one(_sampled, arguments, axes, params)
    of = lambda y, x: _computed_sampled(y, x, *index, **params)
    return jax.vmap(of, in_axes=tuple(axes[:2]))(y, x), 0


def _one_by_one(
    primitive: Any, arguments: Sequence[Any], axes: Sequence[Any], params: dict[str, Any]
) -> Any:
    """One product after the other: of several matrices there is no product that is faster."""
    is_batched = [axis is not None for axis in axes]
    batched = [jnp.moveaxis(a, n, 0) for a, n in zip(arguments, axes, strict=True) if n is not None]

    def one(parts: list[Array]) -> Array:
        left = iter(parts)
        each = zip(is_batched, arguments, strict=True)
        return primitive.bind(*(next(left) if b else a for b, a in each), **params)

    return lax.map(one, batched), 0


_product = jex_core.Primitive("sparse_product")
_sampled = jex_core.Primitive("sparse_sampled_product")
for _primitive, _computed, _shape, _transpose, _batch in (
    (_product, _computed_product, _shape_of_product, _transposed_product, _batched_product),
    (_sampled, _computed_sampled, _shape_of_sampled, _transposed_sampled, _batched_sampled),
):
    _static = tuple(name for name in ("structure", "transposed") if name in _shape.__annotations__)
    _primitive.def_impl(jax.jit(_computed, static_argnames=_static))
    _primitive.def_abstract_eval(_shape)
    mlir.register_lowering(_primitive, mlir.lower_fun(_computed, multiple_results=False))
    ad.primitive_jvps[_primitive] = _tangent(_primitive)
    ad.primitive_transposes[_primitive] = _transpose
    batching.primitive_batchers[_primitive] = _batch
