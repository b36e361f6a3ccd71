"""ResNet-20, ResNet-32 and ResNet-18 for small images, with group or batch normalisation."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from .._checks import check_key
from ._init import conv, he_init, linear, normalisation, normalise
from ._shapes import check_image_shape, check_sample, check_state


class AbstractResNet(eqx.Module):
    """A convolution, stages of residual blocks, an average over the image, K units.

    Each stage but the first halves the sides and doubles the channels. He-normal weights, see
    `he_init`.

    Group normalisation, the default, treats each sample alone. With `norm="batch"`, as published,
    the model has a state and is called as `model(x, state) -> (logits, state)`: build it by
    `eqx.nn.make_with_state(ResNet20)` and pair both by `ntt_eqx.StatefulModel`.

    Attributes:
        stages: number of stages.
        blocks_each: residual blocks of each stage.
        channels: channels of the first stage, as published.
        projects: whether the shortcuts between stages are 1 x 1 convolutions with a normalisation
            (option B of He et al., 2016). Else they have no weights: they skip every second pixel
            and fill new channels with zeros (option A).
        stem: the first convolution.
        norm: its normalisation.
        blocks: the blocks of all stages.
        output: the dense layer.
        input_shape: `(channels, height, width)` of one image.
    """

    stages: eqx.AbstractClassVar[int]
    blocks_each: eqx.AbstractClassVar[int]
    channels: eqx.AbstractClassVar[int]
    projects: eqx.AbstractClassVar[bool]
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
        width: int | None = None,
        norm: Literal["group", "batch"] = "group",
        key: PRNGKeyArray,
    ):
        """Build the network.

        **Arguments:**

        - `input_shape`: `(channels, height, width)` of one image, at least 4 x 4, for ResNet-18
          8 x 8.
        - `num_classes`: the number of logits `K`.
        - `width`: channels of the first stage, a multiple of 8, from which the others double;
          `None` for the published number.
        - `norm`: `"group"` or `"batch"`.
        - `key`: the random key of the initialisation.
        """
        name = type(self).__name__
        check_key(name, key)
        self.input_shape = check_image_shape(name, input_shape, smallest=2 ** (self.stages - 1))
        width = self.channels if width is None else width
        self.norm = normalisation(name, norm, width)
        of_blocks = [
            width * 2**stage for stage in range(self.stages) for _ in range(self.blocks_each)
        ]
        channels = [width, *of_blocks]
        blocks = tuple(
            ResidualBlock(name, i, o, norm, self.projects)
            for i, o in zip(channels[:-1], channels[1:], strict=True)
        )
        stem = conv(self.input_shape[0], width, 3, padding=1, use_bias=False)
        self.stem, self.blocks, self.output = he_init(
            (stem, blocks, linear(channels[-1], num_classes)), key=key
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


class ResNet20(AbstractResNet):
    """ResNet-20: three stages of three blocks (16, 32, 64 channels), shortcuts without weights.

    The CIFAR network of He et al. (2016) with 269,722 parameters. In code after Frankle et al.
    (2021), as that of NTK-SAP and PX, shortcuts between stages are convolutions: 272,474.
    """

    __init__ = AbstractResNet.__init__  # for type checkers, which would make one of the fields

    stages: ClassVar[int] = 3
    blocks_each: ClassVar[int] = 3
    channels: ClassVar[int] = 16
    projects: ClassVar[bool] = False


class ResNet32(AbstractResNet):
    """ResNet-32: three stages of five blocks (16, 32, 64 channels), shortcuts without weights.

    The CIFAR network of He et al. (2016) with 464,154 parameters; GraSP's ResNet-32 has twice the
    channels, `width=32`, and other shortcuts.
    """

    __init__ = AbstractResNet.__init__  # for type checkers, which would make one of the fields

    stages: ClassVar[int] = 3
    blocks_each: ClassVar[int] = 5
    channels: ClassVar[int] = 16
    projects: ClassVar[bool] = False


class ResNet18(AbstractResNet):
    """ResNet-18: four stages of two blocks (64, 128, 256, 512 channels), shortcuts with weights.

    The network of He et al. (2016) in its usual form for small images, with a 3 x 3 convolution of
    stride 1 and no pool at the start; 11,173,962 parameters with ten classes.
    """

    __init__ = AbstractResNet.__init__  # for type checkers, which would make one of the fields

    stages: ClassVar[int] = 4
    blocks_each: ClassVar[int] = 2
    channels: ClassVar[int] = 64
    projects: ClassVar[bool] = True


class ResidualBlock(eqx.Module):
    """Two 3 x 3 convolutions beside a shortcut; halves the sides when the channels change."""

    conv1: eqx.nn.Conv2d
    norm1: Any
    conv2: eqx.nn.Conv2d
    norm2: Any
    shortcut: Any
    shortcut_norm: Any

    def __init__(self, name: str, in_channels: int, out_channels: int, norm: str, projects: bool):
        """Lay out the block of the network `name`, which draws its weights."""
        stride = 1 if in_channels == out_channels else 2
        self.conv1 = conv(in_channels, out_channels, 3, stride=stride, padding=1, use_bias=False)
        self.norm1 = normalisation(name, norm, out_channels)
        self.conv2 = conv(out_channels, out_channels, 3, padding=1, use_bias=False)
        self.norm2 = normalisation(name, norm, out_channels)
        self.shortcut = self.shortcut_norm = None
        if projects and stride == 2:
            self.shortcut = conv(in_channels, out_channels, 1, stride=2, use_bias=False)
            self.shortcut_norm = normalisation(name, norm, out_channels)

    def __call__(self, x: Float[Array, "..."], state: Any) -> tuple[Float[Array, "..."], Any]:
        """Feature maps `[C', H', W']` of feature maps `[C, H, W]`, and the next state."""
        h, state = normalise(self.norm1, self.conv1(x), state)
        h, state = normalise(self.norm2, self.conv2(jax.nn.relu(h)), state)
        if self.shortcut is not None:
            x, state = normalise(self.shortcut_norm, self.shortcut(x), state)
        elif h.shape != x.shape:
            x = jnp.pad(x[:, ::2, ::2], ((0, h.shape[0] - x.shape[0]), (0, 0), (0, 0)))
        return jax.nn.relu(h + x), state
