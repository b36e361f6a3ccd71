"""Two direct implementations of the kernel: slow, and independent of layers and factors.

They differentiate the model as a black box, so they can check the fast path.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._types import PyTree, wide_dtype, widen
from ._trace import real_parameters


def jacobian_contraction(
    model: PyTree, x1: Array, x2: Array, metric: list[Any]
) -> Float[Array, "n m k l"]:
    """Explicit per-sample Jacobians of all parameters, then one sum over parameters.

    Novak et al. 2022, "Fast finite width neural tangent kernel", section 3.1.
    """
    params, call, spread = _split(model)

    def rows(x):
        jacobian = jax.vmap(jax.jacrev(call), (None, 0))(params, x)
        return [widen(j) for j in jax.tree.leaves(jacobian)]

    total, dtype = 0.0, wide_dtype(jax.eval_shape(call, params, x1[0]).dtype)
    for j1, j2, c in zip(rows(x1), rows(x2), spread(metric), strict=True):
        j1 = j1 if c is None else j1 * c.astype(j1.dtype)[None, None]
        flat = lambda j: j.reshape(*j.shape[:2], -1)
        total = total + jnp.einsum("nkp,mlp->nmkl", flat(j1), flat(j2)).astype(dtype)
    return total  # pyright: ignore[reportReturnType]


def ntk_vector_products(
    model: PyTree, x1: Array, x2: Array, metric: list[Any]
) -> Float[Array, "n m k l"]:
    """For every pair of samples and every output, a VJP at `x2` pushed forward by a JVP at `x1`.

    What the code published with NTT runs; Novak et al. 2022, section 3.3.
    """
    params, call, spread = _split(model)
    weights = spread(metric)

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


def _split(model: PyTree) -> tuple[list[Array], Callable[..., Array], Callable[..., list[Any]]]:
    """The parameters as real arrays, the model as a function of them, and the metric for them."""
    arrays, parameters, rebuild = real_parameters(model)

    def spread(metric: list[Any]) -> list[Any]:
        return [p.spread(c) for p, c in zip(parameters, metric, strict=True)]

    return arrays, lambda p, x: jnp.reshape(rebuild(p)(x), (-1,)), spread
