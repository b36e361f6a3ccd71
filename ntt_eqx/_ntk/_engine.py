"""A model traced and analysed once, and the kernels that can be had from it."""

from typing import Any, Literal, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from .._checks import sample_of, sample_output
from .._sparse import SparseModel
from .._types import wide_dtype
from ._contract import Outputs, contract
from ._factors import Factors, factorise
from ._layers import find_layers
from ._metric import DenseMetric, layer_metric
from ._oracles import jacobian_contraction, ntk_vector_products
from ._program import trace

KernelKind: TypeAlias = Literal["active", "ambient"]
Implementation: TypeAlias = Literal["factors", "jacobian", "ntk_vector_products"]

ORACLES = {"jacobian": jacobian_contraction, "ntk_vector_products": ntk_vector_products}


class Engine:
    """What the kernels of any two batches have in common: the program, its layers, the metric."""

    def __init__(
        self,
        model: PyTree,
        x: Array,
        kernel: KernelKind,
        metric: PyTree | None = None,
        support: PyTree | None = None,
        outputs: Outputs = "full",
    ):
        """Trace `model` on one sample of the batch `x`.

        **Arguments:**

        - `metric`, `kernel`, `outputs`: as for `ntk`.
        - `support`: for a `SparseModel`, its `mask_support`, where it is known.
        """
        dense, weights = dense_and_metric(model, kernel, metric)
        sample = jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
        self.program, self.params = trace(dense, sample)
        self.layers, self.rest = find_layers(self.program)
        self.outputs: Outputs = outputs
        found: list[Any] = [None] * len(weights)
        if support is not None and kernel == "active":
            found = _aligned(eqx.filter(dense, eqx.is_inexact_array), support)
        dtype = wide_dtype(self.program.output_aval.dtype)
        self.metrics = [layer_metric(layer, weights, found, dtype) for layer in self.layers]
        self.rest_metrics = [weights[p] for p in self.rest]

    def factorise(self, x: Array, directions: Array | None = None) -> Factors:
        """The factors of a batch, along output directions `[R, K]` (`None`: all K outputs)."""
        if directions is not None and directions.shape[1:] != (self.program.num_outputs,):
            raise ValueError(
                f"ntk: directions of shape {directions.shape} do not suit a model with "
                f"{self.program.num_outputs} outputs."
            )
        return factorise(
            self.program,
            self.layers,
            self.rest,
            self.params,
            self.metrics,
            x,
            directions,
            pairs=self.outputs == "full",
        )

    def contract(self, first: Factors, second: Factors) -> Array:
        """The kernel between two batches."""
        return contract(self.layers, self.metrics, self.rest_metrics, first, second, self.outputs)

    def pair_bytes(self, directions: int) -> int:
        """Bytes of intermediates that a pair of samples takes in `contract`, roughly."""
        entries = directions**2 if self.outputs == "full" else directions
        widest = [0]
        for layer, metric in zip(self.layers, self.metrics, strict=True):
            if layer.positions == 1 and metric is not None:
                outer = layer.inputs if isinstance(metric, DenseMetric) else 0
                widest.append(2 * layer.features + min(outer, 64))
        return (4 * entries + max(widest)) * self.program.output_aval.dtype.itemsize


def outputs_and_ntk(
    model: PyTree,
    x: Array,
    kernel: KernelKind,
    outputs: Outputs = "full",
    directions: tuple[Array, Array] | None = None,
    support: PyTree | None = None,
    implementation: Implementation = "factors",
) -> tuple[Array, Array]:
    """Outputs `[batch, K]`, and the kernel between the batch's two halves, from one pass."""
    if implementation != "factors":
        half = len(x) // 2
        theta = oracle(model, x[:half], x[half:], kernel, None, outputs, implementation)
        dense = model.to_dense() if isinstance(model, SparseModel) else model
        return jax.vmap(lambda sample: jnp.reshape(dense(sample), (-1,)))(x), theta
    engine = Engine(model, x, kernel, None, support, outputs)
    half = len(x) // 2
    if directions is not None:
        first = engine.factorise(x[:half], directions[0])
        second = engine.factorise(x[half:], directions[1])
        return jnp.concatenate([first.outputs, second.outputs]), engine.contract(first, second)
    factors = engine.factorise(x)
    first = jax.tree.map(lambda leaf: leaf[:half], factors)
    second = jax.tree.map(lambda leaf: leaf[half:], factors)
    return factors.outputs, engine.contract(first, second)


def oracle(
    model: PyTree,
    x1: Array,
    x2: Array,
    kernel: KernelKind,
    metric: PyTree | None,
    outputs: Outputs,
    implementation: Implementation,
) -> Array:
    """The kernel by one of the direct implementations."""
    dense, weights = dense_and_metric(model, kernel, metric)
    sample_output("ntk", dense, sample_of(x1))
    theta = ORACLES[implementation](dense, x1, x2, weights)
    if outputs == "full":
        return theta
    diagonal = jnp.diagonal(theta, axis1=2, axis2=3)
    return diagonal if outputs == "diagonal" else jnp.mean(diagonal, axis=-1)


def dense_and_metric(
    model: PyTree, kernel: KernelKind, metric: PyTree | None
) -> tuple[PyTree, list[Any]]:
    """The model with zeros put in, and `c` for each floating-point leaf (`None` for c = 1)."""
    if isinstance(model, SparseModel):
        dense, mask = model.to_dense(), model.mask
    else:
        dense, mask = model, jax.tree.map(lambda _: None, model)
    params = eqx.filter(dense, eqx.is_inexact_array)
    if not jax.tree.leaves(params):
        raise ValueError("ntk: the model has no floating-point parameters.")
    aligned = lambda tree: _aligned(params, tree)
    masks = aligned(mask) if kernel == "active" else [None] * len(jax.tree.leaves(params))
    if metric is None:
        return dense, masks
    _check_metric(params, metric)
    metric = jax.lax.stop_gradient(metric)  # a constant of the sum, like a mask
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


def _check_metric(params: PyTree, metric: PyTree) -> None:
    named, treedef = jax.tree_util.tree_flatten_with_path(params)
    try:
        found = treedef.flatten_up_to(metric)
    except ValueError as error:
        raise ValueError(
            f"ntk: the metric does not have the structure of {type(params).__name__}: {error}"
        ) from error
    for (path, p), c in zip(named, found, strict=True):
        if c is not None and jnp.shape(c) != p.shape:
            raise ValueError(
                f"ntk: metric{jax.tree_util.keystr(path)} has shape {jnp.shape(c)} but the "
                f"parameter has shape {p.shape}."
            )
