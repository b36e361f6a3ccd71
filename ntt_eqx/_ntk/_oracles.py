"""Two direct implementations of the kernel: slow, and independent of layers and factors.

They differentiate the model as a black box, so they say what is right for the fast path.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .._types import wide_dtype, widen


def jacobian_contraction(
    model: PyTree, x1: Array, x2: Array, metric: PyTree
) -> Float[Array, "n m k l"]:
    """Explicit per-sample Jacobians of all parameters, then one sum over parameters.

    Novak et al. 2022, "Fast finite width neural tangent kernel", section 3.1.
    """
    params, call = _split(model)

    def rows(x):
        jacobian = jax.vmap(jax.jacrev(call), (None, 0))(params, x)
        return [widen(j) for j in jax.tree.leaves(jacobian)]

    total, dtype = 0.0, wide_dtype(jax.eval_shape(call, params, x1[0]).dtype)
    for j1, j2, c in zip(rows(x1), rows(x2), _leaves(metric), strict=True):
        j1 = j1 if c is None else j1 * c.astype(j1.dtype)[None, None]
        flat = lambda j: j.reshape(*j.shape[:2], -1)
        total = total + jnp.einsum("nkp,mlp->nmkl", flat(j1), flat(j2)).astype(dtype)
    return total  # pyright: ignore[reportReturnType]


def ntk_vector_products(
    model: PyTree, x1: Array, x2: Array, metric: PyTree
) -> Float[Array, "n m k l"]:
    """For every pair of samples and every output, a VJP at `x2` pushed forward by a JVP at `x1`.

    What the code published with NTT runs; Novak et al. 2022, section 3.3.
    """
    params, call = _split(model)
    weights = _leaves(metric)

    def weighted(tangent):
        leaves, treedef = jax.tree.flatten(tangent)
        scaled = [
            t if c is None else t * c.astype(t.dtype) for t, c in zip(leaves, weights, strict=True)
        ]
        return jax.tree.unflatten(treedef, scaled)

    def pair(a, b):
        outputs, pull = jax.vjp(lambda p: call(p, b), params)

        def product(cotangent):
            (tangent,) = pull(cotangent)
            return jax.jvp(lambda p: call(p, a), (params,), (weighted(tangent),))[1]

        columns = jax.vmap(product)(jnp.eye(outputs.size, dtype=outputs.dtype))
        return widen(columns.T)  # [l, k] -> [k, l]

    return jax.vmap(lambda a: jax.vmap(lambda b: pair(a, b))(x2))(x1)


def _split(model: PyTree) -> tuple[PyTree, Callable[[PyTree, Array], Array]]:
    params, static = eqx.partition(model, eqx.is_inexact_array)
    return params, lambda p, x: jnp.reshape(eqx.combine(p, static)(x), (-1,))


def _leaves(metric: PyTree) -> list[Any]:
    return jax.tree.leaves(metric, is_leaf=lambda c: c is None)
