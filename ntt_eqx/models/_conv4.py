"""Conv-4: the convolutional network of the published CIFAR-10 and SVHN experiments."""

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from .._checks import check_key
from ._init import conv, glorot_init, linear
from ._shapes import after_window, check_image_shape, check_sample


class Conv4(eqx.Module):
    """Four unpadded 3 x 3 convolutions (64, 64, pool, 128, 128, pool), then 512 and K units.

    ReLU after every layer but the last. With `dropout`, activations are dropped after either pool
    and after the 512 units whenever a key is given. Glorot-normal weights, biases from
    `N(0, 0.01^2)`.
    """

    conv1: eqx.nn.Conv2d
    conv2: eqx.nn.Conv2d
    conv3: eqx.nn.Conv2d
    conv4: eqx.nn.Conv2d
    hidden: eqx.nn.Linear
    output: eqx.nn.Linear
    pool: eqx.nn.MaxPool2d
    keep: tuple[float, float, float] | None = eqx.field(static=True)
    input_shape: tuple[int, int, int] = eqx.field(static=True)

    def __init__(
        self,
        input_shape: Sequence[int] = (3, 32, 32),
        num_classes: int = 10,
        *,
        dropout: bool | tuple[float, float, float] = False,
        key: PRNGKeyArray,
    ):
        """Build the network.

        **Arguments:**

        - `input_shape`: `(channels, height, width)` of one image, at least 16 x 16.
        - `num_classes`: the number of logits `K`.
        - `dropout`: `True` for the published probabilities (0.75, 0.75, 0.5) with which an
          activation is *kept* after the first pool, the second pool and the 512 units, or three
          such probabilities in (0, 1].
        - `key`: the random key of the initialisation.
        """
        check_key("Conv4", key)
        self.input_shape = check_image_shape("Conv4", input_shape, smallest=16)
        # two 3 x 3 windows in a row see 5 x 5
        shape = after_window(after_window(self.input_shape, 5), 2, stride=2)
        _, height, width = after_window(after_window(shape, 5), 2, stride=2)
        self.conv1, self.conv2, self.conv3, self.conv4, self.hidden, self.output = glorot_init(
            (
                conv(self.input_shape[0], 64, 3),
                conv(64, 64, 3),
                conv(64, 128, 3),
                conv(128, 128, 3),
                linear(128 * height * width, 512),
                linear(512, num_classes),
            ),
            key=key,
        )
        self.pool = eqx.nn.MaxPool2d(2, 2)
        self.keep = _keep_probabilities(dropout)

    def __call__(
        self, x: Float[Array, "..."], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, " classes"]:
        """Logits of one image of shape `input_shape`; a `key` turns the dropout on."""
        check_sample(self, x, self.input_shape)
        if key is not None:
            check_key("Conv4", key)
        keys = (None, None, None) if key is None else tuple(jr.split(key, 3))
        keep = (1.0, 1.0, 1.0) if self.keep is None else self.keep
        h = jax.nn.relu(self.conv1(x))
        h = self.pool(jax.nn.relu(self.conv2(h)))
        h = _dropout(h, keep[0], keys[0])
        h = jax.nn.relu(self.conv3(h))
        h = self.pool(jax.nn.relu(self.conv4(h)))
        h = _dropout(h, keep[1], keys[1])
        h = jax.nn.relu(self.hidden(jnp.ravel(h)))
        h = _dropout(h, keep[2], keys[2])
        return self.output(h)


def _keep_probabilities(
    dropout: bool | tuple[float, float, float],
) -> tuple[float, float, float] | None:
    if isinstance(dropout, bool):
        return (0.75, 0.75, 0.5) if dropout else None
    if len(dropout) != 3 or not all(0.0 < p <= 1.0 for p in dropout):
        raise ValueError(
            f"Conv4: dropout must be a bool or three probabilities in (0, 1], got {dropout}."
        )
    return dropout


def _dropout(h: Array, keep: float, key: PRNGKeyArray | None) -> Array:
    if key is None or keep == 1.0:
        return h
    return eqx.nn.Dropout(1.0 - keep)(h, key=key)
