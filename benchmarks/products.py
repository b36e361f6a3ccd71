"""Products of one layer: what the benchmarks of the kernels run.

`LAYERS` has the layers of the paper's networks; a `Product` is one of them, or any other, with
batches, outputs and a mask.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ntt_eqx import kernels


@dataclasses.dataclass(frozen=True)
class Product:
    """One layer and one pair of batches; `s` positions for a layer applied at many.

    The mask is `"whole"`, or its non-zeros are `"gathered"`.
    """

    name: str
    n: int
    i: int
    j: int
    k: int = 10
    s: int | None = None
    density: float = 0.05
    mask: str = "whole"

    @property
    def nonzeros(self) -> int:
        """Of the mask."""
        return round(self.density * self.i * self.j)

    @property
    def operation(self) -> Callable[..., Any]:
        """What is called with its `inputs`."""
        return kernels.masked_ntk if self.s is None else kernels.masked_tangent_ntk

    def flops(self) -> int:
        """Multiplications and additions, forward; for `u` of the gathered non-zeros alone."""
        n, k, i, j = self.n, self.k, self.i, self.j
        if self.s is None:
            weights = self.nonzeros if self.mask == "gathered" else i * j
            return 2 * n * n * (weights + k * i + k * k * i)
        return 2 * (2 * n * k * i * j * self.s + n * n * k * k * i * j)

    def bytes(self, itemsize: int) -> int:
        """What has to be read and written once, forward."""
        s = self.s or 1
        factors = 2 * self.n * s * (self.j + self.k * self.i) * itemsize
        return factors + self.i * self.j + 4 * (self.n * self.k) ** 2

    def inputs(self, seed: int, dtype=jnp.float32):
        """Random factors of both sides and a mask."""
        keys = jax.random.split(jax.random.key(seed), 5)
        s = () if self.s is None else (self.s,)
        shapes = 2 * ((self.n, self.j, *s), (self.n, self.k, self.i, *s))
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
    ("conv4_conv2", dict(i=64, j=576, s=900)),
    ("conv4_conv4", dict(i=128, j=1152, s=169)),
)
# Errors that each precision may have, as shares of the largest entry.
PRECISIONS = {"float32": 1e-5, "tf32": 1e-3, "bfloat16": 1e-2}
