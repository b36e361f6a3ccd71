"""The masked NTK product of a layer applied at many positions, in pure JAX on every device.

A convolution (with its patches as `a`), or a dense layer that `vmap` applies along a sequence, has

    T[n,k,i,j]     = sum_s d[n,k,i,s] a[n,j,s]
    Theta[n,m,k,l] = sum_ij c[i,j] T1[n,k,i,j] T2[m,l,i,j]

Both are plain matrix products, which XLA takes as fast as a kernel of our own would: `README.md`
has the counts.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ._blocks import block_size, scan_blocks
from ._dispatch import target_device
from ._operation import Plan, check_factors, check_shapes, reference_implementation, run
from ._precision import Precision, accumulator_dtype, resolve

OPERATION = "masked_tangent_ntk"


def masked_tangent_ntk(
    a1: Float[Array, "n j s"],
    d1: Float[Array, "n k i s"],
    a2: Float[Array, "m j s"],
    d2: Float[Array, "m l i s"],
    mask: Bool[Array, "i j"] | Float[Array, "i j"] | None = None,
    *,
    precision: Precision | None = None,
) -> Float[Array, "n m k l"]:
    """The NTK contribution of one masked weight `W[i, j]` applied at many positions `s`.

    A convolution, with its patches as activations, or a dense layer along a sequence: y_s = W a_s.

        T[n,k,i,j]     = sum_s d[n,k,i,s] a[n,j,s]
        Theta[n,m,k,l] = sum_ij mask[i,j] T1[n,k,i,j] T2[m,l,i,j]

    Differentiable (reverse mode, first order) in all four factors; the mask is a constant. The
    per-sample tangents `T` are made for some output features i at a time; the gradient makes them
    again instead of keeping them.

    **Arguments:**

    - `a1`, `a2`: activations that came into the layer at every position, for both batches.
    - `d1`, `d2`: cotangents `df_k/dy_is` of its output, of the same dtype as the activations.
    - `mask`: the 0/1 mask of the weight, or any weights `c >= 0` of the sum over parameters;
      `None` for all ones.
    - `precision`: `"float32"`, `"tf32"` or `"bfloat16"`, with errors below 1e-5, 1e-3 and 1e-2 of
      the largest entry; by default `"bfloat16"` for bfloat16 inputs and `"float32"` for others.
      The device may be more exact than asked.

    **Returns:**

    `Theta`: float64 for float64 factors and float32 otherwise.

    **Raises:**

    `ValueError` when shapes, dtypes or names do not fit, before anything is traced.
    """
    shape = _check(a1, d1, a2, d2, mask)
    how = resolve(OPERATION, precision, a1.dtype)
    return run(Plan(_IN_JAX, how, target_device().kind, shape), a1, d1, a2, d2, mask)


def _check(a1, d1, a2, d2, mask) -> tuple[int, int, int, int, int, int]:
    """The sizes (N, M, K, L, I, J), if all arguments agree on them."""
    check_factors(OPERATION, (a1, d1, a2, d2), mask, ranks=(3, 4, 3, 4))
    (n, j, s), (_, k, i, _), m, l = a1.shape, d1.shape, a2.shape[0], d2.shape[1]  # noqa: E741
    expected = dict(d1=(n, k, i, s), a2=(m, j, s), d2=(m, l, i, s), mask=(i, j))
    check_shapes(OPERATION, dict(a1=a1, d1=d1, a2=a2, d2=d2, mask=mask), expected)
    return n, m, k, l, i, j


def _product(a1, d1, a2, d2, mask):
    dtype = accumulator_dtype(a1.dtype)
    a1, d1, a2, d2 = (x.astype(dtype) for x in (a1, d1, a2, d2))
    return _masked(a1, d1, a2, d2, None if mask is None else mask.astype(dtype))


_IN_JAX = reference_implementation(_product)


@jax.custom_vjp
def _masked(a1, d1, a2, d2, c):
    def block(theta, rows):
        d1, d2, *c = rows
        return theta + _weighted(_tangents(a1, d1), *c) @ _tangents(a2, d2).T, None

    n, k, m, l = *d1.shape[:2], *d2.shape[:2]
    rows, size = _rows(a1, d1, a2, d2, c)
    theta, _ = scan_blocks(block, jnp.zeros((n * k, m * l), a1.dtype), rows, d1.shape[2], size)
    return theta.reshape(n, k, m, l).transpose(0, 2, 1, 3)


def _masked_forward(a1, d1, a2, d2, c):
    return _masked(a1, d1, a2, d2, c), (a1, d1, a2, d2, c)


def _masked_backward(residuals, g):
    """The cotangents of both factors of both sides, with the tangents made again.

    With g = dL/dTheta:  dL/dT1[n,k,i,j] = c[i,j] sum_ml g[n,m,k,l] T2[m,l,i,j], and on each side
    dL/dd[n,k,i,s] = sum_j dL/dT a[n,j,s],  dL/da[n,j,s] = sum_ki dL/dT d[n,k,i,s].
    """
    a1, d1, a2, d2, c = residuals
    n, k, m, l = *d1.shape[:2], *d2.shape[:2]
    g = g.transpose(0, 2, 1, 3).reshape(n * k, m * l)

    def side(a, d, t_bar):
        d = d.transpose(1, 2, 0, 3)
        t_bar = t_bar.reshape(*d.shape[:3], a.shape[1])
        d_bar = jnp.einsum("nkij,njs->nkis", t_bar, a)
        return jnp.einsum("nkij,nkis->njs", t_bar, d), d_bar.transpose(2, 0, 1, 3)

    def block(sums, rows):
        d1, d2, *c = rows
        a1_bar, d1_bar = side(a1, d1, _weighted(g @ _tangents(a2, d2), *c))
        a2_bar, d2_bar = side(a2, d2, _weighted(g.T @ _tangents(a1, d1), *c))
        return (sums[0] + a1_bar, sums[1] + a2_bar), (d1_bar, d2_bar)

    rows, size = _rows(a1, d1, a2, d2, c)
    zeros = (jnp.zeros_like(a1), jnp.zeros_like(a2))
    (a1_bar, a2_bar), (d1_bar, d2_bar) = scan_blocks(block, zeros, rows, d1.shape[2], size)
    return a1_bar, d1_bar.transpose(1, 2, 0, 3), a2_bar, d2_bar.transpose(1, 2, 0, 3), None


_masked.defvjp(_masked_forward, _masked_backward)


def _rows(a1, d1, a2, d2, c):
    """What is needed of each output feature i, and how many of them make a block."""
    tangents = (d1.shape[0] * d1.shape[1] + d2.shape[0] * d2.shape[1]) * a1.shape[1]
    rows = (d1.transpose(2, 0, 1, 3), d2.transpose(2, 0, 1, 3), *(() if c is None else (c,)))
    return rows, block_size(d1.shape[2], tangents * a1.dtype.itemsize)


def _tangents(a, d):
    """`T[(n,k),(i,j)]` of some rows i: a[n,j,s], d[i,n,k,s].

    It is d that is transposed: transposing the product, as the einsum would, moves more.
    """
    t = jnp.einsum("nkis,njs->nkij", d.transpose(1, 2, 0, 3), a)
    return t.reshape(t.shape[0] * t.shape[1], -1)


def _weighted(t, c=None):
    return t if c is None else t * c.reshape(1, -1)
