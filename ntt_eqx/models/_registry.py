"""The models by name, as the command line and configuration files know them."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
from jaxtyping import PRNGKeyArray

from .._checks import check_key
from .._stateful import StatefulModel
from ._conv4 import Conv4
from ._conv6 import Conv6
from ._lenet import LeNet5, LeNet300100
from ._perceptron import Perceptron
from ._resnet import ResNet18, ResNet20, ResNet32
from ._vgg import VGG11, VGG16, VGG19
from ._vit import ViT


def _with_batch_norm(kind: Callable[..., Any], *arguments: Any, **options: Any) -> StatefulModel:
    return StatefulModel(*eqx.nn.make_with_state(kind)(*arguments, norm="batch", **options))


_NORMALISED = {
    "vgg-11": VGG11,
    "vgg-16": VGG16,
    "vgg-19": VGG19,
    "resnet-18": ResNet18,
    "resnet-20": ResNet20,
    "resnet-32": ResNet32,
}

MODELS: dict[str, Callable[..., Any]] = {
    "lenet-300-100": LeNet300100,
    "lenet-5": LeNet5,
    "conv-4": Conv4,
    "conv-4-dropout": functools.partial(Conv4, dropout=True),
    "conv-6": Conv6,
    "mlp-1568": Perceptron,
    **_NORMALISED,
    **{
        f"{name}-bn": functools.partial(_with_batch_norm, kind)
        for name, kind in _NORMALISED.items()
    },
    "vit": ViT,
}
"""Name -> constructor `(input_shape, num_classes, *, key)`."""


def make_model(
    name: str, input_shape: Sequence[int], num_classes: int, *, key: PRNGKeyArray
) -> Any:
    """Build a model by its name in `MODELS`.

    **Arguments:**

    - `name`: a key of `MODELS`.
    - `input_shape`: the shape of one sample, `(channels, height, width)` for images.
    - `num_classes`: the number of logits.
    - `key`: the random key of the initialisation.

    **Returns:**

    An Equinox model from one sample to its logits `[num_classes]`; a `StatefulModel` where it has
    batch normalisation.

    **Raises:**

    `ValueError` for an unknown name (the message lists the known ones), for inputs that are
    too small for the architecture, or when `key` is not one random key.
    """
    if name not in MODELS:
        raise ValueError(f"make_model: unknown model {name!r}; known are {', '.join(MODELS)}.")
    check_key("make_model", key)
    return MODELS[name](input_shape, num_classes, key=key)
