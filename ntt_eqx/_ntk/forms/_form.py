"""What a form is: one way for a parameter to enter the kernel, and what that costs."""

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any, Generic, Literal, TypeAlias, TypeVar

import equinox as eqx
from jaxtyping import Array

from ..._types import Outputs
from ...kernels import Precision

Path: TypeAlias = Literal[
    "factors", "gathered factors", "tangents", "gathered tangents", "jacobian", "unused"
]
Kept = TypeVar("Kept")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes that determine the cost of a kernel.

    Attributes:
        n: samples of the first batch.
        m: samples of the second.
        directions: output directions R a sample; K where none are given.
        all_pairs: whether all R^2 pairs of them are wanted, or only those of k = l.
        itemsize: bytes of a number.
    """

    n: int
    m: int
    directions: int
    all_pairs: bool
    itemsize: int

    @property
    def entries(self) -> int:
        """Entries of the kernel of a pair of samples."""
        return self.directions**2 if self.all_pairs else self.directions


@dataclasses.dataclass(frozen=True)
class Cost:
    """Operations and bytes for one parameter's share of the kernel.

    Attributes:
        flops: floating-point operations of the contraction. The passes that make the factors are
            not counted, because all parameters share them.
        layer_flops: operations to evaluate the layer for one sample; 0 if there is no layer.
        stored: bytes of the factors (or tangents) of one sample.
        per_row: temporary bytes of the contraction for each sample of the first batch.
        per_column: the same for the second.
        per_pair: the same for each pair of samples, without the result.
        once: temporary bytes that do not depend on the number of samples.
    """

    flops: int
    layer_flops: int
    stored: int
    per_row: int
    per_column: int
    per_pair: int
    once: int


def cost_of_numbers(
    sizes: Sizes,
    *,
    flops: int,
    stored: int,
    layer_flops: int = 0,
    per_row: int = 0,
    per_column: int = 0,
    per_pair: int = 0,
    once: int = 0,
) -> Cost:
    """The cost of a form that stores so many numbers.

    Every form also holds two kernels of a pair of samples beside the result: its own share, and
    the sum of all shares that it is added to.
    """
    numbers = (stored, per_row, per_column, 2 * sizes.entries + per_pair, once)
    return Cost(flops, layer_flops, *(sizes.itemsize * amount for amount in numbers))


class AbstractForm(eqx.Module, Generic[Kept]):
    """One way for a parameter to enter the kernel's sum; a plan has one form a term.

    `Kept` is what the form stores of every sample: factors or tangents.

    Attributes:
        path: the name that `explain` prints.
    """

    path: eqx.AbstractClassVar[Path]

    @property
    @abc.abstractmethod
    def parameters(self) -> tuple[int, ...]:
        """Numbers of the parameters whose share this is: a weight and its bias, if it has one."""

    @abc.abstractmethod
    def cost(self, sizes: Sizes, kept: int = 0) -> Cost:
        """The cost of the term if its metric has `kept` non-zeros."""

    @abc.abstractmethod
    def metric(self, weights: Sequence[Array | None], index: Sequence[Any], dtype: Any) -> Any:
        """The metric `c` of the term as `contract` needs it; `None` if it is 1 everywhere.

        **Arguments:**

        - `weights`: `c` for each parameter of the program, `None` for 1.
        - `index`: for each parameter the `MaskIndex` of its mask, or `None` if unknown.
        """

    @abc.abstractmethod
    def count(self, metric: Any) -> int | None:
        """Number of weights, bias left out, with a non-zero metric; `None` for all."""

    @abc.abstractmethod
    def keep(self, metric: Any, operands: tuple[Array, ...], d: Array) -> Kept:
        """What is stored of one sample.

        **Arguments:**

        - `operands`: the inputs of the layer's step.
        - `d`: the cotangents `[R, ...]` of its output.
        """

    @abc.abstractmethod
    def contract(
        self, one: Kept, two: Kept, metric: Any, outputs: Outputs, precision: Precision
    ) -> Array:
        """The term `sum_p c_p df_k(x_n)/dp df_l(x'_m)/dp` of two batches.

        **Arguments:**

        - `one`, `two`: what was kept of N and M samples.

        **Returns:**

        `[N, M, R, S]`, `[N, M, R]` or `[N, M]`, as `outputs` says.
        """
