"""The kernel of two batches from a model to the last block: plan, factors, contraction."""

from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from .._checks import sample_of, sample_output
from .._masks._collapse import is_traced
from .._sparse import SparseModel
from ..kernels import Device, target_device
from ._contract import contract
from ._costs import Costs, costs_on
from ._execute import evaluate, factorise
from ._oracles import jacobian_contraction, ntk_vector_products
from ._pairs import Blocks, default_budget, kernel_in_blocks, plan_blocks
from ._plan import KernelKind, Outputs, Plan, aligned, dense_and_metric, make_plan
from ._support import checked_support, mask_support

Implementation: TypeAlias = Literal["factors", "jacobian", "ntk_vector_products"]

ORACLES = {"jacobian": jacobian_contraction, "ntk_vector_products": ntk_vector_products}


def known_support(model: PyTree, kernel: KernelKind, *, bucketed: bool = True) -> PyTree | None:
    """The support of a mask whose entries are known, for the active kernel."""
    if not isinstance(model, SparseModel) or kernel != "active" or is_traced(model.mask):
        return None
    return mask_support(model.mask, bucketed=bucketed)


def blocks_of(plan: Plan, budget: int, *, symmetric: bool, keeps: bool | None = None) -> Blocks:
    """The blocks in which a plan's pairs of samples are taken."""
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
    support: PyTree | None,
    budget: int,
    device: Device,
    costs: Costs,
) -> tuple[Array, Array, Array]:
    """The kernel between two batches, and the outputs for both; `None` is `x1` again.

    `support` is that of the model's mask: `known_support`, made from it in the same call.
    """
    count = None if directions is None else len(directions[0])
    symmetric = x2 is None and directions is None  # other directions on the other side: it is not
    x2 = x1 if x2 is None else x2
    plan, operands = make_plan(
        model,
        x1,
        m=len(x2),
        kernel=kernel,
        metric=metric,
        support=None if support is None else aligned(model, support),
        outputs=outputs,
        directions=count,
        device=device,
        costs=costs,
    )
    _check_directions(plan, directions)
    sides = (None, None) if directions is None else directions
    blocks = blocks_of(plan, budget, symmetric=symmetric)
    make = lambda x, side: factorise(plan, operands, x, sides[side], budget // 4)
    if blocks.keeps:
        first = make(x1, 0)
        factors = (first, first if symmetric else make(x2, 1))
        f1, f2 = (side.outputs for side in factors)
    else:
        factors = None
        f1 = evaluate(plan, operands, x1, budget // 4)
        f2 = f1 if symmetric else evaluate(plan, operands, x2, budget // 4)
    combine = lambda first, second: contract(plan, operands, first, second)
    return kernel_in_blocks(blocks, make, combine, x1, x2, factors), f1, f2


def outputs_and_ntk(
    model: PyTree,
    x: Array,
    kernel: KernelKind,
    outputs: Outputs = "full",
    directions: tuple[Array, Array] | None = None,
    support: PyTree | None = None,
    implementation: Implementation = "factors",
    metric: PyTree | None = None,
) -> tuple[Array, Array]:
    """Outputs `[batch, K]`, and the kernel between the batch's two halves, from one pass.

    `support` may be that of another mask: it is checked, and only serves to be fast.
    """
    half = len(x) // 2
    if implementation != "factors":
        theta = oracle(model, x[:half], x[half:], kernel, metric, outputs, implementation)
        dense = model.to_dense() if isinstance(model, SparseModel) else model
        return jax.vmap(lambda sample: jnp.reshape(dense(sample), (-1,)))(x), theta
    device = target_device()
    found, known = None, known_support(model, kernel, bucketed=False)
    if known is not None:
        found = aligned(model, known)
    elif support is not None and isinstance(model, SparseModel) and kernel == "active":
        found = checked_support(aligned(model, model.mask), aligned(model, support))
    plan, operands = make_plan(
        model,
        x[:half],
        m=len(x) - half,
        kernel=kernel,
        metric=metric,
        support=found,
        outputs=outputs,
        directions=None if directions is None else len(directions[0]),
        device=device,
        costs=costs_on(device),
    )
    _check_directions(plan, directions)
    if directions is None:
        factors = factorise(plan, operands, x)
        first, second = (
            jax.tree.map(lambda leaf, p=part: leaf[p], factors)
            for part in (slice(None, half), slice(half, None))
        )
        f = factors.outputs
    else:
        first = factorise(plan, operands, x[:half], directions[0])
        second = factorise(plan, operands, x[half:], directions[1])
        f = jnp.concatenate([first.outputs, second.outputs])
    both = (first, second)
    theta = kernel_in_blocks(
        blocks_of(plan, default_budget(device), symmetric=False, keeps=True),
        lambda x, side: both[side],
        lambda first, second: contract(plan, operands, first, second),
        x[:half],
        x[half:],
        both,
    )
    return f, theta


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


def _check_directions(plan: Plan, directions: tuple[Array, Array] | None) -> None:
    for side in directions or ():
        if side.shape[1:] != (plan.traced.num_outputs,):
            raise ValueError(
                f"ntk: directions of shape {side.shape} do not suit a model with "
                f"{plan.traced.num_outputs} outputs."
            )
