"""A multi-layer perceptron of any size; the wide one of the literature on ultra-sparse networks."""

import math
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from .._checks import check_count, check_key
from ._init import glorot_init, linear
from ._shapes import check_sample


class Perceptron(eqx.Module):
    """A multi-layer perceptron with ReLU; by default three hidden layers of 1,568 units.

    With 28 x 28 images and ten classes these are 6,166,954 parameters, 6,162,240 of them weights:
    the network on which SET, RigL, GMP and CHTs are compared at 99 % (Zhang et al., NeurIPS 2025).
    Glorot-normal weights, biases from `N(0, 0.01^2)`.
    """

    hidden: tuple[eqx.nn.Linear, ...]
    output: eqx.nn.Linear
    input_shape: tuple[int, ...] = eqx.field(static=True)

    def __init__(
        self,
        input_shape: Sequence[int] = (1, 28, 28),
        num_classes: int = 10,
        *,
        units: Sequence[int] = (1568, 1568, 1568),
        key: PRNGKeyArray,
    ):
        """Build the network.

        **Arguments:**

        - `input_shape`: the shape of one sample; any number of axes, flattened by the model.
        - `num_classes`: the number of logits `K`.
        - `units`: the sizes of the hidden layers.
        - `key`: the random key of the initialisation.
        """
        check_key("Perceptron", key)
        for size in units:
            check_count("Perceptron: units", size)
        self.input_shape = tuple(input_shape)
        sizes = (math.prod(self.input_shape), *units)
        hidden = tuple(linear(i, o) for i, o in zip(sizes[:-1], sizes[1:], strict=True))
        self.hidden, self.output = glorot_init((hidden, linear(sizes[-1], num_classes)), key=key)

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, " classes"]:
        """Logits of one sample of shape `input_shape`."""
        check_sample(self, x, self.input_shape)
        h = jnp.ravel(x)
        for layer in self.hidden:
            h = jax.nn.relu(layer(h))
        return self.output(h)
