"""`StepInfo`: what a step tells its loss and its refresh."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray, UInt32

_KIND = "threefry2x32"  # whatever JAX's default is


class StepInfo(eqx.Module):
    """Information about a step, for its loss and its refresh.

    Attributes:
        step: number of steps done, int32.
        key: the step's own PRNG key, another one at every step.
        density: share of prunable weights asked for at this step, a number; where each layer has
            its own, the share that the mask keeps.
        support: where the mask's kept weights are, as `NTTState.support`. The kernel compares it
            with any mask but the very array that it is of; `None` where they are not known.
        metric_mask: the mask that the active kernel counts by, where it is not the student's: see
            `RefreshView.dense_gradient`.
    """

    step: Int[Array, ""]
    key: PRNGKeyArray
    density: Any
    support: Any = None
    metric_mask: Any = None


def key_of_seed(seed: int) -> PRNGKeyArray:
    """The key that a seed stands for, in every process: JAX's default may be another kind."""
    return jax.random.key(seed, impl=_KIND)


def key_words(key: PRNGKeyArray | None) -> UInt32[Array, "2"]:
    """Two words that stand for `key`; arrays of plain numbers can be stored in any file."""
    given: Any = key_of_seed(0) if key is None else key
    if not jnp.issubdtype(given.dtype, jax.dtypes.prng_key):
        given = jax.random.wrap_key_data(given)
    if str(jax.random.key_impl(given)) == _KIND:
        return jax.random.key_data(given)
    return jax.random.bits(given, (2,), jnp.uint32)


def step_key(words: UInt32[Array, "2"], step: Int[Array, ""]) -> PRNGKeyArray:
    """The key of a step, from the words of the state before it."""
    return jax.random.fold_in(jax.random.wrap_key_data(words, impl=_KIND), step)
