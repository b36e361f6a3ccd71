"""Evaluate one equation of a jaxpr, by an equivalent if XLA's own version is slow or inexact.

On a CPU, XLA's convolutions and the gradients of its pooling windows are many times slower than the
same sums as slices and matrix products. On accelerators XLA's own are better, with one exception:
for the gradient of a convolution's weight on a GPU, XLA takes cuDNN's fastest algorithm, whose
error may be 1e-3 even if full float32 is requested. The equivalents have the same values and the
same derivatives of every order (the one on a GPU in reverse mode alone), also for ties in a
maximum, where the first entry of a window wins.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from ._program import bind, read, run, unfold
from ._types import PyTree
from .kernels import block_size, map_blocks, target_device
from .kernels.manual_axes import like_varying, varying_alike

# Up to this window size a GPU takes all slices at once; each is a case of one kernel.
_MOST_TAPS = 32
_FLOAT32 = (lax.Precision.HIGHEST, lax.Precision.HIGHEST)
_CONVOLUTION, _MAXIMUM = _EQUIVALENTS = ("conv_general_dilated", "reduce_window_max")
# Bytes of patches of a whole batch beyond which XLA convolves. From JAX 0.12 on it is faster itself
# for large images: a step of Conv-4 takes 113 ms against 136; before, 228 against 122.
_LARGEST = 2**24 if jax.__version_info__ >= (0, 12) else math.inf
# Products per entry of an image (features times window) from which the patches of a whole batch are
# faster: 1.05 to 1.15 times faster at 144 and 288 (ResNet-20), 1.9 at 576 (Conv-4), 6
# at 4,608 (VGG-11).
_FEWEST = 100


def with_equivalents(function: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """Replace the primitives of a function of arrays by their faster equivalents.

    For functions of whole batches under `jit`. Convolutions whose patches are slower or too large
    stay as they are, and so do the bodies of loops and of `jax.checkpoint`.
    """

    def call(*arguments: PyTree) -> PyTree:
        platform = target_device().platform
        if platform != "cpu":
            return function(*arguments)
        closed, shape = jax.make_jaxpr(function, return_shape=True)(*arguments)
        program = unfold(closed, lambda eqn: eqn.primitive.name in ("jit", "pjit"))
        if not any(step.name in _EQUIVALENTS for step in program.steps):
            return function(*arguments)

        def evaluate(eqn: Any, inputs: Sequence[Any]) -> list[Any]:
            left = eqn.primitive.name == _CONVOLUTION and not _pays(eqn)
            return bind(eqn, inputs) if left else apply_primitive(eqn, inputs, platform)

        values, _ = run(
            program,
            dict(enumerate(jax.tree.leaves(arguments))),
            range(len(program.steps)),
            evaluate,
        )
        out = [read(values, slot) for slot in program.outputs]
        return jax.tree.unflatten(jax.tree.structure(shape), out)

    return call


def apply_primitive(eqn: Any, inputs: Sequence[Any], platform: str) -> list[Array]:
    """The outputs of `eqn` for concrete or traced `inputs`, computed on a platform."""
    if eqn.primitive.name not in _EQUIVALENTS or _is_empty(eqn):
        return bind(eqn, inputs)
    if eqn.primitive.name == _CONVOLUTION and eqn.params["batch_group_count"] == 1:
        if platform == "cpu":
            return [_convolution(eqn, inputs[0], inputs[1], platform)]
        if platform == "gpu" and eqn.params["precision"] == _FLOAT32:
            return [_exact_in_weight(eqn, *inputs)]
    if platform == "cpu" and eqn.primitive.name == _MAXIMUM and _tiles(eqn, inputs[0]):
        return [_max_over_tiles(eqn, inputs[0])]
    return bind(eqn, inputs)


def in_memory(x: Array, platform: str) -> Array:
    """Materialise `x`, and its derivatives, so that XLA on a CPU computes them once."""
    # XLA fuses element-wise producers into every consumer and so recomputes the chain once per
    # consumer: in a residual network, the cotangents and the masks of the rectifiers, from the
    # output down to each layer. It does not fuse through a branch.
    if platform != "cpu" or not jnp.issubdtype(x.dtype, jnp.inexact):
        return x
    true = lax.optimization_barrier(np.True_)  # a constant that XLA cannot fold
    return lax.cond(true, lambda x: x, lambda x: jnp.nan * x, x)


def patches(eqn: Any, a: Array, platform: str) -> Array:
    """All windows that a convolution sees: `[B, *out, taps, C]`, one strided slice a tap."""
    p = eqn.params
    numbers = p["dimension_numbers"]
    kernel = eqn.invars[1].aval.shape
    window = [kernel[axis] for axis in numbers.rhs_spec[2:]]
    batch, channels, *spatial = numbers.lhs_spec
    a = a.transpose(batch, *spatial, channels)
    channels_size = a.shape[-1]
    inner = [
        (low, high, dilation - 1)
        for (low, high), dilation in zip(p["padding"], p["lhs_dilation"], strict=True)
    ]
    if any(pad != (0, 0, 0) for pad in inner):
        a = lax.pad(a, jnp.zeros((), a.dtype), [(0, 0, 0), *inner, (0, 0, 0)])
    axes = []  # for each axis: entries of the first window, number of windows, stride
    for size, taps, stride, dilation in zip(
        a.shape[1:-1], window, p["window_strides"], p["rhs_dilation"], strict=True
    ):
        count = (size - (taps - 1) * dilation - 1) // stride + 1
        axes.append((range(0, taps * dilation, dilation), count, stride))
    if platform == "gpu" and math.prod(window) <= _MOST_TAPS:
        return _all_at_once(a, axes)
    # One spatial axis after the other, the last first: w + h slices instead of w h, and as many
    # sums in the gradient.
    for axis, (starts, count, stride) in reversed(list(enumerate(axes))):
        if axis == len(window) - 1 and stride == 1 and platform == "cpu":
            a = _windows_in_a_loop(a, np.asarray(starts), count, axis + 1, len(window) + 1)
            continue
        span = (count - 1) * stride + 1
        taps = [lax.slice_in_dim(a, t, t + span, stride, axis + 1) for t in starts]
        a = jnp.stack(taps, axis=len(window) + 1)
    return a.reshape(*a.shape[: len(window) + 1], math.prod(window), channels_size)


def _all_at_once(a: Array, axes: Sequence[tuple[range, int, int]]) -> Array:
    """Windows as one slice a tap, which a GPU writes in one launch."""
    slices = []
    for first in itertools.product(*(starts for starts, _, _ in axes)):
        stops = [t + (n - 1) * stride + 1 for t, (_, n, stride) in zip(first, axes, strict=True)]
        strides = [1, *(stride for _, _, stride in axes), 1]
        slices.append(lax.slice(a, [0, *first, 0], [a.shape[0], *stops, a.shape[-1]], strides))
    return jnp.stack(slices, axis=len(axes) + 1)


def _is_empty(eqn: Any) -> bool:
    """Whether an equation reads or writes an array without entries, which has no patches."""
    return not all(math.prod(v.aval.shape) for v in (*eqn.invars, *eqn.outvars))


def _pays(eqn: Any) -> bool:
    """Whether patches convolve a whole batch faster, and are not too large."""
    weight, numbers = eqn.invars[1].aval, eqn.params["dimension_numbers"]
    features, _, *window = (weight.shape[axis] for axis in numbers.rhs_spec)
    products = features // eqn.params["feature_group_count"] * math.prod(window)
    return products >= _FEWEST and _patch_bytes(eqn) <= _LARGEST


def _patch_bytes(eqn: Any) -> int:
    """Bytes of all windows that a convolution sees."""
    a, weight = (v.aval for v in eqn.invars)
    features, *seen = (weight.shape[axis] for axis in eqn.params["dimension_numbers"].rhs_spec)
    positions = eqn.outvars[0].aval.size // features
    size = positions * math.prod(seen) * eqn.params["feature_group_count"]
    return size * a.dtype.itemsize


def _windows_in_a_loop(a: Array, starts: np.ndarray, count: int, axis: int, place: int) -> Array:
    """One slice of `count` entries a start, stacked.

    A loop keeps XLA on CPU from fusing its gradient, a sum over all windows that an entry is in,
    into what reads it: a max-pool's gradient reads each entry several times, and would compute the
    sum again each time.
    """
    one = lambda start: lax.dynamic_slice_in_dim(
        a, start, count, axis, allow_negative_indices=False
    )
    return jnp.moveaxis(lax.map(one, jnp.asarray(starts, jnp.int32)), 0, place)


def _convolution(eqn: Any, a: Array, weight: Array, platform: str) -> Array:
    """A convolution as matrix products of its patches, in blocks of samples that fit the cache.

    The gradient recomputes the patches of a block, which is faster than to store and load them.
    """
    numbers = eqn.params["dimension_numbers"]
    batch = numbers.lhs_spec[0]
    count = a.shape[batch]
    size = block_size(count, _patch_bytes(eqn) // count) if count else 0
    if size >= count:
        return _of_patches(eqn, a, weight, platform)
    one = jax.checkpoint(
        lambda rows: jnp.moveaxis(
            _of_patches(eqn, jnp.moveaxis(rows, 0, batch), weight, platform),
            numbers.out_spec[0],
            0,
        )
    )
    y = map_blocks(one, jnp.moveaxis(a, batch, 0), count, size)
    return jnp.moveaxis(y, 0, numbers.out_spec[0])


def _exact_in_weight(eqn: Any, a: Array, weight: Array) -> Array:
    """XLA's convolution, also for its derivatives; those by the weight are products of patches."""
    zeros = lambda shape: like_varying(jnp.zeros(shape, a.dtype), (a, weight))

    def for_weight(a, y):  # `eqn` is linear in the weight, so it may be differentiated at 0
        convolved = partial(_convolution, eqn, a, platform="gpu")
        return jax.vjp(convolved, zeros(eqn.invars[1].aval.shape))[1](y)[0]

    @jax.custom_vjp
    def forward(a, weight):
        return bind(eqn, [a, weight])[0]

    @jax.custom_vjp
    def backward(y, weight):
        convolved = lambda a: bind(eqn, [a, weight])[0]
        return jax.vjp(convolved, zeros(eqn.invars[0].aval.shape))[1](y)[0]

    forward.defvjp(
        lambda a, weight: (forward(a, weight), (a, weight)),
        lambda kept, y: (backward(y, kept[1]), for_weight(kept[0], y)),
    )
    backward.defvjp(
        lambda y, weight: (backward(y, weight), (y, weight)),
        lambda kept, a: (forward(a, kept[1]), for_weight(a, kept[0])),
    )
    return forward(*varying_alike(a, weight))


