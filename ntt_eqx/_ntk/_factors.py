"""Factors: per sample, what comes into each layer and what flows back to its output."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._types import widen
from ..kernels import GatheredMetric, block_size, gathered_tangents, map_blocks
from ._costs import costs
from ._layers import Layer
from ._metric import LayerMetric
from ._parts import split
from ._program import Program, outputs_of, run

Form: TypeAlias = Literal["factors", "tangents"]


class LayerFactors(eqx.Module):
    """`a[N, G, J, S]` and `d[N, R, G, I, S]` of a layer: its tangents are their products."""

    a: Array
    d: Array


class Tangents(eqx.Module):
    """The derivative of R output directions by P parameters or entries of a layer: `t[N, R, P]`."""

    t: Array


class Factors(eqx.Module):
    """Everything that the kernel of a batch of N samples and R output directions is made of.

    Attributes:
        outputs: model outputs, `[N, K]`.
        layers: for each layer its factors, or its tangents where these are smaller.
        jacobians: for each parameter that is in no layer, its Jacobian.
    """

    outputs: Array
    layers: list[LayerFactors | Tangents]
    jacobians: list[Tangents]


def factorise(
    program: Program,
    layers: list[Layer],
    rest: list[int],
    params: list[Array],
    metrics: list[LayerMetric],
    x: Array,
    directions: Float[Array, "r classes"] | None = None,
    *,
    pairs: bool = True,
) -> Factors:
    """Evaluate the model on `x[N, ...]` and differentiate it along output directions.

    Samples are taken in blocks that fit the cache; the gradient then runs each block again instead
    of keeping what it computed. Dense layers at the end of a convolutional network see larger
    blocks (`_parts`): the head runs forwards, then the tail in both directions, then the head back.

    **Arguments:**

    - `layers`, `rest`: from `find_layers`.
    - `metrics`: for each layer its metric; tangents are kept where it says that they count.
    - `directions`: rows are directions in output space; `None` takes the K outputs themselves.
    - `pairs`: whether the kernel of all pairs of outputs is wanted, or of k = l alone.
    """
    if directions is None:
        directions = jnp.eye(program.num_outputs, dtype=program.output_aval.dtype)
    rows = directions.astype(program.output_aval.dtype)
    parts, cost = split(program, layers), costs()
    given: dict[int, Any] = dict(enumerate(params))
    sample_slot, others = len(params), [params[p] for p in rest]

    def differentiate(steps, values, floats, results, cotangents):
        """Layers and Jacobians of some steps, and what flows back to the slots of `floats`."""
        tapped = {layer.step: layer.operand for layer in layers if layer.step in steps}
        avals = {step: program.steps[step].eqn.outvars[0].aval for step in tapped}
        zeros = {step: jnp.zeros(aval.shape, aval.dtype) for step, aval in avals.items()}

        def perturbed(perturbations, others, floats):
            mine = {**values, **dict(zip(rest, others, strict=True)), **floats}
            found, operands = run(program, mine, steps, perturbations, tapped)
            return results(found), operands

        result, pull, operands = jax.vjp(perturbed, zeros, others, floats, has_aux=True)
        d, jacobians, back = jax.vmap(pull)(cotangents)
        found = {
            n: _form(layer, metric, operands[layer.step], d[layer.step], pairs)
            for n, (layer, metric) in enumerate(zip(layers, metrics, strict=True))
            if layer.step in tapped
        }
        return result, found, [j.reshape(len(rows), -1) for j in jacobians], back

    def ahead(sample):
        values, _ = run(program, {**given, sample_slot: sample}, parts.head, {}, {})
        return {slot: values[slot] for slot in parts.carried}

    def last(arguments):
        sample, carried = arguments
        floats = {slot: v for slot, v in carried.items() if jnp.issubdtype(v.dtype, jnp.floating)}
        values = {**given, sample_slot: sample, **carried}
        outputs = lambda found: outputs_of(program, found)
        return differentiate(parts.tail, values, floats, outputs, rows)

    def first(arguments):
        sample, back = arguments
        results = lambda found: {slot: found[slot] for slot in back}
        return differentiate(parts.head, {**given, sample_slot: sample}, {}, results, back)[1:3]

    def blocks(function, arrays, steps, budget):
        size = block_size(len(x), _bytes_per_sample(program, steps, len(rows)), budget)
        mapped = jax.vmap(function)
        mapped = mapped if size >= len(x) else jax.checkpoint(mapped)
        return map_blocks(mapped, arrays, len(x), size)

    if not parts.head:
        outputs, found, jacobians, _ = blocks(last, (x, {}), parts.tail, cost.block_bytes)
    else:
        carried = blocks(ahead, x, parts.head, cost.block_bytes)
        outputs, found, jacobians, back = blocks(last, (x, carried), parts.tail, cost.tail_bytes)
        more, sums = blocks(first, (x, back), parts.head, cost.block_bytes)
        found, jacobians = found | more, [j + s for j, s in zip(jacobians, sums, strict=True)]
    ordered = [found[n] for n in range(len(layers))]
    return Factors(outputs, ordered, [Tangents(j) for j in jacobians])


def choose_form(layer: Layer, metric: LayerMetric, directions: int, pairs: bool = True) -> Form:
    """Which of factors and tangents to keep: for many positions, the smaller of the two."""
    if layer.positions == 1:
        return "factors"
    width = layer.inputs + (layer.bias is not None)
    rows = layer.groups * layer.features
    entries = rows * width
    if layer.groups > 1 or not pairs or isinstance(metric, GatheredMetric):
        return "tangents"
    factors = layer.positions * (directions * rows + layer.groups * width)
    return "tangents" if directions * entries <= factors else "factors"


def _form(
    layer: Layer, metric: LayerMetric, operand: Array, d: Array, pairs: bool
) -> LayerFactors | Tangents:
    a, d = layer.activations(operand), jax.vmap(layer.cotangents)(d)
    if choose_form(layer, metric, len(d), pairs) == "factors":
        return LayerFactors(a, d)
    a, d = widen(a), widen(d)
    if not isinstance(metric, GatheredMetric):
        return Tangents(jnp.einsum("kgis,gjs->kgij", d, a).reshape(len(d), -1))
    flat = d.reshape(len(d), -1, layer.positions)
    seen = a[:, : layer.inputs].reshape(-1, layer.positions)
    t = [gathered_tangents(seen, flat, _in_group(layer, metric))]
    if layer.bias is not None:
        t.append(jnp.sum(flat, axis=2))
    return Tangents(jnp.concatenate(t, axis=1))


def _in_group(layer: Layer, metric: GatheredMetric) -> GatheredMetric:
    """The metric with its columns counted over the input features of all groups."""
    if layer.groups == 1:
        return metric
    first = metric.rows // layer.features * layer.inputs
    columns = jnp.minimum(metric.columns + first[:, None], layer.groups * layer.inputs - 1)
    return dataclasses.replace(metric, columns=columns)


def _bytes_per_sample(program: Program, steps: Sequence[int], directions: int) -> int:
    """What the passes back through some steps write for one sample, roughly."""
    sizes = [math.prod(v.aval.shape) for step in steps for v in program.steps[step].eqn.outvars]
    return directions * sum(sizes) * program.output_aval.dtype.itemsize
