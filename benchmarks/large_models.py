"""Models of the sizes that need several devices, for `compile_for.py --model`."""

from typing import Any

from jaxtyping import PRNGKeyArray

from ntt_eqx import models


def vit_b(key: PRNGKeyArray) -> Any:
    """Size of ViT-B/16: 86 million weights, samples of 3 x 224 x 224, 1,000 outputs."""
    shape = (3, 224, 224)
    sizes = dict(patch_size=16, dim=768, depth=12, num_heads=12, mlp_ratio=4)
    return models.ViT(shape, 1000, **sizes, key=key)


def resnet_50(key: PRNGKeyArray) -> Any:
    """Size of ResNet-50: 25 million weights, samples of 3 x 64 x 64, 1,000 outputs."""
    return models.ResNet20((3, 64, 64), 1000, width=152, key=key)
