"""N:M patterns: some of every few inputs of an output."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Bool, Float

from ._pattern import AbstractOrdered
from ._select import by_index, order_keys


class NM(AbstractOrdered):
    """N of every M consecutive inputs of an output are kept (2:4 is what sparse tensor cores take).

    Groups run along a weight's second axis, the one that the layer's sum runs over, which M must
    divide. Every group keeps its own N highest scores, ties to the lowest index.

    Attributes:
        n: weights kept in each group.
        m: size of a group.
    """

    n: int = eqx.field(static=True, default=2)
    m: int = eqx.field(static=True, default=4)

    def __check_init__(self) -> None:
        """Reject an impossible pattern."""
        if not 0 < self.n <= self.m:
            raise ValueError(f"NM: needs 0 < n <= m, got n={self.n} and m={self.m}.")

    def groups(
        self, scores: Float[Array, "..."], name: str, density: float | Array | None
    ) -> Float[Array, "..."]:
        """1 for the `n` highest of every group of `m` along the second axis, 0 for the others.

        All scores are NaN if ties decide most groups.
        """
        if density is None:
            raise ValueError(
                "make_mask: scope='global' takes one density, no allocation and no N:M pattern; "
                "these set the densities of layers, which only scope='layer' keeps."
            )
        if not isinstance(density, Tracer) and density == 1.0:
            return scores
        if isinstance(density, Tracer) or round(float(density) * self.m, 9) != self.n:
            given = "a schedule" if isinstance(density, Tracer) else f"{float(density):g}"
            raise ValueError(
                f"make_mask: the pattern {self.n}:{self.m} has density {self.n / self.m:g}, but "
                f"{name} was given {given}; an N:M pattern has one density, so it takes one step."
            )
        if scores.ndim < 2 or scores.shape[1] % self.m:
            raise ValueError(
                f"make_mask: {self.n}:{self.m} needs a multiple of {self.m} inputs, but {name} has "
                f"shape {scores.shape}; give it density 1 or leave it out with `where=`."
            )
        marks, undecided = _keep_in_groups(scores, self.n, self.m)
        return jnp.where(undecided, jnp.nan, marks.astype(scores.dtype))

    def spread(
        self, marks: Bool[Array, "..."], shape: tuple[int, ...], name: str
    ) -> Bool[Array, "..."]:
        """The marks themselves."""
        return marks

    def keeps_count(self, shape: tuple[int, ...]) -> bool:
        """Every group keeps `n` weights."""
        return True


@functools.partial(jax.jit, static_argnums=(1, 2))
def _keep_in_groups(
    scores: Float[Array, "..."], n: int, m: int
) -> tuple[Bool[Array, "..."], Bool[Array, ""]]:
    """The marks, and whether ties decide most groups."""
    last = jnp.moveaxis(order_keys(scores), 1, -1)
    keys = last.reshape(*last.shape[:-1], -1, m)
    # rank_i = #{j : key_j > key_i, or key_j = key_i and j < i}
    mine, other = keys[..., :, None], keys[..., None, :]
    index = jnp.arange(m, dtype=jnp.int32)
    before = (index[None, :] < index[:, None]).reshape((1,) * (keys.ndim - 1) + (m, m))
    rank = jnp.sum((other > mine) | ((other == mine) & before), axis=-1, dtype=jnp.int32)
    kept = rank < n
    # tied with one that the index treats otherwise
    ties = jnp.any((other == mine) & (kept[..., :, None] != kept[..., None, :]), axis=-1)
    undecided = by_index(keys, ties, jnp.sum(ties, dtype=jnp.int32), scores.dtype)
    return jnp.moveaxis(kept.reshape(last.shape), -1, 1), undecided
