"""`ConstantFanIn`: every output of a layer keeps the same number of inputs."""

import math

import equinox as eqx
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from .._checks import check_count
from ._pattern import AbstractOrdered
from ._select import by_index, order_keys
from ._tiles import pool, spread


class ConstantFanIn(AbstractOrdered):
    """Every output keeps the same number of inputs; groups of outputs may share which.

    The pattern of SRigL (Lasby et al., ICLR 2024, arXiv 2305.02299): rows of kept weights have one
    length, so their products waste nothing. If groups of outputs keep the same inputs, a layer is a
    few dense products of the inputs that each group gathers, which `sparse_layers` computes so.

    Inputs are all weights of an output, so those of a filter are its channels times its window. A
    density that is no multiple of one input for all groups gives some of them one input more: those
    whose next input scores highest.

    Attributes:
        shared_by: so many consecutive outputs keep the same inputs, by the mean of their scores;
            the last group may be smaller.
    """

    shared_by: int = eqx.field(static=True, default=1)

    def __check_init__(self) -> None:
        """Reject groups without outputs."""
        check_count("ConstantFanIn: shared_by", self.shared_by)

    def groups(
        self, scores: Float[Array, "..."], name: str, density: float | Array | None
    ) -> Float[Array, "..."]:
        """How far each input is above the last one of its group, plus a fraction by its score.

        The highest of these are the first inputs of all groups, then the second ones, and so on.
        All are NaN if ties decide most of them.
        """
        if density is None:
            raise ValueError(
                "make_mask: scope='global' takes one density and no constant fan-in, which sets "
                "that of each layer; use scope='layer'."
            )
        rows = scores.reshape(len(scores), -1)
        rows = pool(rows, (min(self.shared_by, len(rows)), 1))
        keys = order_keys(rows)
        best = jnp.argsort(~keys, axis=1, stable=True)  # ties by the lowest index
        count = _whole(density, rows.shape[1])
        rank = jnp.argsort(best, axis=1).astype(jnp.int32)
        undecided = _undecided(keys, rank, count, rows.dtype)
        # In [-1/4, 1/4], in the order of the scores of all groups.
        size = jnp.abs(rows)
        share = rows / (4 * (size + jnp.mean(jnp.where(jnp.isfinite(rows), size, 0))))
        # `of_mask` takes a mask as scores; the groups above 1/2 are those that the mask keeps.
        place = (count - rank).astype(rows.dtype) + 0.5
        ranked = jnp.where(jnp.isfinite(share), share, 0) + place
        barred = jnp.where(rows == -jnp.inf, rows, ranked)
        return jnp.where(undecided | jnp.isnan(rows), jnp.nan, barred)

    def spread(
        self, marks: Bool[Array, "..."], shape: tuple[int, ...], name: str
    ) -> Bool[Array, "..."]:
        """The marks of a group for each of its outputs."""
        flat = (shape[0], math.prod(shape[1:]))
        return spread(marks, (min(self.shared_by, shape[0]), 1), flat).reshape(shape)

    def keeps_count(self, shape: tuple[int, ...]) -> bool:
        """Whether all groups have the same size."""
        return shape[0] % min(self.shared_by, shape[0]) == 0

    def alike_outputs(self, shape: tuple[int, ...]) -> int:
        """Number of outputs in a group."""
        return min(self.shared_by, shape[0])

    def averages(self, shape: tuple[int, ...]) -> bool:
        """Whether outputs share their inputs."""
        return min(self.shared_by, shape[0]) > 1


def _whole(density: float | Array, inputs: int) -> Int[Array, ""]:
    """The inputs that every group keeps at least."""
    if isinstance(density, Tracer):
        return jnp.floor(density.astype(jnp.float32) * inputs).astype(jnp.int32)
    return jnp.asarray(math.floor(float(density) * inputs + 1e-9), jnp.int32)


def _undecided(
    keys: Array, rank: Int[Array, "groups inputs"], count: Int[Array, ""], dtype: object
) -> Bool[Array, ""]:
    """Whether the index decides most of the inputs, because their scores are equal.

    A group keeps `count` inputs or one more. The index decides an input if it does in both cases.
    """
    ties = jnp.ones(keys.shape, bool)
    for many in (count, count + 1):
        kept = rank < many
        last = jnp.where(kept, keys, jnp.full_like(keys, jnp.iinfo(keys.dtype).max))
        at_edge = keys == jnp.min(last, axis=1, keepdims=True)
        ties &= at_edge & jnp.any(at_edge & ~kept, axis=1, keepdims=True)
    return by_index(keys, ties, jnp.sum(ties, dtype=jnp.int32), dtype)
