"""The two LeNets of the pruning literature: LeNet-300-100 and the Caffe variant of LeNet-5."""

import math
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from .._checks import check_key
from ._init import conv, glorot_init, linear
from ._shapes import after_window, check_image_shape, check_sample


class LeNet300100(eqx.Module):
    """The multi-layer perceptron LeNet-300-100 with ReLU: 300, 100, K units.

    266,610 parameters for 28 x 28 images and 10 classes, of which 266,200 are weights.
    Glorot-normal weights, biases from `N(0, 0.01^2)`.
    """

    hidden1: eqx.nn.Linear
    hidden2: eqx.nn.Linear
    output: eqx.nn.Linear
    input_shape: tuple[int, ...] = eqx.field(static=True)

    def __init__(
        self,
        input_shape: Sequence[int] = (1, 28, 28),
        num_classes: int = 10,
        *,
        key: PRNGKeyArray,
    ):
        """Build the network.

        **Arguments:**

        - `input_shape`: the shape of one sample; any number of axes, flattened by the model.
        - `num_classes`: the number of logits `K`.
        - `key`: the random key of the initialisation.
        """
        check_key("LeNet300100", key)
        self.input_shape = tuple(input_shape)
        self.hidden1, self.hidden2, self.output = glorot_init(
            (linear(math.prod(self.input_shape), 300), linear(300, 100), linear(100, num_classes)),
            key=key,
        )

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, " classes"]:
        """Logits of one sample of shape `input_shape`."""
        check_sample(self, x, self.input_shape)
        h = jax.nn.relu(self.hidden1(jnp.ravel(x)))
        h = jax.nn.relu(self.hidden2(h))
        return self.output(h)


class LeNet5(eqx.Module):
    """The Caffe variant of LeNet-5 with ReLU: two unpadded convolutions, pools, 500, K units.

    431,080 parameters for 28 x 28 grey images and 10 classes. Glorot-normal weights, biases from
    `N(0, 0.01^2)`.
    """

    conv1: eqx.nn.Conv2d
    conv2: eqx.nn.Conv2d
    hidden: eqx.nn.Linear
    output: eqx.nn.Linear
    pool: eqx.nn.MaxPool2d
    input_shape: tuple[int, int, int] = eqx.field(static=True)

    def __init__(
        self,
        input_shape: Sequence[int] = (1, 28, 28),
        num_classes: int = 10,
        *,
        key: PRNGKeyArray,
    ):
        """Build the network.

        **Arguments:**

        - `input_shape`: `(channels, height, width)` of one image, at least 16 x 16.
        - `num_classes`: the number of logits `K`.
        - `key`: the random key of the initialisation.
        """
        check_key("LeNet5", key)
        self.input_shape = check_image_shape("LeNet5", input_shape, smallest=16)
        shape = after_window(after_window(self.input_shape, 5), 2, stride=2)
        _, height, width = after_window(after_window(shape, 5), 2, stride=2)
        self.conv1, self.conv2, self.hidden, self.output = glorot_init(
            (
                conv(self.input_shape[0], 20, 5),
                conv(20, 50, 5),
                linear(50 * height * width, 500),
                linear(500, num_classes),
            ),
            key=key,
        )
        self.pool = eqx.nn.MaxPool2d(2, 2)

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, " classes"]:
        """Logits of one image of shape `input_shape`."""
        check_sample(self, x, self.input_shape)
        h = self.pool(jax.nn.relu(self.conv1(x)))
        h = self.pool(jax.nn.relu(self.conv2(h)))
        h = jax.nn.relu(self.hidden(jnp.ravel(h)))
        return self.output(h)
