"""The public kernel function."""

from typing import Any, Literal, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, Shaped

from .._sparse import SparseModel
from ._contract import contract
from ._factors import factorise
from ._layers import find_layers
from ._oracles import jacobian_contraction, ntk_vector_products
from ._program import trace

KernelKind: TypeAlias = Literal["active", "ambient"]
Implementation: TypeAlias = Literal["factors", "jacobian", "ntk_vector_products"]

_ORACLES = {"jacobian": jacobian_contraction, "ntk_vector_products": ntk_vector_products}


def ntk(
    model: PyTree,
    x1: Shaped[Array, "n ..."],
    x2: Shaped[Array, "m ..."] | None = None,
    *,
    kernel: KernelKind = "active",
    metric: PyTree | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "n m k l"]:
    """Exact finite-width neural tangent kernel of any Equinox model, masked or not.

    `Theta[n,m,k,l] = sum_p c_p df_k(x1_n)/dp df_l(x2_m)/dp` over all floating-point parameters `p`
    (Jacot et al. 2018; with a mask: Liu & Zenke 2020, section 3).

    **Arguments:**

    - `model`: maps one sample to its outputs; a `SparseModel` or any other Equinox model.
    - `x1`, `x2`: two batches of samples; `x2=None` means `x1` again.
    - `kernel`: `"active"` sums over kept weights only (`c_p` is the mask), `"ambient"` over all
      weights, at the masked weights (`c_p = 1`). The same for a model without a mask.
    - `metric`: further weights `c_p >= 0`, such as per-parameter learning rates: the structure of
      the model (of `SparseModel.model` for a sparse one) with an array of the parameter's shape, or
      `None` for 1, at every leaf. Multiplies the mask of the active kernel.
    - `implementation`: `"factors"` (the default), or one of the oracles `"jacobian"` and
      `"ntk_vector_products"`.

    **Returns:**

    `[N, M, K, K]` for K outputs, in float32, or float64 where the model computes in float64.

    **Raises:**

    `ValueError` if the two batches hold samples of different shape or dtype, if a name is unknown,
    or if the model does not map one sample to one array.
    """
    x2 = x1 if x2 is None else x2
    _check(x1, x2, kernel, implementation)
    return _ntk(model, x1, x2, metric, kernel, implementation or "factors")


@eqx.filter_jit
def _ntk(model, x1, x2, metric, kernel, implementation):
    dense, weights = dense_and_metric(model, kernel, metric)
    if implementation in _ORACLES:
        return _ORACLES[implementation](dense, x1, x2, weights)
    program, params = trace(dense, jax.ShapeDtypeStruct(x1.shape[1:], x1.dtype))
    layers, rest = find_layers(program)
    first = factorise(program, layers, rest, params, x1)
    second = factorise(program, layers, rest, params, x2)
    return contract(layers, rest, first, second, weights)


def outputs_and_ntk(
    model: PyTree, x: Shaped[Array, "batch ..."], kernel: KernelKind
) -> tuple[Float[Array, "batch k"], Float[Array, "half half k k"]]:
    """Outputs on a batch, and the kernel between its first and its second half, from one pass."""
    dense, weights = dense_and_metric(model, kernel, None)
    program, params = trace(dense, jax.ShapeDtypeStruct(x.shape[1:], x.dtype))
    layers, rest = find_layers(program)
    factors = factorise(program, layers, rest, params, x)
    half = len(x) // 2
    first = jax.tree.map(lambda leaf: leaf[:half], factors)
    second = jax.tree.map(lambda leaf: leaf[half:], factors)
    return factors.outputs, contract(layers, rest, first, second, weights)


def dense_and_metric(
    model: PyTree, kernel: KernelKind, metric: PyTree | None
) -> tuple[PyTree, list[Any]]:
    """The model with zeros put in, and `c` for each floating-point leaf (`None` for c = 1)."""
    if isinstance(model, SparseModel):
        dense, mask = model.to_dense(), model.mask
    else:
        dense, mask = model, jax.tree.map(lambda _: None, model)
    params = eqx.filter(dense, eqx.is_inexact_array)
    aligned = lambda tree: _aligned(params, tree)
    masks = aligned(mask) if kernel == "active" else [None] * len(jax.tree.leaves(params))
    if metric is None:
        return dense, masks
    weights = [
        m if c is None else c if m is None else jnp.where(m, c, jnp.zeros_like(c))
        for m, c in zip(masks, aligned(metric), strict=True)
    ]
    return dense, weights


def _aligned(params: PyTree, tree: PyTree) -> list[Any]:
    """Leaves of `tree` (arrays or `None`) in the order of the leaves of `params`."""
    out: list[Any] = []
    jax.tree.map(
        lambda p, c: None if p is None else out.append(c), params, tree, is_leaf=lambda p: p is None
    )
    return out


def _check(x1: Array, x2: Array, kernel: str, implementation: str | None) -> None:
    if x1.shape[1:] != x2.shape[1:] or x1.dtype != x2.dtype:
        raise ValueError(
            f"ntk: x1 holds samples {x1.dtype}{list(x1.shape[1:])} but x2 holds "
            f"{x2.dtype}{list(x2.shape[1:])}; both must suit the model."
        )
    if kernel not in ("active", "ambient"):
        raise ValueError(f"ntk: kernel must be 'active' or 'ambient', got {kernel!r}.")
    if implementation not in (None, "factors", *_ORACLES):
        raise ValueError(
            f"ntk: implementation must be None, 'factors', 'jacobian' or 'ntk_vector_products', "
            f"got {implementation!r}."
        )
