"""From a model and two batches to their kernel: plan, factors, contraction."""

import functools
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from .._checks import sample_of, sample_output
from .._distribute import everywhere, layout_in_use
from .._masks._collapse import is_traced
from .._sparse import SparseModel
from .._types import PyTree, wide_dtype
from ..kernels import at_precision
from ..kernels.manual_axes import varying_alike
from ._mask_index import MaskIndex, index_concrete, index_masks
from ._oracles import jacobian_contraction, ntk_vector_products
from ._pairs import Blocks, check_fits, plan_blocks
from ._plan import Plan, aligned, dense_and_metric, make_plan
from ._reverse_only import reverse_only
from ._spec import KernelSpec
from ._tiled import on_many, on_one, tile_lengths

_ORACLES = {"jacobian": jacobian_contraction, "ntk_vector_products": ntk_vector_products}
_REMEDIES = {
    "ntk": "ntk_tiles brings it to the host tile by tile, ntk_to_zarr to disk; one tile has to fit "
    "then",
    "ntt_loss": "a probe of fewer outputs (ntt.Trace(), ntt.Sketch(R)) or a smaller batch takes "
    "less",
    "oracle": "implementation='factors' makes only the pairs of outputs that are asked for",
}


def kernel_and_outputs(
    spec: KernelSpec,
    model: PyTree,
    x1: Array,
    x2: Array | None = None,
    metric: PyTree | None = None,
    directions: tuple[Array, Array] | None = None,
    index: Sequence[MaskIndex | None] | None = None,
    *,
    in_a_step: bool = False,
) -> tuple[Any, Array, Array]:
    """The kernel between two batches (or its terms), and the outputs `[N, K]` and `[M, K]`.

    Every kernel of the library comes through here.

    **Arguments:**

    - `spec`: what decides how it is computed.
    - `model`, `x1`, `x2`, `metric`, `directions`: those of `ntk`.
    - `index`: for each parameter the index of its mask, or `None` if unknown.
    - `in_a_step`: whether the kernel is part of a training step, whose gradient needs all factors:
      they are kept whatever the budget, and both batches go through the model in one pass.
    """
    given = _alike(model, x1, x2, metric, directions, index)
    model, x1, x2, metric, directions, index = given
    if spec.implementation != "factors":
        return _by_oracle(spec, model, x1, x1 if x2 is None else x2, metric)
    model, x1, x2, directions = reverse_only((model, x1, x2, directions))
    layout = layout_in_use()
    # Directions may differ between the sides, and a tile off the diagonal is not symmetric.
    symmetric = x2 is None and directions is None and layout is None
    x2 = x1 if x2 is None else x2
    n, m = tile_lengths(layout, len(x1), len(x2))
    plan, operands = make_plan(
        spec,
        model,
        jax.ShapeDtypeStruct((n, *x1.shape[1:]), x1.dtype),
        m,
        metric=metric,
        index=index,
        directions=None if directions is None else len(directions[0]),
    )
    _check_directions(plan, directions)
    _check_fits(plan, directions, "ntt_loss" if in_a_step else "ntk")
    blocks = blocks_of(plan, symmetric=symmetric, keeps=True if in_a_step else None)
    # Kept factors take at most half of the budget (`plan_blocks`). A block of samples on its way
    # through the model gets a quarter: `sample_bytes` counts what its steps write once, and XLA
    # needs about as much again for the copies that join blocks.
    budget = None if in_a_step else spec.budget // 4
    sides = (None, None) if directions is None else directions
    compute = on_one if layout is None else functools.partial(on_many, layout)
    with at_precision(spec.precision):
        theta, f1, f2 = compute(plan, operands, blocks, x1, x2, sides, budget, one_pass=in_a_step)
    if (trust := operands.trust) is not None:
        theta = jax.tree.map(lambda term: term * trust.astype(term.dtype), theta)
    return theta, f1, f2


