"""When a layer that stores kept weights alone is faster."""

from typing import Any

import equinox as eqx
import numpy as np

from ..kernels import target_device


def pays(layer: Any, mask: np.ndarray, batch_size: int) -> bool:
    """Whether a training step is faster with kept weights alone."""
    if target_device().platform != "cpu":
        return False
    if not isinstance(layer, eqx.nn.Linear):
        return False
    return mask.mean() <= 0.1
