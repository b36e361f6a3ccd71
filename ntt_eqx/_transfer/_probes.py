"""Probes: which entries of two kernels over the outputs are compared."""

import abc
from typing import Any

import equinox as eqx
from jaxtyping import Array, Float, PRNGKeyArray

from .._checks import check_count
from .._ntk import sketch_directions


class AbstractProbe(eqx.Module):
    """Which entries `k, l` of a kernel over the outputs are computed and compared."""

    @abc.abstractmethod
    def view(
        self, key: PRNGKeyArray, num_outputs: int
    ) -> tuple[Any, tuple[Float[Array, "r k"], Float[Array, "s k"]] | None]:
        """The arguments `outputs` and `directions` of `ntk` at a step.

        **Arguments:**

        - `key`: the step's own key.
        - `num_outputs`: K.

        **Returns:**

        `("full" | "diagonal" | "trace", None)`, or `("full", (V[R, K], W[S, K]))`.
        """


class Full(AbstractProbe):
    """All pairs of outputs, as in the paper."""

    def view(self, key: PRNGKeyArray, num_outputs: int) -> tuple[Any, Any]:
        """`"full"`."""
        return "full", None


class Diagonal(AbstractProbe):
    """The pairs k = l."""

    def view(self, key: PRNGKeyArray, num_outputs: int) -> tuple[Any, Any]:
        """`"diagonal"`."""
        return "diagonal", None


class Trace(AbstractProbe):
    """The mean of the diagonal."""

    def view(self, key: PRNGKeyArray, num_outputs: int) -> tuple[Any, Any]:
        """`"trace"`."""
        return "trace", None


class Sketch(AbstractProbe):
    """Random output directions, drawn anew at every step; squared distances are right on average.

    For many outputs, where all pairs cost too much; see `sketch_directions`.

    Attributes:
        size: directions R on either side, from 1 to the number of outputs.
    """

    size: int = eqx.field(static=True, default=8)

    def __check_init__(self) -> None:
        """Reject sizes below 1."""
        check_count("Sketch: size", self.size)

    def view(self, key: PRNGKeyArray, num_outputs: int) -> tuple[Any, Any]:
        """`"full"` along directions drawn from `key`; `ValueError` for more than outputs."""
        if self.size > num_outputs:
            raise ValueError(
                f"Sketch: size (sketch_size of NTTConfig) is {self.size}, but the model has "
                f"{num_outputs} outputs; take at most {num_outputs}, or outputs='full'."
            )
        return "full", sketch_directions(key, self.size, num_outputs)
