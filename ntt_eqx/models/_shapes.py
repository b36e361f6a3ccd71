"""Sizes of feature maps, and the check that a model is given one sample of its own shape."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
from jaxtyping import Array


def after_window(shape: tuple[int, ...], size: int, stride: int = 1) -> tuple[int, ...]:
    """`(C, H, W)` after an unpadded convolution or pool with a `size` x `size` window."""
    channels, *sides = shape
    return (channels, *((side - size) // stride + 1 for side in sides))


def check_image_shape(name: str, shape: Sequence[int], smallest: int) -> tuple[int, int, int]:
    """`shape` as a tuple `(C, H, W)` whose sides are large enough for the model called `name`."""
    shape = tuple(shape)
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"{name}: input_shape must be (channels, height, width), got {shape}.")
    if min(shape[1:]) < smallest:
        raise ValueError(
            f"{name}: input_shape {shape} is too small; height and width must be at least "
            f"{smallest}."
        )
    return shape


def check_sample(model: object, x: Array, input_shape: tuple[int, ...]) -> None:
    """Raise unless `x` is one sample of the shape that `model` was built for."""
    if x.shape != input_shape:
        hint = " Use `jax.vmap(model)` for a batch." if x.shape[1:] == input_shape else ""
        raise ValueError(
            f"{type(model).__name__}: takes one sample of shape {input_shape}, got {x.shape}.{hint}"
        )


def check_state(model: object, state: Any, norm: Any) -> None:
    """Raise where `norm` is a batch normalisation without a state, or a group one with a state.

    Another module in their place takes both, as that by which a score replaces them.
    """
    wrong = eqx.nn.BatchNorm if state is None else eqx.nn.GroupNorm
    if isinstance(norm, wrong):
        name = type(model).__name__
        raise ValueError(
            f"{name}: has batch normalisation and is called as model(x, state); pair it with its "
            f"state: ntt_eqx.StatefulModel(*eqx.nn.make_with_state({name})(...))."
            if state is None
            else f"{name}: has group normalisation and no state; call it as model(x)."
        )
