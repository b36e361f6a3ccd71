"""Measured costs of each platform, on which the engine's choices depend.

`python benchmarks/tune_engine.py` measures these numbers on the device it runs on.
"""

import dataclasses
from collections.abc import Mapping

from ..kernels import Device, memory_of


@dataclasses.dataclass(frozen=True)
class Costs:
    """Measured properties of a platform.

    Attributes:
        gathered_density: up to this density the non-zeros of a dense layer's mask are gathered;
            above it the mask is multiplied as a whole.
        gathering_flops: operations of a whole product that take as long as the additional launches
            of gathering; smaller products are not gathered.
        gathered_samples: of a dense layer at most the share N / `gathered_samples` of the entries
            is gathered, for N samples a side; 0 for no such limit.
        gathered_per_input: gathered entries for each input of a dense layer up to which gathering
            is faster; 0 for no such limit.
        gathered_entry: cost of a gathered entry of a tangent, with its contraction, relative to an
            entry of a whole tangent.
        flops_per_weight: operations of a network's head that take as long, a sample, as one weight
            of the dense layers behind it (`_parts`): 16 bytes of traffic in a gradient.
        block_bytes: bytes of intermediates of the samples that are taken together.
        tail_bytes: the same for dense layers at the end of a convolutional network, whose
            intermediates are small beside their weights.
        flops_per_sent_byte: operations that take as long as sending a byte to another device.
        entry_products: whether the kernel of a weight that stores some entries alone comes from
            products with these, instead of a gathered metric.
    """

    gathered_density: float
    gathering_flops: int
    gathered_entry: int
    flops_per_weight: int
    block_bytes: int
    tail_bytes: int
    flops_per_sent_byte: int
    entry_products: bool = False
    gathered_samples: int = 0
    gathered_per_input: int = 0

    def gather(self, entries: int, rows: int, inputs: int, n: int, m: int) -> bool:
        """Whether gathering the entries of a dense layer is faster, unused ones included.

        **Arguments:**

        - `entries`: how many; of the `rows * inputs` entries of the layer's mask.
        - `n`, `m`: samples of the two sides.
        """
        if 2 * n * m * rows * inputs < self.gathering_flops:
            return False
        # Per entry, gathering costs n + m numbers and saves operations for n m pairs. So what may
        # be gathered grows with N = 2 n m / (n + m), as long as products stay in cache.
        if self.gathered_samples * entries * (n + m) > 2 * n * m * rows * inputs:
            return False
        return not self.gathered_per_input or entries <= self.gathered_per_input * inputs


# On a CPU gathering and the whole product take equally long, with gradients, on one core, at these
# shares of entries (chunks are half empty, so densities are lower: 0.04 for 0.06):
#
#     layer        N = 8    16      32     64   model: min(N / 256, 40 / rows)
#     300 x 784    0.035    0.060   0.108  0.088      0.031  0.062  0.125  0.133
#     512 x 3200                    0.058                           0.078
#     1024 x 1024           0.056   0.041                    0.039  0.039
#     1568 x 1568                   0.028                           0.026
#
# The cost of an entry grows with the rows, which each chunk's products are added to. Two cores gain
# more on a whole product: hence the limit of the density beside both.
#
# On a CPU the intermediates of a block should stay in a core's cache. An accelerator wants large
# blocks (by its memory, below) and few launches. Its costs are counted: gathering is 18 launches of
# 2 us more, gradient included, on an H100, which meanwhile does 5e8 operations of a whole product,
# three times, at 50 TFLOP/s. Measured there by Pallas, a gathered product of 8192 x 512 takes as
# long as a whole one at 0.18 of the weights.
COSTS: Mapping[str, Costs] = {
    "cpu": Costs(0.06, 0, 4, 100, 4 * 2**20, 64 * 2**20, 10, True, 256, 40),
    "accelerator": Costs(0.06, 5 * 10**8, 4, 0, 0, 0, 100),
}
_MEMORY_SHARE = 16  # of an accelerator's memory a block may take one part in so many


def costs_on(device: Device) -> Costs:
    """The costs of a device; on an accelerator the size of blocks follows its memory."""
    if device.platform == "cpu":
        return COSTS["cpu"]
    block = memory_of(device) // _MEMORY_SHARE
    return dataclasses.replace(COSTS["accelerator"], block_bytes=block, tail_bytes=block)