def _of_patches(eqn: Any, a: Array, weight: Array, platform: str) -> Array:
    """A convolution as one matrix product of all its patches."""
    dot = partial(lax.dot_general, precision=eqn.params["precision"])
    numbers, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
    seen = patches(eqn, a, platform)
    batch, *out, taps, channels = seen.shape
    weight = weight.transpose(numbers.rhs_spec)  # (O, C / G, *window)
    features = weight.shape[0]
    weight = weight.reshape(groups, features // groups, channels // groups, taps)
    if groups == 1:
        seen = seen.reshape(-1, taps * channels)
        if batch == 1:
            columns = weight[0].transpose(2, 1, 0).reshape(taps * channels, features)
            y = dot(seen, columns, (((1,), (0,)), ((), ())))
        else:  # the weight's gradient then has the patches on the right, twice as fast
            rows = weight[0].transpose(0, 2, 1).reshape(features, taps * channels)
            y = dot(seen, rows, (((1,), (1,)), ((), ())))
    else:
        seen = seen.reshape(-1, taps, groups, channels // groups)
        y = jnp.einsum("stgc,gict->sgi", seen, weight, precision=eqn.params["precision"])
    y = y.reshape(batch, *out, features)
    order = np.argsort([numbers.out_spec[0], *numbers.out_spec[2:], numbers.out_spec[1]])
    return y.transpose(*order).astype(eqn.outvars[0].aval.dtype)


def _tiles(eqn: Any, a: Array) -> bool:
    """Whether the windows of floats lie side by side, without padding or dilation."""
    p = eqn.params
    return (
        jnp.issubdtype(a.dtype, jnp.floating)
        and tuple(p["window_dimensions"]) == tuple(p["window_strides"])
        and all(pad == (0, 0) for pad in map(tuple, p["padding"]))
        and all(d == 1 for d in (*p["base_dilation"], *p["window_dilation"]))
    )


def _max_over_tiles(eqn: Any, a: Array) -> Array:
    """The maximum of each tile, as the sum over a tile that is zero except at its first maximum."""
    tile = eqn.params["window_dimensions"]
    out = eqn.outvars[0].aval.shape
    a = a[tuple(slice(0, n * w) for n, w in zip(out, tile, strict=True))]
    a = a.reshape([size for pair in zip(out, tile, strict=True) for size in pair])
    inside = tuple(range(1, 2 * len(tile), 2))
    fixed = lax.stop_gradient(a)
    top = jnp.max(fixed, axis=inside, keepdims=True)
    place = np.arange(math.prod(tile), dtype=np.int32)
    place = place.reshape([size for w in tile for size in (1, w)])
    is_top = (fixed == top) | (fixed != fixed)  # a NaN is the maximum of its tile
    first = jnp.min(jnp.where(is_top, place, place.size), axis=inside, keepdims=True)
    return jnp.sum(jnp.where(first == place, a, jnp.zeros_like(a)), axis=inside)
