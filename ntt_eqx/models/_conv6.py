"""Conv-6: the convolutional network of the lottery ticket hypothesis."""

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from .._checks import check_key
from ._init import conv, glorot_init, linear
from ._shapes import check_image_shape, check_sample

_CHANNELS = (64, 64, 128, 128, 256, 256)


class Conv6(eqx.Module):
    """Six padded 3 x 3 convolutions (64, 64, 128, 128, 256, 256), then 256, 256 and K units.

    A pool follows every second convolution, a ReLU every layer but the last. Frankle & Carbin
    (2019), Figure 2: 2,261,184 weights, 1,144,512 of them in convolutions, for 32 x 32 colour
    images and 10 classes. Glorot-normal weights, biases from `N(0, 0.01^2)`.
    """

    convs: tuple[eqx.nn.Conv2d, ...]
    hidden1: eqx.nn.Linear
    hidden2: eqx.nn.Linear
    output: eqx.nn.Linear
    pool: eqx.nn.MaxPool2d
    input_shape: tuple[int, int, int] = eqx.field(static=True)

    def __init__(
        self,
        input_shape: Sequence[int] = (3, 32, 32),
        num_classes: int = 10,
        *,
        key: PRNGKeyArray,
    ):
        """Build the network.

        **Arguments:**

        - `input_shape`: `(channels, height, width)` of one image, at least 8 x 8.
        - `num_classes`: the number of logits `K`.
        - `key`: the random key of the initialisation.
        """
        check_key("Conv6", key)
        self.input_shape = check_image_shape("Conv6", input_shape, smallest=8)
        channels = (self.input_shape[0], *_CHANNELS)
        height, width = (side // 8 for side in self.input_shape[1:])
        convs = tuple(
            conv(i, o, 3, padding=1) for i, o in zip(channels[:-1], channels[1:], strict=True)
        )
        dense = (linear(256 * height * width, 256), linear(256, 256), linear(256, num_classes))
        self.convs, (self.hidden1, self.hidden2, self.output) = glorot_init((convs, dense), key=key)
        self.pool = eqx.nn.MaxPool2d(2, 2)

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, " classes"]:
        """Logits of one image of shape `input_shape`."""
        check_sample(self, x, self.input_shape)
        for number, convolution in enumerate(self.convs):
            x = jax.nn.relu(convolution(x))
            x = self.pool(x) if number % 2 else x
        h = jax.nn.relu(self.hidden1(jnp.ravel(x)))
        return self.output(jax.nn.relu(self.hidden2(h)))
