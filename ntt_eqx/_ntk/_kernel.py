"""From a model and two batches to their kernel: plan, factors, contraction."""

from typing import Any, Literal, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from .._checks import sample_of, sample_output
from .._distribute import everywhere, layout_in_use
from .._masks._collapse import is_traced
from .._sparse import SparseModel
from .._types import wide_dtype
from ..kernels import Device, Precision, at_precision, target_device
from ..kernels.manual_axes import varying_alike
from ._costs import Costs, costs_on
from ._oracles import jacobian_contraction, ntk_vector_products
from ._pairs import Blocks, check_fits, default_budget, plan_blocks
from ._plan import KernelKind, Outputs, Plan, aligned, dense_and_metric, make_plan
from ._reverse_only import reverse_only
from ._support import mask_support, unchecked
from ._tiled import carry_out, tile_lengths

Implementation: TypeAlias = Literal["factors", "jacobian", "ntk_vector_products"]

_IN_TILES = (
    "ntk_tiles brings it to the host tile by tile, ntk_to_zarr to disk; one tile has to fit then"
)
_IN_A_STEP = "a probe of fewer outputs (ntt.Trace(), ntt.Sketch(R)) or a smaller batch takes less"
_BY_FACTORS = "implementation='factors' makes only the pairs of outputs that are asked for"
ORACLES = {"jacobian": jacobian_contraction, "ntk_vector_products": ntk_vector_products}


def known_support(model: PyTree, kernel: KernelKind, *, bucketed: bool = True) -> PyTree | None:
    """The indices of a concrete mask, for the active kernel; `None` if the mask is traced."""
    if not isinstance(model, SparseModel) or kernel != "active" or is_traced(model.mask):
        return None
    return mask_support(model.mask, bucketed=bucketed)


def blocks_of(plan: Plan, budget: int, *, symmetric: bool, keeps: bool | None = None) -> Blocks:
    """How to cut the pairs of samples of a plan into blocks."""
    sizes = plan.sizes
    entries = sizes.itemsize * (1 if plan.outputs == "trace" else sizes.entries)
    lengths = (sizes.n, sizes.m)
    return plan_blocks(
        plan.costs_of_all, plan.stored, entries, lengths, budget, symmetric=symmetric, keeps=keeps
    )


def kernel_between(
    model: PyTree,
    x1: Array,
    x2: Array | None,
    metric: PyTree | None,
    kernel: KernelKind,
    outputs: Outputs,
    directions: tuple[Array, Array] | None,
    precision: Precision,
    support: PyTree | None,
    budget: int,
    device: Device,
    costs: Costs,
) -> tuple[Array, Array, Array]:
    """The kernel between two batches, and the outputs for both; `None` is `x1` again.

    `support` must match the model's mask: it comes from `known_support` in the same call.
    """
    model, x1, x2, metric, directions, support = _alike(model, x1, x2, metric, directions, support)
    model, x1, x2, directions = reverse_only((model, x1, x2, directions))
    layout = layout_in_use()
    # Directions may differ between the sides, and a tile off the diagonal is not symmetric.
    symmetric = x2 is None and directions is None and layout is None
    x2 = x1 if x2 is None else x2
    n, m = tile_lengths(layout, len(x1), len(x2))
    plan, operands = make_plan(
        model,
        _like(x1, n),
        m=m,
        kernel=kernel,
        metric=metric,
        support=None if support is None else aligned(model, support),
        outputs=outputs,
        directions=None if directions is None else len(directions[0]),
        precision=precision,
        device=device,
        costs=costs,
    )
    _check_directions(plan, directions)
    _check_fits("ntk", plan, directions, _IN_TILES)
    blocks = blocks_of(plan, budget, symmetric=symmetric)
    return carry_out(
        plan, operands, blocks, x1, x2, directions, budget // 4, one_pass=False, layout=layout
    )


