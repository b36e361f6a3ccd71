"""Models that need several devices, for `compile_for.py --model`, and one for large images."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from ntt_eqx import models


def vit_b(key: PRNGKeyArray) -> Any:
    """Size of ViT-B/16: 86 million weights, samples of 3 x 224 x 224, 1,000 outputs."""
    shape = (3, 224, 224)
    sizes = dict(patch_size=16, dim=768, depth=12, num_heads=12, mlp_ratio=4)
    return models.ViT(shape, 1000, **sizes, key=key)


def resnet_50(key: PRNGKeyArray) -> Any:
    """Size of ResNet-50: 25 million weights, samples of 3 x 64 x 64, 1,000 outputs."""
    return models.ResNet20((3, 64, 64), 1000, width=152, key=key)


class LargeImages(eqx.Module):
    """Convolutions, pools and dense layers for images of 3 x 512 x 512 bytes, with one output.

    2.5 million weights, as the network of neural-tangents' issue 30 has.
    """

    convolutions: list[eqx.nn.Conv2d]
    hidden: eqx.nn.Linear
    output: eqx.nn.Linear

    def __init__(self, key: PRNGKeyArray):
        keys = iter(jax.random.split(key, 7))
        channels = (3, 16, 32, 64, 128, 256)
        self.convolutions = [eqx.nn.Conv2d(3, 16, 5, stride=2, padding=2, key=next(keys))]
        self.convolutions += [
            eqx.nn.Conv2d(i, o, 3, padding=1, key=next(keys))
            for i, o in zip(channels[1:-1], channels[2:], strict=True)
        ]
        self.hidden = eqx.nn.Linear(256 * 8 * 8, 128, key=next(keys))
        self.output = eqx.nn.Linear(128, 1, key=next(keys))

    def __call__(self, x: Array) -> Array:
        h = x.astype(jnp.float32) / 127.5 - 1
        for layer in self.convolutions:
            h = jax.nn.relu(layer(h))
            h = jax.lax.reduce_window(h, -jnp.inf, jax.lax.max, (1, 2, 2), (1, 2, 2), "VALID")
        return self.output(jax.nn.relu(self.hidden(h.reshape(-1))))
