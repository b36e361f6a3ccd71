"""ResNet-20 for small images, with group normalisation."""

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from .._checks import check_key
from ._init import conv, glorot_init, group_norm, linear
from ._shapes import check_image_shape, check_sample


class ResNet20(eqx.Module):
    """A convolution, three stages of three residual blocks (16, 32, 64 channels), K units.

    The CIFAR network of He et al. (2016) with 269,722 parameters: shortcuts have no weights, they
    skip every second pixel and fill new channels with zeros. Batch normalisation, which would mix
    the samples, is replaced by group normalisation.
    """

    stem: eqx.nn.Conv2d
    norm: eqx.nn.GroupNorm
    blocks: "tuple[ResidualBlock, ...]"
    output: eqx.nn.Linear
    input_shape: tuple[int, int, int] = eqx.field(static=True)

    def __init__(
        self,
        input_shape: Sequence[int] = (3, 32, 32),
        num_classes: int = 10,
        *,
        width: int = 16,
        key: PRNGKeyArray,
    ):
        """Build the network.

        **Arguments:**

        - `input_shape`: `(channels, height, width)` of one image, at least 4 x 4.
        - `num_classes`: the number of logits `K`.
        - `width`: channels of the first stage, a multiple of 8; the others have two and four times
          as many.
        - `key`: the random key of the initialisation.
        """
        check_key("ResNet20", key)
        self.input_shape = check_image_shape("ResNet20", input_shape, smallest=4)
        self.norm = group_norm("ResNet20", width)
        channels = [width, *(width * n for n in (1, 1, 1, 2, 2, 2, 4, 4, 4))]
        blocks = tuple(
            ResidualBlock(i, o) for i, o in zip(channels[:-1], channels[1:], strict=True)
        )
        stem = conv(self.input_shape[0], width, 3, padding=1, use_bias=False)
        self.stem, self.blocks, self.output = glorot_init(
            (stem, blocks, linear(4 * width, num_classes)), key=key
        )

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, " classes"]:
        """Logits of one image of shape `input_shape`."""
        check_sample(self, x, self.input_shape)
        h = jax.nn.relu(self.norm(self.stem(x)))
        for block in self.blocks:
            h = block(h)
        return self.output(jnp.mean(h, axis=(1, 2)))


class ResidualBlock(eqx.Module):
    """Two 3 x 3 convolutions beside a shortcut; halves the sides when the channels change."""

    conv1: eqx.nn.Conv2d
    norm1: eqx.nn.GroupNorm
    conv2: eqx.nn.Conv2d
    norm2: eqx.nn.GroupNorm

    def __init__(self, in_channels: int, out_channels: int):
        """Lay out the block, whose weights `ResNet20` draws; `out_channels >= in_channels`."""
        stride = 1 if in_channels == out_channels else 2
        self.conv1 = conv(in_channels, out_channels, 3, stride=stride, padding=1, use_bias=False)
        self.norm1 = group_norm("ResNet20", out_channels)
        self.conv2 = conv(out_channels, out_channels, 3, padding=1, use_bias=False)
        self.norm2 = group_norm("ResNet20", out_channels)

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Feature maps `[C', H', W']` of feature maps `[C, H, W]`."""
        h = jax.nn.relu(self.norm1(self.conv1(x)))
        h = self.norm2(self.conv2(h))
        if h.shape != x.shape:
            x = jnp.pad(x[:, ::2, ::2], ((0, h.shape[0] - x.shape[0]), (0, 0), (0, 0)))
        return jax.nn.relu(h + x)
