"""The plan of a kernel: the form of each parameter and the segments of the program.

A plan depends on the traced model, the structure of the metric, the requested outputs, the device
and its costs. It contains no weights. `explain` prints it; `_execute` and `_contract` follow it.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from .._parameters import parameter_marks, parameters
from .._program import constants, with_constants
from .._sparse import SparseModel
from .._types import KernelKind, PyTree, wide_dtype
from ..kernels import at_precision
from ._layers import Layer, find_layers
from ._mask_index import MaskIndex, is_index, keeps_all, nan_unless_fit
from ._parts import Part, derivative_flow, split
from ._spec import KernelSpec
from ._trace import Traced, trace
from .forms import (
    AbstractForm,
    AbstractGatheredForm,
    AbstractLayerForm,
    Cost,
    JacobianForm,
    Sizes,
    plan_layer,
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How one kernel is computed: a form for each term of its sum, and segments of the program.

    Attributes:
        traced: the model's program.
        parts: the segments of the program, in the order in which they run.
        layers: the forms of the layers that the outputs depend on.
        jacobians: the forms of the parameters in no layer.
        terms: numbers of the forms that are contracted together, for each term of the sum.
        unused: parameters that the outputs do not depend on.
        sizes: samples, directions and bytes of a number.
        spec: what was asked for, and on which device.
    """

    traced: Traced
    parts: tuple[Part, ...]
    layers: tuple[AbstractLayerForm[Any], ...]
    jacobians: tuple[JacobianForm, ...]
    unused: tuple[int, ...]
    sizes: Sizes
    spec: KernelSpec

    @property
    def forms(self) -> tuple[AbstractForm[Any], ...]:
        """The forms of all parameters: first the layers, then the parameters in none."""
        return (*self.layers, *self.jacobians)

    def name_of(self, form: AbstractForm[Any]) -> str:
        """The paths of a form's parameters, such as `".weight + .bias"`."""
        return " + ".join(self.traced.parameters[p].path for p in form.parameters)

    @property
    def costs_of_all(self) -> list[Cost]:
        """The costs of all forms."""
        return [form.cost(self.sizes) for form in self.forms]

    @property
    def constants(self) -> list[Array]:
        """The constant arrays in the model's program, which are not parameters."""
        return constants(self.traced.program)

    def with_constants(self, arrays: Sequence[Array]) -> "Plan":
        """The plan with its `constants` replaced."""
        program = with_constants(self.traced.program, arrays)
        return dataclasses.replace(self, traced=dataclasses.replace(self.traced, program=program))

    @property
    def stored(self) -> int:
        """Bytes of the factors of one sample, its outputs included."""
        outputs = self.traced.num_outputs * self.sizes.itemsize
        return outputs + sum(cost.stored for cost in self.costs_of_all)


class Operands(eqx.Module):
    """The arrays that a plan runs on.

    Attributes:
        parameters: the model's parameters, as real arrays.
        metrics: the metric of each form.
        trust: a factor of the kernel, 1 if the indices that the plan relies on are those of the
            masks and else NaN; `None` where they cannot be others.
    """

    parameters: list[Array]
    metrics: list[Any]
    trust: Array | None


def make_plan(
    spec: KernelSpec,
    model: PyTree,
    x: Any,
    m: int,
    *,
    metric: PyTree | None = None,
    index: Sequence[MaskIndex | None] | None = None,
    directions: int | None = None,
) -> tuple[Plan, Operands]:
    """Plan the kernel of `model` between two batches.

    **Arguments:**

    - `x`, `m`: the first batch (or its shape), and the number of samples of the second.
    - `metric`: as for `ntk`.
    - `index`: for each parameter the index of its mask, or `None` if unknown.
    - `directions`: number of output directions; `None` for all outputs themselves.
    """
    given = () if index is None else index
    whole = [n for n, known in enumerate(given) if keeps_all(known)]
    dense, weights = dense_and_metric(model, spec.kernel, metric, whole)
    with at_precision(spec.precision):
        traced, arrays = trace(dense, jax.ShapeDtypeStruct(x.shape[1:], x.dtype))
    weights = [p.spread(c) for p, c in zip(traced.parameters, weights, strict=True)]
    found = given or [None] * len(weights)
    dtype = wide_dtype(traced.output_aval.dtype)
    sizes = Sizes(
        n=x.shape[0],
        m=m,
        directions=traced.num_outputs if directions is None else directions,
        all_pairs=spec.outputs == "full",
        itemsize=jnp.dtype(dtype).itemsize,
    )
    layers, rest = find_layers(traced.program, [a.shape for a in arrays], spec.rules)
    flow = derivative_flow(traced, layers, rest)
    layers = [layers[number] for number in flow.layers]
    forms = tuple(_planned(layer, weights, found, sizes, spec) for layer in layers)
    flow = derivative_flow(traced, layers, flow.parameters)
    jacobians = tuple(
        JacobianForm(p, math.prod(arrays[p].shape), traced.parameters[p].is_complex)
        for p in flow.parameters
    )
    covered = {p for form in (*forms, *jacobians) for p in form.parameters}
    metrics = [form.metric(weights, found, dtype) for form in (*forms, *jacobians)]
    plan = Plan(
        traced=traced,
        parts=split(traced, layers, flow, spec.costs),
        layers=forms,
        jacobians=jacobians,
        unused=tuple(p for p in range(len(arrays)) if p not in covered),
        sizes=sizes,
        spec=spec,
    )
    used = {form.layer.weight for form in forms if isinstance(form, AbstractGatheredForm)}
    trust = nan_unless_fit([found[n] for n in sorted(used.union(whole))])
    return plan, Operands(arrays, metrics, trust)


