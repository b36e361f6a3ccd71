"""When a layer that stores kept weights alone trains faster, from measured costs."""

import dataclasses
from typing import Any

import equinox as eqx
import numpy as np
from jaxtyping import Bool

from ..kernels import target_device
from ._index import padded_slots
from ._shared_index import shared_rows


@dataclasses.dataclass(frozen=True)
class Costs:
    """What a training step of a sparse layer costs, in weights of the dense layer.

    Attributes:
        slot: a slot of the index, padding included.
        shared: an entry of a small dense matrix, where groups of rows keep the same columns.
        feature: a feature of input or output, which is transposed for all samples.
        launches: the launches of a layer, at 64 samples.
    """

    slot: float
    shared: float
    feature: float
    launches: float


# Milliseconds of processor time of output, input gradient and weight gradient, float32, 64 samples,
# uniform masks; two cores of an AMD EPYC (Zen 4) with other work on them, JAX 0.10.2:
#
#     layer          density   slots       dense   sparse
#     300 x 784      3 %       12,600      1.65    0.70 to 1.05
#     300 x 784      10 %      30,900      1.65    1.15
#     300 x 784      20 %      55,500      1.65    1.79
#     100 x 300      3 %       1,900       0.33    0.61
#     100 x 300      10 %      4,200       0.33    0.34
#     10 x 100       10 %      150         0.04    0.18
#     1,024 x 1,024  3 %       38,900      6.2     1.8
#     1,024 x 1,024  10 %      117,844     6.2     3.9
#     1,024 x 1,024  20 %      226,758     6.2     6.0
#     4,096 x 4,096  1 %       190,891     120     14
#     4,096 x 4,096  3 %       543,166     120     22
#     4,096 x 4,096  10 %      1,789,024   120     73
#
# A dense weight takes 7 ns, a slot 26 to 70. Within a network a feature costs twice what it does
# alone: LeNet-300-100's step at 10 % was 1.3 times slower with its first layer sparse. Convolutions
# do not pay: with all layers sparse, LeNet-5's step took 2.4 times as long as masked at 1 and 3 %.
_CPU = Costs(slot=5.0, shared=1.0, feature=72.0, launches=15_000.0)


def pays(layer: Any, mask: Bool[np.ndarray, "..."], batch_size: int) -> bool:
    """Whether a training step is faster with kept weights alone, on a device that was measured."""
    if target_device().platform != "cpu" or not isinstance(layer, eqx.nn.Linear):
        return False
    height = shared_rows(mask)
    if height > 1:  # a tile is gathered and added like a slot, its entries are multiplied densely
        cost = _CPU.slot * mask.sum() / height + _CPU.shared * mask.sum()
    else:
        cost = _CPU.slot * (padded_slots(mask.sum(1)) + padded_slots(mask.sum(0))) / 2
    return bool(cost + _around_entries(mask, batch_size) < mask.size)


def _around_entries(mask: Bool[np.ndarray, "..."], batch_size: int) -> float:
    """The part of a step's cost that does not depend on the number of entries."""
    return _CPU.feature * sum(mask.shape) + _CPU.launches * 64 / batch_size


# A step of a transfer whose optimiser stores all weights: what is saved are dense products, and the
# contraction of the kernel at chunks of kept weights.
_LEAST, _MOST = 2**18, 0.05


def is_large(mask: Any) -> bool:
    """Whether a layer is so large that a step may find out by itself what is faster."""
    return mask.size >= _LEAST


def pays_in_a_transfer(mask: Bool[np.ndarray, "i j"]) -> bool:
    """Whether a step of a transfer is faster with kept weights alone, on a CPU."""
    return bool(is_large(mask) and np.count_nonzero(mask) <= _MOST * mask.size)


def pays_in_training(mask: Bool[np.ndarray, "i j"], batch_size: int) -> bool:
    """Whether a run of training should store kept weights alone, on a CPU.

    Only large layers: each shape and count compiles a program, in seconds. A step of three layers
    of 1,568 units at 1 % then takes 4 ms instead of 41, at 32 samples.
    """
    if not is_large(mask) or shared_rows(mask) > 1:
        return False
    slots = np.count_nonzero(mask) * 1.5  # entries and the padding of their blocks
    return bool(_CPU.slot * slots + _around_entries(mask, batch_size) < mask.size)
