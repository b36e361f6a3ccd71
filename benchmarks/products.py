"""Products of one layer: what the benchmarks of the kernels run.

`LAYERS` has the layers of the paper's networks; a `Product` is one of them, or any other, with
batches, outputs and a mask.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from ntt_eqx import kernels


@dataclasses.dataclass(frozen=True)
class Product:
    """One dense layer and one pair of batches.

    The mask is `"whole"`, or its non-zeros are `"gathered"`.
    """

    name: str
    n: int
    i: int
    j: int
    k: int = 10
    density: float = 0.05
    mask: str = "whole"

    @property
    def nonzeros(self) -> int:
        """Of the mask."""
        return round(self.density * self.i * self.j)

    def flops(self) -> int:
        """Multiplications and additions, forward; for `u` of the gathered non-zeros alone."""
        n, k, i, j = self.n, self.k, self.i, self.j
        weights = self.nonzeros if self.mask == "gathered" else i * j
        return 2 * n * n * (weights + k * i + k * k * i)

    def bytes(self, itemsize: int) -> int:
        """What has to be read and written once, forward."""
        factors = 2 * self.n * (self.j + self.k * self.i) * itemsize
        return factors + self.i * self.j + 4 * (self.n * self.k) ** 2

    def inputs(self, seed: int, dtype=jnp.float32):
        """Random factors of both sides and a mask."""
        keys = jax.random.split(jax.random.key(seed), 5)
        shapes = 2 * ((self.n, self.j), (self.n, self.k, self.i))
        factors = [
            jax.random.normal(key, shape, dtype) / math.sqrt(shape[1])
            for key, shape in zip(keys[:4], shapes, strict=True)
        ]
        order = jax.random.permutation(keys[4], self.i * self.j)
        mask = (order < self.nonzeros).reshape(self.i, self.j)
        if self.mask == "whole":
            return *factors, mask
        rows = kernels.gather_rows(mask, self.nonzeros)
        return *factors, rows.metric(mask, jnp.zeros(self.i, dtype))


LAYERS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("lenet_300", dict(i=300, j=784)),
    ("lenet5_dense", dict(i=500, j=800)),
    ("conv4_3200", dict(i=512, j=3200)),
    ("conv4_8192", dict(i=512, j=8192)),
)
# Errors that each precision may have, as shares of the largest entry.
PRECISIONS = {"float32": 1e-5, "tf32": 1e-3, "bfloat16": 1e-2}
