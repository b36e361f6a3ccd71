"""VGG-11, VGG-16 and VGG-19 for small images, with group or batch normalisation."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from .._checks import check_key
from ._init import conv, he_init, linear, normalisation, normalise
from ._shapes import check_image_shape, check_sample, check_state


class AbstractVGG(eqx.Module):
    """Five stages of 3 x 3 convolutions with a pool between two stages, then K units.

    Each convolution is padded, has no bias, and is followed by a normalisation and a ReLU.
    What the last leaves is averaged over the image in place of a fifth pool, so that 28 x 28 images
    fit too. Simonyan & Zisserman (2015), without the two hidden dense layers. He-normal weights,
    see `he_init`.

    Group normalisation treats each sample alone. With `norm="batch"` the model has a state and is
    called as `model(x, state) -> (logits, state)`: build it by `eqx.nn.make_with_state(VGG19)` and
    pair both by `ntt_eqx.StatefulModel`.

    Attributes:
        stages: channels of the convolutions of each stage, in units of the first one's.
        convs: the convolutions.
        norms: their normalisations.
        output: the dense layer.
        pool: what stands between two stages.
        input_shape: `(channels, height, width)` of one image.
    """

    stages: eqx.AbstractClassVar[tuple[tuple[int, ...], ...]]
    convs: tuple[eqx.nn.Conv2d, ...]
    norms: tuple[Any, ...]
    output: eqx.nn.Linear
    pool: eqx.nn.MaxPool2d
    input_shape: tuple[int, int, int] = eqx.field(static=True)

    def __init__(
        self,
        input_shape: Sequence[int] = (3, 32, 32),
        num_classes: int = 10,
        *,
        width: int = 64,
        norm: Literal["group", "batch"] = "group",
        key: PRNGKeyArray,
    ):
        """Build the network.

        **Arguments:**

        - `input_shape`: `(channels, height, width)` of one image, at least 16 x 16.
        - `num_classes`: the number of logits `K`.
        - `width`: channels of the first convolution, a multiple of 8; the others scale with it.
        - `norm`: `"group"` or `"batch"`.
        - `key`: the random key of the initialisation.
        """
        name = type(self).__name__
        check_key(name, key)
        self.input_shape = check_image_shape(name, input_shape, smallest=16)
        multiples = [multiple for stage in self.stages for multiple in stage]
        channels = [self.input_shape[0], *(width * n for n in multiples)]
        convs = tuple(
            conv(i, o, 3, padding=1, use_bias=False)
            for i, o in zip(channels[:-1], channels[1:], strict=True)
        )
        self.convs, self.output = he_init((convs, linear(channels[-1], num_classes)), key=key)
        self.norms = tuple(normalisation(name, norm, c) for c in channels[1:])
        self.pool = eqx.nn.MaxPool2d(2, 2)

    def __call__(self, x: Float[Array, "..."], state: Any = None) -> Any:
        """Logits of one image of shape `input_shape`, with a `state` also the next state."""
        check_sample(self, x, self.input_shape)
        check_state(self, state, self.norms[0])
        layers = iter(zip(self.convs, self.norms, strict=True))
        for number, stage in enumerate(self.stages):
            x = x if number == 0 else self.pool(x)
            for _ in stage:
                convolution, norm = next(layers)
                x, state = normalise(norm, convolution(x), state)
                x = jax.nn.relu(x)
        logits = self.output(jnp.mean(x, axis=(1, 2)))
        return logits if state is None else (logits, state)


class VGG11(AbstractVGG):
    """VGG-11: eight convolutions (64, 128, 256, 256, 512, 512, 512, 512), configuration A."""

    __init__ = AbstractVGG.__init__  # for type checkers, which would make one of the fields

    stages: ClassVar[tuple[tuple[int, ...], ...]] = ((1,), (2,), (4,) * 2, (8,) * 2, (8,) * 2)


class VGG16(AbstractVGG):
    """VGG-16: 13 convolutions, configuration D; 14,724,042 parameters with ten classes."""

    __init__ = AbstractVGG.__init__  # for type checkers, which would make one of the fields

    stages: ClassVar[tuple[tuple[int, ...], ...]] = (
        *((1,) * 2, (2,) * 2),
        *((4,) * 3, (8,) * 3, (8,) * 3),
    )


class VGG19(AbstractVGG):
    """VGG-19: 16 convolutions, configuration E; 20,035,018 parameters with ten classes.

    With `norm="batch"` this is the VGG-19 of GraSP (Wang et al., ICLR 2020) and of Liu et al.
    (Rethinking the value of network pruning, ICLR 2019), whose convolutions have He-normal weights.
    """

    __init__ = AbstractVGG.__init__  # for type checkers, which would make one of the fields

    stages: ClassVar[tuple[tuple[int, ...], ...]] = (
        *((1,) * 2, (2,) * 2),
        *((4,) * 4, (8,) * 4, (8,) * 4),
    )
