"""The kernel as an operator on data that is read batch by batch."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._batch import as_array, as_stream, inputs_of
from .._distribute import left_to_xla, replicate
from .._types import KernelKind, PyTree
from ..kernels import Precision
from ._operator import (
    AbstractNTKOperator,
    NTKOperator,
    given_vectors,
    ntk_operator,
    pull_shared,
    push_shared,
    vectors_at_once,
)


class StreamedNTKOperator(AbstractNTKOperator):
    """The kernel between two streams of batches; `streamed_ntk_operator` makes it.

    Attributes:
        first: the operator of the first batch with itself, for model and settings.
        batches1: yields the samples of the rows, each time anew.
        batches2: those of the columns; `None` for those of the rows.
        lengths: the number of samples of either side.
    """

    first: NTKOperator
    batches1: Any
    batches2: Any
    lengths: tuple[int, int] = eqx.field(static=True)

    def mv(self, v: Float[Array | np.ndarray, "m k *r"]) -> Float[Array, "n k *r"]:
        """The product with a vector `[M, K]`, or with R of them at once, `[M, K, R]`.

        It goes through the batches of the columns and then through those of the rows. `ValueError`
        for another shape or dtype, and when the batches are no longer as many samples.
        """
        given = given_vectors("streamed_ntk_operator", self.in_structure(), v)
        given, size = replicate(given), vectors_at_once(self.first)
        if given.ndim == 2 or size >= given.shape[2]:
            return self._product(given)
        parts = [self._product(given[..., n : n + size]) for n in range(0, given.shape[2], size)]
        return jnp.concatenate(parts, axis=2)

    def _product(self, v: Array) -> Array:
        columns = self.batches1 if self.batches2 is None else self.batches2
        start, total = 0, None
        for operator in self._each(columns):
            stop = start + len(operator.x1)
            part = _pull(operator, v[start:stop]) if stop <= len(v) else None
            self._check(part is not None)
            total = part if total is None else jax.tree.map(jnp.add, total, part)
            start = stop
        self._check(start == self.lengths[1])
        found = [_push(operator, total) for operator in self._each(self.batches1)]
        self._check(sum(map(len, found)) == self.lengths[0])
        return jnp.concatenate(found)

    def transpose(self) -> "StreamedNTKOperator":
        """The operator with rows and columns exchanged, `[N, K] -> [M, K]`."""
        if self.batches2 is None:
            return self
        lengths = self.lengths[1], self.lengths[0]
        return StreamedNTKOperator(self.first, self.batches2, self.batches1, lengths)

    @property
    def is_symmetric(self) -> bool:
        """Whether it is the kernel of a stream with itself."""
        return self.batches2 is None

    def in_structure(self) -> jax.ShapeDtypeStruct:
        """Shape `[M, K]` and dtype of the vectors that it takes."""
        return self._side(self.lengths[1])

    def out_structure(self) -> jax.ShapeDtypeStruct:
        """Shape `[N, K]` and dtype of the vectors that it gives."""
        return self._side(self.lengths[0])

    def _side(self, length: int) -> jax.ShapeDtypeStruct:
        one = self.first.out_structure()
        return jax.ShapeDtypeStruct((length, one.shape[1]), one.dtype)

    def _each(self, batches: Any) -> Iterator[NTKOperator]:
        for x in samples("streamed_ntk_operator", batches):
            x = replicate(jnp.asarray(x))
            yield eqx.tree_at(lambda operator: operator.x1, self.first, x)

    @staticmethod
    def _check(same: bool) -> None:
        if not same:
            raise ValueError(
                "streamed_ntk_operator: the batches hold another number of samples than when the "
                "operator was made; they must be the same each time."
            )


def streamed_ntk_operator(
    model: PyTree,
    batches1: Iterable[Any],
    batches2: Iterable[Any] | None = None,
    *,
    kernel: KernelKind = "active",
    metric: PyTree | None = None,
    layers: str | Sequence[str] | None = None,
    precision: Precision = "float32",
) -> StreamedNTKOperator:
    """`ntk_operator` of samples that do not fit into memory.

    A product reads the batches of the columns and then those of the rows, one at a time. It runs
    on the host, outside of `jit`; each shape of a batch is compiled once.

    **Arguments:**

    - `model`, `kernel`, `metric`, `precision`: those of `ntk`.
    - `layers`: those of `ntk_operator`.
    - `batches1`, `batches2`: the samples of the rows and of the columns, in the same order each
      time: a list, a `DataLoader` without shuffling, or an object of your own with `__iter__`. A
      batch is an array `[B, ...]`; of a pair `(x, y)` the labels are left aside. `None` repeats the
      rows.

    **Returns:**

    A `StreamedNTKOperator`: `operator.mv(v)` maps `[M, K]` to `[N, K]`, and `[M, K, R]` to
    `[N, K, R]`.

    **Raises:**

    `ValueError` for an iterator, which can be gone through only once, for no batch at all, and for
    models and samples that `ntk` refuses.
    """
    caller = "streamed_ntk_operator"
    lengths, firsts = [], []
    for name, batches in (("batches1", batches1), ("batches2", batches2)):
        if batches is None:
            continue
        length = 0
        for x in samples(caller, as_stream(f"{caller}: {name}", batches, labels=False, again=True)):
            if not length:
                firsts.append(x)
            length += len(x)
        if not length:
            raise ValueError(f"{caller}: {name} has no batch.")
        lengths.append(length)
    how: Any = {"kernel": kernel, "metric": metric, "layers": layers, "precision": precision}
    first = ntk_operator(model, *firsts, **how)
    if batches2 is not None:
        first = eqx.tree_at(lambda o: o.x2, first, None)
    both = (lengths[0], lengths[-1])
    return StreamedNTKOperator(first, batches1, batches2, both)


def samples(caller: str, batches: Iterable[Any]) -> Iterator[Array | np.ndarray]:
    """The samples of each batch, without labels."""
    for batch in as_stream(caller, batches, labels=False):
        yield as_array(caller, "a batch", inputs_of(caller, batch))


@eqx.filter_jit
def _pull(operator: NTKOperator, v: Array) -> list[Array]:
    return left_to_xla(pull_shared, operator, v)


@eqx.filter_jit
def _push(operator: NTKOperator, tangent: Any) -> Array:
    return left_to_xla(push_shared, operator, tangent)
