"""The public kernel function."""

import math
from typing import Any, Literal, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree, Shaped

from .._sparse import SparseModel
from .._types import wide_dtype
from ._contract import contract
from ._factors import Factors, factorise
from ._layers import find_layers
from ._metric import layer_metric
from ._oracles import jacobian_contraction, ntk_vector_products
from ._program import trace

KernelKind: TypeAlias = Literal["active", "ambient"]
Implementation: TypeAlias = Literal["factors", "jacobian", "ntk_vector_products"]

# Above this density a mask's non-zeros are not gathered: measured on CPU, the dense product of
# LeNet-300-100's first layer is then as fast.
_SPARSE = 0.15

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
    support = None
    if isinstance(model, SparseModel) and kernel == "active" and not _is_traced(model.mask):
        support = mask_support(model.mask, bucketed=True)
    return _ntk(model, x1, x2, metric, kernel, implementation or "factors", support)


@eqx.filter_jit
def _ntk(model, x1, x2, metric, kernel, implementation, support):
    dense, weights = dense_and_metric(model, kernel, metric)
    if implementation in _ORACLES:
        return _ORACLES[implementation](dense, x1, x2, weights)
    engine = Engine(dense, x1, weights, _aligned_support(dense, kernel, support))
    return engine.contract(engine.factorise(x1), engine.factorise(x2))


def outputs_and_ntk(
    model: PyTree,
    x: Shaped[Array, "batch ..."],
    kernel: KernelKind,
    support: PyTree | None = None,
) -> tuple[Float[Array, "batch k"], Float[Array, "half half k k"]]:
    """Outputs on a batch, and the kernel between its first and its second half, from one pass.

    **Arguments:**

    - `support`: for a `SparseModel`, its `mask_support` where the number of kept weights is known.
    """
    dense, weights = dense_and_metric(model, kernel, None)
    engine = Engine(dense, x, weights, _aligned_support(dense, kernel, support))
    factors, half = engine.factorise(x), len(x) // 2
    first = jax.tree.map(lambda leaf: leaf[:half], factors)
    second = jax.tree.map(lambda leaf: leaf[half:], factors)
    return factors.outputs, engine.contract(first, second)


class Engine:
    """A model traced and analysed: what the kernels of any two batches have in common."""

    def __init__(
        self, model: PyTree, x: Array, metric: list[Any], support: list[Any] | None = None
    ):
        """Trace `model` on one sample of `x`, with a metric for each floating-point leaf."""
        sample = jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
        self.program, self.params = trace(model, sample)
        self.layers, self.rest = find_layers(self.program)
        support = [None] * len(metric) if support is None else support
        dtype = wide_dtype(self.program.output_aval.dtype)
        self.metrics = [layer_metric(layer, metric, support, dtype) for layer in self.layers]
        self.rest_metrics = [metric[p] for p in self.rest]

    def factorise(self, x: Array) -> Factors:
        """The factors of a batch."""
        return factorise(self.program, self.layers, self.rest, self.params, self.metrics, x)

    def contract(self, first: Factors, second: Factors) -> Array:
        """The kernel between two batches."""
        return contract(self.layers, self.metrics, self.rest_metrics, first, second)


def mask_support(mask: PyTree, *, bucketed: bool = False) -> PyTree:
    """The flat indices of each concrete mask's `True` entries, ascending; `None` if they are many.

    **Arguments:**

    - `bucketed`: fill up to one of few lengths (by an index one past the end), so that masks with
      about as many entries compile only once.
    """

    def indices(m):
        found = np.flatnonzero(np.asarray(m)).astype(np.int32)
        if len(found) > _SPARSE * m.size:
            return None
        length = len(found)
        if bucketed:
            length = int(1.25 ** math.ceil(math.log(max(length, 16), 1.25))) + 1
        return jnp.asarray(np.pad(found, (0, length - len(found)), constant_values=m.size))

    return jax.tree.map(indices, mask)


def refresh_support(mask: PyTree, support: PyTree) -> PyTree:
    """The support of a new mask with as many `True` entries as the old one; works under `jit`."""

    def indices(m, old):
        if old is None:
            return None
        return jnp.nonzero(m.reshape(-1), size=len(old), fill_value=m.size)[0].astype(old.dtype)

    return jax.tree.map(indices, mask, support, is_leaf=lambda leaf: leaf is None)


def _aligned_support(dense: PyTree, kernel: str, support: PyTree | None) -> list[Any] | None:
    if support is None or kernel != "active":
        return None
    return _aligned(eqx.filter(dense, eqx.is_inexact_array), support)


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


def _is_traced(tree: PyTree) -> bool:
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


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
