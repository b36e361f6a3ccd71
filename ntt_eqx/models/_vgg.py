"""VGG-11 for small images, with group or batch normalisation."""

from collections.abc import Sequence
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from .._checks import check_key
from ._init import conv, glorot_init, linear, normalisation, normalise
from ._shapes import check_image_shape, check_sample, check_state

_MULTIPLES = (1, 2, 4, 4, 8, 8, 8, 8)  # channels of each convolution, in units of `width`
_POOLED = (0, 1, 3, 5)  # after which convolutions the sides are halved


class VGG11(eqx.Module):
    """Eight 3 x 3 convolutions (64, 128, 256, 256, 512, 512, 512, 512), four pools, K units.

    Each convolution is padded, has no bias, and is followed by a normalisation and a ReLU.
    What the last leaves is averaged over the image in place of a fifth pool, so that 28 x 28 images
    fit too. Simonyan & Zisserman (2015), configuration A, without the two hidden dense layers.

    Group normalisation treats each sample alone. With `norm="batch"` the model has a state and is
    called as `model(x, state) -> (logits, state)`: build it by `eqx.nn.make_with_state(VGG11)` and
    pair both by `ntt_eqx.StatefulModel`.
    """

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
        check_key("VGG11", key)
        self.input_shape = check_image_shape("VGG11", input_shape, smallest=16)
        channels = [self.input_shape[0], *(width * n for n in _MULTIPLES)]
        convs = tuple(
            conv(i, o, 3, padding=1, use_bias=False)
            for i, o in zip(channels[:-1], channels[1:], strict=True)
        )
        self.convs, self.output = glorot_init((convs, linear(channels[-1], num_classes)), key=key)
        self.norms = tuple(normalisation("VGG11", norm, c) for c in channels[1:])
        self.pool = eqx.nn.MaxPool2d(2, 2)

    def __call__(self, x: Float[Array, "..."], state: Any = None) -> Any:
        """Logits of one image of shape `input_shape`, with a `state` also the next state."""
        check_sample(self, x, self.input_shape)
        check_state(self, state, self.norms[0])
        for n, (convolution, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x, state = normalise(norm, convolution(x), state)
            x = jax.nn.relu(x)
            if n in _POOLED:
                x = self.pool(x)
        logits = self.output(jnp.mean(x, axis=(1, 2)))
        return logits if state is None else (logits, state)
