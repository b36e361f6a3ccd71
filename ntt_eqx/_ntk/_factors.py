"""Factors: per sample, what comes into each layer and what flows back to its output."""

import math
from typing import Literal, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._types import widen
from ..kernels import block_size, map_blocks
from ._layers import Layer
from ._metric import LayerMetric, SelectedMetric
from ._program import Program, run

Form: TypeAlias = Literal["factors", "tangents"]

# The intermediates of one block of samples should stay in a core's cache.
_BLOCK_BYTES = 4 * 2**20


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
    of keeping what it computed.

    **Arguments:**

    - `layers`, `rest`: from `find_layers`.
    - `metrics`: for each layer its metric; tangents are kept where it says that they count.
    - `directions`: rows are directions in output space; `None` takes the K outputs themselves.
    - `pairs`: whether the kernel of all pairs of outputs is wanted, or of k = l alone.
    """
    tapped = {layer.step: layer.operand for layer in layers}
    shapes = {layer.step: program.steps[layer.step].eqn.outvars[0].aval for layer in layers}
    if directions is None:
        directions = jnp.eye(program.num_outputs, dtype=program.output_aval.dtype)
    directions = directions.astype(program.output_aval.dtype)
    zeros = {step: jnp.zeros(aval.shape, aval.dtype) for step, aval in shapes.items()}

    def one(sample: Array) -> Factors:
        def perturbed(perturbations, others):
            values = list(params)
            for p, value in zip(rest, others, strict=True):
                values[p] = value
            return run(program, values, sample, perturbations, tapped)

        others = [params[p] for p in rest]
        outputs, pull, operands = jax.vjp(perturbed, zeros, others, has_aux=True)
        d, jacobians = jax.vmap(pull)(directions)
        found = [
            _form(layer, metric, operands[layer.step], d[layer.step], pairs)
            for layer, metric in zip(layers, metrics, strict=True)
        ]
        return Factors(outputs, found, [Tangents(j.reshape(len(j), -1)) for j in jacobians])

    size = block_size(len(x), _bytes_per_sample(program, len(directions)), _BLOCK_BYTES)
    blocked = jax.vmap(one)
    return map_blocks(blocked if size >= len(x) else jax.checkpoint(blocked), x, len(x), size)


def choose_form(layer: Layer, metric: LayerMetric, directions: int, pairs: bool = True) -> Form:
    """Which of factors and tangents to keep: for many positions, the smaller of the two."""
    if layer.positions == 1:
        return "factors"
    width = layer.inputs + (layer.bias is not None)
    rows = layer.groups * layer.features
    entries = rows * width
    if layer.groups > 1 or not pairs or isinstance(metric, SelectedMetric):
        return "tangents"
    factors = layer.positions * (directions * rows + layer.groups * width)
    return "tangents" if directions * entries <= factors else "factors"


def _form(
    layer: Layer, metric: LayerMetric, operand: Array, d: Array, pairs: bool
) -> LayerFactors | Tangents:
    a, d = layer.activations(operand), jax.vmap(layer.cotangents)(d)
    if choose_form(layer, metric, len(d), pairs) == "factors":
        return LayerFactors(a, d)
    t = jnp.einsum("kgis,gjs->kgij", widen(d), widen(a)).reshape(len(d), -1)
    if isinstance(metric, SelectedMetric):
        t = t.at[:, metric.indices].get(mode="fill", fill_value=0)
    return Tangents(t)


def _bytes_per_sample(program: Program, directions: int) -> int:
    """What the passes back through the model write for one sample, roughly."""
    sizes = [math.prod(v.aval.shape) for step in program.steps for v in step.eqn.outvars]
    return directions * sum(sizes) * program.output_aval.dtype.itemsize