def outputs_and_ntk(
    model: PyTree,
    x: Array,
    kernel: KernelKind,
    outputs: Outputs = "full",
    directions: tuple[Array, Array] | None = None,
    support: PyTree | None = None,
    implementation: Implementation = "factors",
    metric: PyTree | None = None,
    precision: Precision = "float32",
) -> tuple[Array, Array]:
    """Outputs `[batch, K]`, and the kernel between the batch's two halves, from one pass.

    `support` may be stale: it is compared with the model's mask, and only makes the call faster.
    """
    model, x, directions, support, metric = _alike(model, x, directions, support, metric)
    half = len(x) // 2
    if implementation != "factors":
        how = (kernel, metric, outputs, precision, implementation)
        theta = oracle(model, x[:half], x[half:], *how)
        dense = model.to_dense() if isinstance(model, SparseModel) else model
        with at_precision(precision):
            return jax.vmap(lambda sample: jnp.reshape(dense(sample), (-1,)))(x), theta
    model, x, directions = reverse_only((model, x, directions))
    device = target_device()
    found, known = None, known_support(model, kernel, bucketed=False)
    if known is not None:
        found = aligned(model, known)
    elif support is not None and isinstance(model, SparseModel) and kernel == "active":
        pairs = zip(aligned(model, support), aligned(model, model.mask), strict=True)
        found = [unchecked(s, mask) for s, mask in pairs]
    layout = layout_in_use()
    n, m = tile_lengths(layout, half, len(x) - half)
    plan, operands = make_plan(
        model,
        _like(x, n),
        m=m,
        kernel=kernel,
        metric=metric,
        support=found,
        outputs=outputs,
        directions=None if directions is None else len(directions[0]),
        precision=precision,
        device=device,
        costs=costs_on(device),
    )
    _check_directions(plan, directions)
    _check_fits("ntt_loss", plan, directions, _IN_A_STEP)
    blocks = blocks_of(plan, default_budget(device), symmetric=False, keeps=True)
    if layout is not None and half % layout.devices:
        x = everywhere(x, layout)  # XLA cannot halve a sharded array and then pad the halves
    sides = (x[:half], x[half:])
    theta, f1, f2 = carry_out(
        plan, operands, blocks, *sides, directions, None, one_pass=True, layout=layout
    )
    return jnp.concatenate([everywhere(f, layout) for f in (f1, f2)]), theta


def oracle(
    model: PyTree,
    x1: Array,
    x2: Array,
    kernel: KernelKind,
    metric: PyTree | None,
    outputs: Outputs,
    precision: Precision,
    implementation: Implementation,
) -> Array:
    """The kernel by one of the two oracles, which do not share the engine's code."""
    dense, weights = dense_and_metric(model, kernel, metric)
    out = sample_output("ntk", dense, sample_of(x1))
    lengths, itemsize = (len(x1), len(x2)), jnp.dtype(wide_dtype(out.dtype)).itemsize
    # An oracle computes all pairs of outputs, even for the diagonal.
    check_fits("ntk", lengths, (out.size, out.size), "full", itemsize, target_device(), _BY_FACTORS)
    with at_precision(precision):
        theta = ORACLES[implementation](dense, x1, x2, weights)
    if outputs == "full":
        return theta
    diagonal = jnp.diagonal(theta, axis1=2, axis2=3)
    return diagonal if outputs == "diagonal" else jnp.mean(diagonal, axis=-1)


def _alike(*trees: Any) -> Any:
    """Make all arrays vary over the same mesh axes, as `jax.shard_map` requires of operands."""
    arrays, rest = eqx.partition(trees, eqx.is_array)
    (arrays,) = varying_alike(arrays)
    return eqx.combine(arrays, rest)


def _like(x: Array, length: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((length, *x.shape[1:]), x.dtype)


def _check_fits(caller: str, plan: Plan, directions: Any, instead: str) -> None:
    sizes, outputs = plan.sizes, plan.traced.num_outputs
    sides = (outputs, outputs)
    if directions is not None:
        sides = (len(directions[0]), len(directions[1]))
    lengths = (sizes.n, sizes.m)
    check_fits(caller, lengths, sides, plan.outputs, sizes.itemsize, plan.device, instead)


def _check_directions(plan: Plan, directions: tuple[Array, Array] | None) -> None:
    for side in directions or ():
        if side.shape[1:] != (plan.traced.num_outputs,):
            raise ValueError(
                f"ntk: directions of shape {side.shape} do not suit a model with "
                f"{plan.traced.num_outputs} outputs."
            )
