"""A parameter in no layer, from its explicit per-sample Jacobian."""

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import numpy as np
from jaxtyping import Array

from ..._types import Outputs
from ...kernels import Precision
from ._form import AbstractForm, Cost, Path, Sizes, cost_of_numbers
from ._kept import Tangents, gram


class JacobianForm(AbstractForm[Tangents]):
    """The derivative of every sample by every entry of a parameter.

    Attributes:
        parameter: its number.
        entries: its real entries.
        is_complex: whether two of them are one complex number.
    """

    path: ClassVar[Path] = "jacobian"
    parameter: int
    entries: int
    is_complex: bool

    @property
    def parameters(self) -> tuple[int, ...]:
        """See `AbstractForm`."""
        return (self.parameter,)

    def cost(self, sizes: Sizes, kept: int = 0) -> Cost:
        """One matrix product over all entries."""
        stored = sizes.directions * self.entries
        flops = 2 * sizes.n * sizes.m * sizes.entries * self.entries
        return cost_of_numbers(sizes, flops=flops, stored=stored, per_row=stored)

    def metric(
        self, weights: Sequence[Array | None], index: Sequence[Any], dtype: Any
    ) -> Array | None:
        """See `AbstractForm`."""
        return weights[self.parameter]

    def count(self, metric: Array | None) -> int | None:
        """See `AbstractForm`."""
        if metric is None:
            return None
        return int(np.count_nonzero(jax.device_get(metric))) // (1 + self.is_complex)

    def keep(self, metric: Array | None, operands: tuple[Array, ...], d: Array) -> Tangents:
        """See `AbstractForm`; `d` are the cotangents of the parameter itself."""
        return Tangents(d.reshape(len(d), -1))

    def contract(
        self,
        one: Tangents,
        two: Tangents,
        metric: Array | None,
        outputs: Outputs,
        precision: Precision,
    ) -> Array:
        """See `AbstractForm`."""
        return gram(one, two, None if metric is None else metric.reshape(-1), outputs)