def _planned(
    layer: Layer,
    weights: Sequence[Array | None],
    index: Sequence[MaskIndex | None],
    sizes: Sizes,
    spec: KernelSpec,
) -> AbstractLayerForm[Any]:
    """The form of a layer, with the metrics and indices that are known of its parameters."""
    weight, known = weights[layer.weight], index[layer.weight]
    masked = weight is not None or layer.bias is not None and weights[layer.bias] is not None
    places = None if known is None or weight is None else known.places
    nonzeros = None if places is None else places.capacity * places.row_block
    return plan_layer(layer, masked, nonzeros, sizes, spec.costs)


def dense_and_metric(
    model: PyTree, kernel: KernelKind, metric: PyTree | None, whole: Sequence[int] = ()
) -> tuple[PyTree, list[Any]]:
    """The masked model as a plain one, and `c` for each parameter (`None` for c = 1).

    `whole` are the parameters whose mask is known to keep everything.
    """
    dense = model.to_dense() if isinstance(model, SparseModel) else model
    params = parameters(dense)
    count = len(jax.tree.leaves(params))
    if not count:
        raise ValueError("ntk: the model has no floating-point parameters.")
    masks: list[Any] = [None] * count
    if isinstance(model, SparseModel) and kernel == "active":
        masks = aligned(model, model.mask)
        masks = [None if n in whole else mask for n, mask in enumerate(masks)]
    if metric is None:
        return dense, masks
    found = _metric_of_parameters(dense, metric)
    found = jax.lax.stop_gradient(found)  # a constant of the sum, like a mask
    weights = [
        m if c is None else c if m is None else jnp.where(m, c, jnp.zeros_like(c))
        for m, c in zip(masks, found, strict=True)
    ]
    return dense, weights


def aligned(model: SparseModel, tree: PyTree) -> list[Any]:
    """One leaf of a mask or an index (or `None`) for each of the model's parameters, in order."""
    marks = jax.tree.leaves(parameter_marks(model.model), is_leaf=lambda leaf: leaf is None)
    leaves = jax.tree.leaves(tree, is_leaf=is_index)
    return [leaf for leaf, mark in zip(leaves, marks, strict=True) if mark]


def metric_of_layers(
    caller: str, model: PyTree, metric: PyTree | None, layers: str | Sequence[str]
) -> PyTree:
    """A metric that is zero at all parameters but those of `layers`.

    The kernel is a sum over parameters, so that of some layers is the one with this metric.

    **Raises:**

    `ValueError` for layers that are no paths of parameters, or none.
    """
    dense = model.to_dense() if isinstance(model, SparseModel) else model
    asked = [layers] if isinstance(layers, str) else list(layers)
    if not asked or not all(isinstance(name, str) for name in asked):
        raise ValueError(
            f"{caller}: layers must be paths of parameters, such as "
            f'(".layers[0].weight",), got {layers!r}.'
        )
    chosen = {part for name in asked for part in name.split(" + ")}
    named = jax.tree_util.tree_leaves_with_path(parameters(dense))
    paths = [jax.tree_util.keystr(path) for path, _ in named]
    if unknown := sorted(chosen - set(paths)):
        raise ValueError(f"{caller}: layers: {unknown} are no parameters; there are {paths}.")
    given = [None] * len(named) if metric is None else _metric_of_parameters(dense, metric)
    found = iter(
        (jnp.ones_like(p) if c is None else c) if path in chosen else jnp.zeros_like(p)
        for path, (_, p), c in zip(paths, named, given, strict=True)
    )
    marks, structure = jax.tree.flatten(parameter_marks(dense))
    return structure.unflatten([next(found) if mark else None for mark in marks])


def _metric_of_parameters(model: PyTree, metric: PyTree) -> list[Any]:
    """The leaves of a metric at the parameters; its other leaves are ignored."""
    marks, treedef = jax.tree.flatten(parameter_marks(model))
    try:
        leaves = treedef.flatten_up_to(metric)
    except ValueError as error:
        raise ValueError(
            f"ntk: the metric does not have the structure of {type(model).__name__}: {error}"
        ) from error
    found = [leaf for leaf, mark in zip(leaves, marks, strict=True) if mark]
    named = jax.tree_util.tree_leaves_with_path(parameters(model))
    for (path, p), c in zip(named, found, strict=True):
        if c is not None and jnp.shape(c) != p.shape:
            raise ValueError(
                f"ntk: metric{jax.tree_util.keystr(path)} has shape {jnp.shape(c)} but the "
                f"parameter has shape {p.shape}."
            )
    return found