def outputs_and_ntk(
    spec: KernelSpec,
    model: PyTree,
    x: Array,
    *,
    index: PyTree | None = None,
    directions: tuple[Array, Array] | None = None,
    metric: PyTree | None = None,
) -> tuple[Array, Array]:
    """Outputs `[batch, K]`, and the kernel between the batch's two halves, from one pass.

    `index` may be that of another mask, and only makes the call faster; see `index_masks`.
    """
    half, layout = len(x) // 2, layout_in_use()
    found = known_index(spec, model, bucketed=False)
    if found is None and index is not None and _reads_mask(spec, model):
        found = aligned(model, index_masks(model.mask, index))
    if spec.implementation == "factors":
        if layout is not None and half % layout.devices:
            x = everywhere(x, layout)  # XLA cannot halve a sharded array and then pad the halves
    theta, f1, f2 = kernel_and_outputs(
        spec, model, x[:half], x[half:], metric, directions, found, in_a_step=True
    )
    return jnp.concatenate([everywhere(f, layout) for f in (f1, f2)]), theta


def known_index(
    spec: KernelSpec, model: PyTree, *, bucketed: bool = True
) -> list[MaskIndex | None] | None:
    """The index of a concrete mask for each parameter; `None` where the spec needs none.

    A traced mask has no index either, because its values are unknown.
    """
    if not _reads_mask(spec, model) or is_traced(model.mask):
        return None
    return aligned(model, index_concrete(model.mask, spec.costs, bucketed=bucketed))


def _reads_mask(spec: KernelSpec, model: PyTree) -> bool:
    """Whether the kernel sums over the kept weights of a mask, by the engine."""
    factors = spec.implementation == "factors"
    return factors and spec.kernel == "active" and isinstance(model, SparseModel)


def blocks_of(plan: Plan, *, symmetric: bool, keeps: bool | None = None) -> Blocks:
    """How to cut the pairs of samples of a plan into blocks within the budget."""
    sizes, outputs, budget = plan.sizes, plan.spec.outputs, plan.spec.budget
    entries = _results(plan) * sizes.itemsize * (1 if outputs == "trace" else sizes.entries)
    lengths = (sizes.n, sizes.m)
    return plan_blocks(
        plan.costs_of_all, plan.stored, entries, lengths, budget, symmetric=symmetric, keeps=keeps
    )


def _by_oracle(
    spec: KernelSpec, model: PyTree, x1: Array, x2: Array, metric: PyTree | None
) -> tuple[Array, Array, Array]:
    """The kernel by one of the two oracles, which do not share the engine's code."""
    dense, weights = dense_and_metric(model, spec.kernel, metric)
    out = sample_output("ntk", dense, sample_of(x1))
    lengths, itemsize = (len(x1), len(x2)), jnp.dtype(wide_dtype(out.dtype)).itemsize
    # An oracle computes all pairs of outputs, even for the diagonal.
    sides = (out.size, out.size)
    check_fits("ntk", lengths, sides, "full", itemsize, spec.device, _REMEDIES["oracle"])
    with at_precision(spec.precision):
        theta = _ORACLES[spec.implementation](dense, x1, x2, weights)
        call = jax.vmap(lambda sample: jnp.reshape(dense(sample), (-1,)))
        f = call(jnp.concatenate([x1, x2]))
    if spec.outputs != "full":
        theta = jnp.diagonal(theta, axis1=2, axis2=3)
        theta = jnp.mean(theta, axis=-1) if spec.outputs == "trace" else theta
    return theta, f[: len(x1)], f[len(x1) :]


def _alike(*trees: Any) -> Any:
    """Make all arrays vary over the same mesh axes, as `jax.shard_map` requires of operands."""
    arrays, rest = eqx.partition(trees, eqx.is_array)
    (arrays,) = varying_alike(arrays)
    return eqx.combine(arrays, rest)


def _check_fits(plan: Plan, directions: Any, caller: str) -> None:
    sizes, spec = plan.sizes, plan.spec
    sides = (plan.traced.num_outputs, plan.traced.num_outputs)
    if directions is not None:
        sides = (len(directions[0]), len(directions[1]))
    lengths = (sizes.n, sizes.m)
    remedy = _REMEDIES[caller]
    itemsize = _results(plan) * sizes.itemsize
    check_fits(caller, lengths, sides, spec.outputs, itemsize, spec.device, remedy)


def _results(plan: Plan) -> int:
    """Number of kernels that are returned."""
    return len(plan.forms) if plan.spec.by_layer else 1


def _check_directions(plan: Plan, directions: tuple[Array, Array] | None) -> None:
    for side in directions or ():
        if side.shape[1:] != (plan.traced.num_outputs,):
            raise ValueError(
                f"ntk: directions of shape {side.shape} do not suit a model with "
                f"{plan.traced.num_outputs} outputs."
            )
