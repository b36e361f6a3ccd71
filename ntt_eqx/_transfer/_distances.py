"""Distances between the outputs, or between the kernels, of a student and its teacher."""

import abc

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._types import widen


class AbstractDistance(eqx.Module):
    """A differentiable distance between two arrays of one shape, as a field of `KernelMatching`."""

    @abc.abstractmethod
    def __call__(
        self, student: Float[Array, "*shape"], teacher: Float[Array, "*shape"]
    ) -> Float[Array, ""]:
        """The distance, a scalar.

        **Arguments:**

        - `student`, `teacher`: outputs `[batch, K]`, or kernels `[N, M, *outputs]` with the pairs
          of outputs that the probe gives. The teacher's carry no gradient.
        """


class MeanSquare(AbstractDistance):
    """The mean squared difference of all entries, as in the paper."""

    def __call__(
        self, student: Float[Array, "*shape"], teacher: Float[Array, "*shape"]
    ) -> Float[Array, ""]:
        """Mean over all entries of `(student - teacher)^2`, in float32 at least."""
        return jnp.mean(jnp.square(widen(student) - widen(teacher)))


class Alignment(AbstractDistance):
    """Compare the shape of two kernels, not their scale.

        D = 1 - A,   A = <C Theta_s, C Theta_t> / (|C Theta_s| |C Theta_t|)

    with the Frobenius product over all entries. `C` subtracts the means over either batch, for each
    pair of outputs: centred kernel alignment (Cortes et al., JMLR 2012). A multiple of the
    teacher's kernel has A = 1, because the learning rate can absorb the factor. A kernel that is
    constant over all pairs of samples has A = 0 and no gradient.
    """

    def __call__(
        self, student: Float[Array, "n m *outputs"], teacher: Float[Array, "n m *outputs"]
    ) -> Float[Array, ""]:
        """1 - A."""
        return 1.0 - jnp.sum(_shape_of(student) * _shape_of(teacher))


def _shape_of(theta: Float[Array, "n m *outputs"]) -> Float[Array, "n m *outputs"]:
    """The centred kernel divided by its norm; 0 where its entries differ by rounding alone."""
    size = jax.lax.stop_gradient(jnp.max(jnp.abs(theta)))  # so that no square under- or overflows
    centred = _centred(theta / jnp.where(size > 0, size, jnp.ones_like(size)))
    square = jnp.sum(jnp.square(centred))
    differs = square > theta.size * (4 * jnp.finfo(theta.dtype).eps) ** 2
    # Both branches of a `where` are differentiated: the root of 0 has no slope.
    norm = jnp.sqrt(jnp.where(differs, square, jnp.ones_like(square)))
    return jnp.where(differs, centred / norm, jnp.zeros_like(centred))


def _centred(theta: Float[Array, "n m *outputs"]) -> Float[Array, "n m *outputs"]:
    rows = theta - jnp.mean(theta, axis=0, keepdims=True)
    return rows - jnp.mean(rows, axis=1, keepdims=True)
