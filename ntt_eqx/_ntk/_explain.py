"""Report how each parameter enters the kernel of a model, and what it costs."""

import dataclasses
import math
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, Shaped

from .._kept import is_kept_layer
from .._parameters import parameter_marks
from .._sparse import SparseModel, prunable_weights
from .._types import KernelKind, Outputs, PyTree
from ._given import given_batches, given_model
from ._kernel import known_index
from ._plan import aligned, make_plan
from ._spec import kernel_spec
from .forms import Path


@dataclasses.dataclass(frozen=True)
class ParameterCost:
    """How one parameter enters the kernel.

    Attributes:
        name: its path in the model; a bias that is folded into its layer is named after it.
        shape: its shape.
        prunable: whether it has a mask or stores kept weights alone; for a model without masks,
            whether `sparsify` adds one.
        kept: number of entries in the sum: those that the mask keeps, or all.
        path: `"factors"` (activations and cotangents of a dense layer), `"tangents"` (per-sample
            derivatives of a layer at many positions), either of them `gathered` at the mask's
            kept entries, `"jacobian"`: the explicit per-sample Jacobian of this parameter, the slow
            path for large ones, or `"unused"`: the outputs do not depend on it.
        flops: floating-point operations of this parameter's share of the contraction, without the
            passes that make the factors, which all parameters share.
        layer_flops: operations to evaluate the layer for one sample; 0 if there is no layer.
        bytes: memory of its factors or tangents, for both batches.
    """

    name: str
    shape: tuple[int, ...]
    prunable: bool
    kept: int
    path: Path
    flops: int
    layer_flops: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The costs of a kernel between two batches; `print` it for a table.

    Attributes:
        n: samples of the first batch.
        m: samples of the second.
        num_outputs: outputs K of a sample.
        parameters: one entry for each parameter, in the model's order.
    """

    n: int
    m: int
    num_outputs: int
    parameters: tuple[ParameterCost, ...]

    @property
    def slow(self) -> tuple[ParameterCost, ...]:
        """Arrays of two axes or more that take the explicit Jacobian: look at these first."""
        return tuple(p for p in self.parameters if p.path == "jacobian" and _is_matrix(p.shape))

    @property
    def not_prunable(self) -> tuple[ParameterCost, ...]:
        """Arrays of two axes or more without a mask; `sparsify(model, where=...)` can add them."""
        return tuple(p for p in self.parameters if not p.prunable and _is_matrix(p.shape))

    def __str__(self) -> str:
        """A table with one line for each parameter."""
        head = ("parameter", "shape", "pruned", "kept", "path", "MFLOP", "MB")
        rows = [
            (
                p.name,
                "x".join(map(str, p.shape)) or "scalar",
                "yes" if p.prunable else "no",
                f"{p.kept:,}",
                p.path,
                f"{p.flops / 1e6:,.1f}",
                f"{p.bytes / 1e6:,.2f}",
            )
            for p in self.parameters
        ]
        total = (
            "all", "", "", f"{sum(p.kept for p in self.parameters):,}", "",
            f"{sum(p.flops for p in self.parameters) / 1e6:,.1f}",
            f"{sum(p.bytes for p in self.parameters) / 1e6:,.2f}",
        )  # fmt: skip
        table = [head, *rows, total]
        widths = [max(len(row[c]) for row in table) for c in range(len(head))]
        left = (0, 1, 2, 4)
        lines = [
            "  ".join(
                cell.ljust(w) if c in left else cell.rjust(w)
                for c, (cell, w) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in table
        ]
        lines.insert(1, "-" * len(lines[0]))
        lines.insert(-1, "-" * len(lines[1]))
        lines.insert(0, f"kernel between {self.n} and {self.m} samples, {self.num_outputs} outputs")
        if self.slow:
            names = ", ".join(p.name for p in self.slow)
            lines.append(f"slow path (explicit Jacobian of a matrix): {names}")
        if self.not_prunable:
            names = ", ".join(p.name for p in self.not_prunable)
            lines.append(f"not pruned (choose by `where=` of sparsify or ntt_init): {names}")
        return "\n".join(lines)


def explain(
    model: PyTree,
    x1: Shaped[Array | np.ndarray, "n ..."],
    x2: Shaped[Array | np.ndarray, "m ..."] | None = None,
    *,
    kernel: KernelKind = "active",
    outputs: Outputs = "full",
) -> Explanation:
    """How `ntk` with these arguments treats each parameter, and the cost; computes no kernel.

    **Arguments:**

    - `model`, `x1`, `x2`, `kernel`, `outputs`: those of `ntk`.

    **Returns:**

    An `Explanation`; `print(explain(model, x))` shows its table, `.slow` the parameters that take
    the slow path.

    **Raises:**

    `ValueError` for what `ntk` does not take.
    """
    model = given_model("explain", model)
    x1, x2 = given_batches("explain", x1, x2)
    m = len(x1 if x2 is None else x2)
    spec = kernel_spec(kernel, outputs)
    plan, operands = make_plan(spec, model, x1, m, index=known_index(spec, model))
    marks = _prunable(model)
    found = {}
    for form, metric in zip(plan.forms, operands.metrics, strict=True):
        shape = plan.traced.parameters[form.parameters[0]].shape
        count = form.count(metric)
        kept = math.prod(shape) if count is None else count
        cost = form.cost(plan.sizes, kept)
        found[form.parameters[0]] = ParameterCost(
            name=plan.name_of(form),
            shape=shape,
            prunable=marks[form.parameters[0]],
            kept=kept,
            path=form.path,
            flops=cost.flops,
            layer_flops=cost.layer_flops,
            bytes=(plan.sizes.n + plan.sizes.m) * cost.stored,
        )
    for p in plan.unused:
        parameter = plan.traced.parameters[p]
        size = math.prod(parameter.shape)
        found[p] = ParameterCost(parameter.path, parameter.shape, marks[p], size, "unused", 0, 0, 0)
    return Explanation(len(x1), m, plan.traced.num_outputs, tuple(found[p] for p in sorted(found)))


def _prunable(model: PyTree) -> list[bool]:
    """For each parameter whether it has a mask, stores kept weights alone, or would get a mask."""
    if isinstance(model, SparseModel):
        masks = [m is not None for m in aligned(model, model.mask)]
        return [a or b for a, b in zip(masks, _kept_alone(model.model), strict=True)]
    try:
        marks = prunable_weights(model)
    except ValueError:  # none of them
        marks = jax.tree.map(lambda leaf: False, model)
    pairs = zip(jax.tree.leaves(marks), jax.tree.leaves(parameter_marks(model)), strict=True)
    return [bool(mark) for mark, is_parameter in pairs if is_parameter]


def _kept_alone(model: PyTree) -> list[bool]:
    """For each parameter whether it is the values of a layer that stores kept weights alone."""

    def one(node: Any) -> PyTree:
        marks = jax.tree.map(lambda _: False, node)
        return eqx.tree_at(lambda n: n.values, marks, True) if is_kept_layer(node) else marks

    marks = jax.tree.leaves(jax.tree.map(one, model, is_leaf=is_kept_layer))
    meant = jax.tree.leaves(parameter_marks(model))
    return [mark for mark, is_parameter in zip(marks, meant, strict=True) if is_parameter]


def _is_matrix(shape: tuple[int, ...]) -> bool:
    return sum(size > 1 for size in shape) > 1
