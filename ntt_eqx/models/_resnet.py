"""ResNet-20 for small images, with group or batch normalisation."""

from collections.abc import Sequence
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from .._checks import check_key
from ._init import conv, glorot_init, linear, normalisation, normalise
from ._shapes import check_image_shape, check_sample, check_state


class ResNet20(eqx.Module):
    """A convolution, three stages of three residual blocks (16, 32, 64 channels), K units.

    The CIFAR network of He et al. (2016) with 269,722 parameters: shortcuts have no weights, they
    skip every second pixel and fill new channels with zeros.

    Group normalisation, the default, treats each sample alone. With `norm="batch"`, as published,
    the model has a state and is called as `model(x, state) -> (logits, state)`: build it by
    `eqx.nn.make_with_state(ResNet20)` and pair both by `ntt_eqx.StatefulModel`.
    """

    stem: eqx.nn.Conv2d
    norm: Any
    blocks: "tuple[ResidualBlock, ...]"
    output: eqx.nn.Linear
    input_shape: tuple[int, int, int] = eqx.field(static=True)

    def __init__(
        self,
        input_shape: Sequence[int] = (3, 32, 32),
        num_classes: int = 10,
        *,
        width: int = 16,
        norm: Literal["group", "batch"] = "group",
        key: PRNGKeyArray,
    ):
        """Build the network.

        **Arguments:**

        - `input_shape`: `(channels, height, width)` of one image, at least 4 x 4.
        - `num_classes`: the number of logits `K`.
        - `width`: channels of the first stage, a multiple of 8; the others have two and four times
          as many.
        - `norm`: `"group"` or `"batch"`.
        - `key`: the random key of the initialisation.
        """
        check_key("ResNet20", key)
        self.input_shape = check_image_shape("ResNet20", input_shape, smallest=4)
        self.norm = normalisation("ResNet20", norm, width)
        channels = [width, *(width * n for n in (1, 1, 1, 2, 2, 2, 4, 4, 4))]
        blocks = tuple(
            ResidualBlock(i, o, norm) for i, o in zip(channels[:-1], channels[1:], strict=True)
        )
        stem = conv(self.input_shape[0], width, 3, padding=1, use_bias=False)
        self.stem, self.blocks, self.output = glorot_init(
            (stem, blocks, linear(4 * width, num_classes)), key=key
        )

    def __call__(self, x: Float[Array, "..."], state: Any = None) -> Any:
        """Logits of one image of shape `input_shape`, with a `state` also the next state."""
        check_sample(self, x, self.input_shape)
        check_state(self, state, self.norm)
        h, state = normalise(self.norm, self.stem(x), state)
        h = jax.nn.relu(h)
        for block in self.blocks:
            h, state = block(h, state)
        logits = self.output(jnp.mean(h, axis=(1, 2)))
        return logits if state is None else (logits, state)


class ResidualBlock(eqx.Module):
    """Two 3 x 3 convolutions beside a shortcut; halves the sides when the channels change."""

    conv1: eqx.nn.Conv2d
    norm1: Any
    conv2: eqx.nn.Conv2d
    norm2: Any

    def __init__(self, in_channels: int, out_channels: int, norm: str):
        """Lay out the block, whose weights `ResNet20` draws; `out_channels >= in_channels`."""
        stride = 1 if in_channels == out_channels else 2
        self.conv1 = conv(in_channels, out_channels, 3, stride=stride, padding=1, use_bias=False)
        self.norm1 = normalisation("ResNet20", norm, out_channels)
        self.conv2 = conv(out_channels, out_channels, 3, padding=1, use_bias=False)
        self.norm2 = normalisation("ResNet20", norm, out_channels)

    def __call__(self, x: Float[Array, "..."], state: Any) -> tuple[Float[Array, "..."], Any]:
        """Feature maps `[C', H', W']` of feature maps `[C, H, W]`, and the next state."""
        h, state = normalise(self.norm1, self.conv1(x), state)
        h, state = normalise(self.norm2, self.conv2(jax.nn.relu(h)), state)
        if h.shape != x.shape:
            x = jnp.pad(x[:, ::2, ::2], ((0, h.shape[0] - x.shape[0]), (0, 0), (0, 0)))
        return jax.nn.relu(h + x), state
