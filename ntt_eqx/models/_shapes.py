"""Sizes of feature maps, and the check that a model is given one sample of its own shape."""

from collections.abc import Sequence

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
