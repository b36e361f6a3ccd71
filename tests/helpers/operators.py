"""Products of operators beside those of the formed kernel."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import ntt_eqx as ntt

from .comparison import relative_error
from .interpreter import interpreted


def vectors(structure, *r, seed=5):
    """Normal vectors of an operator, or a block of them."""
    v = np.random.default_rng(seed).normal(size=(*structure.shape, *r))
    return jnp.asarray(v, structure.dtype)


def product(theta, v):
    """The product of the kernel `[N, M, K, L]` with a vector or a block."""
    return jnp.einsum("nmkl,ml...->nk...", theta, v)


def worst_error(sparse, x1, x2, seed=0, evaluator=interpreted):
    """Of products by both kernels with a vector, a block and, transposed, a block.

    And of the operator of `x1` with itself. Beside the kernel from explicit Jacobians on one
    device; batches do not divide the samples, and the ambient kernel has learning rates. The
    `evaluator` runs the products.
    """
    params, static = eqx.partition(sparse, eqx.is_inexact_array)
    rng = np.random.default_rng(seed)
    rate = lambda w: jnp.asarray(rng.uniform(0, 2, w.shape))
    rates = jax.tree.map(rate, eqx.filter(sparse.model, eqx.is_inexact_array))
    shapes = ntt.ntk_operator(sparse, x1, x2)
    v, u = vectors(shapes.in_structure(), 2), vectors(shapes.out_structure(), 2)
    kernels = (dict(kernel="active"), dict(kernel="ambient", metric=rates))

    def products(params, mask, x1, x2, v, u):
        model, found = eqx.combine(params, static).with_mask(mask), []
        for how in kernels:
            operator = ntt.ntk_operator(model, x1, x2, **how, batch_size=2)
            own = ntt.ntk_operator(model, x1, **how, batch_size=2)
            found += [operator.mv(v), operator @ v[..., 0], operator.T.mv(u), own.mv(u)]
        return found

    def formed(params, mask, x1, x2, v, u):
        model, found = eqx.combine(params, static).with_mask(mask), []
        for how in kernels:
            of = lambda *x, how=how: ntt.ntk(model, *x, **how, implementation="jacobian")
            theta = of(x1, x2)
            assert shapes.shape == ntt.kernel_matrix(theta).shape
            back = theta.transpose(1, 0, 3, 2)
            found += [product(theta, v), product(theta, v[..., 0])]
            found += [product(back, u), product(of(x1), u)]
        return found

    given = (params, sparse.mask, x1, x2, v, u)
    found, right = evaluator(products)(*given), interpreted(formed)(*given)
    return max(map(relative_error, found, right))
