"""Run a plan for one batch: each layer's input and the cotangent of its output, per sample.

The segments of the program run forwards in order, then backwards. The backward pass of a segment
maps the cotangents of what it wrote to those of its layers' outputs and of what it read.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._primitives import apply_primitive, in_memory
from .._program import Const, Evaluate, Site, is_branched, read, run, slots_of
from ..kernels import block_size, map_rows
from ..kernels.manual_axes import like_varying
from ._parts import Part
from ._plan import Operands, Plan


class Factors(eqx.Module):
    """The factors of a batch of N samples along R output directions.

    Attributes:
        outputs: model outputs, `[N, K]`.
        kept: what each form of the plan keeps.
        directions: R.
    """

    outputs: Array
    kept: list[Any]
    directions: int = eqx.field(static=True)


def factorise(
    plan: Plan,
    operands: Operands,
    x: Array,
    directions: Float[Array, "r classes"] | None = None,
    budget: int | None = None,
) -> Factors:
    """Evaluate the model on `x[N, ...]` and differentiate it along output directions.

    Samples are taken in blocks that fit the cache; the gradient then runs each block again instead
    of keeping what it computed.

    **Arguments:**

    - `directions`: one output direction in each row; `None` takes the K outputs themselves.
    - `budget`: bytes for a block's intermediates, if less than the device's costs allow.
    """
    traced = plan.traced
    if directions is None:
        directions = jnp.eye(traced.num_outputs, dtype=traced.output_aval.dtype)
    rows = like_varying(directions.astype(traced.output_aval.dtype), [x])
    seed = rows.reshape(len(rows), *traced.output_aval.shape)
    once, *mapped = plan.parts
    shared = dict(enumerate(operands.parameters))
    shared |= _written(plan, once, shared)
    carried: dict[int, Array] = {traced.sample_slot: x}
    bars: dict[int, Array] = {}  # the cotangent of each slot, [N, R, ...]
    layers: dict[int, Any] = {}

    def blocks(part: Part, function: Callable[[Any], Any], arrays: Any) -> Any:
        size = _block_rows(plan, part, len(x), len(rows), budget)
        one = function if size >= len(x) else jax.checkpoint(function)
        return map_rows(one, arrays, len(x), size)

    def ahead(part: Part, mine: dict[int, Array]) -> dict[int, Array]:
        return _written(plan, part, shared | mine)

    def back(part: Part, arguments: Any) -> tuple[Any, Any, Any]:
        mine, incoming = arguments
        return _pull(plan, operands, part, shared | mine, incoming, seed)

    for part in mapped[:-1]:
        mine = {slot: carried[slot] for slot in part.carried}
        carried |= blocks(part, functools.partial(ahead, part), mine)
    last = {}
    for part in reversed(mapped):
        mine = {slot: carried[slot] for slot in part.carried}
        incoming = {slot: bars[slot] for slot in part.pushed if slot in bars}
        found, flowing, written = blocks(part, functools.partial(back, part), (mine, incoming))
        layers |= found
        bars = _sum(bars, flowing)
        last = last or written
    every = lambda array: jnp.broadcast_to(array[None], (len(x), *array.shape))
    if once.layers or once.pulled:
        incoming = {slot: bars[slot] for slot in once.pushed if slot in bars}
        if traced.output in once.pushed:
            incoming = _sum(incoming, {traced.output: every(seed)})
        found, flowing = _pull_once(plan, operands, once, shared, incoming)
        layers |= found
        bars = _sum(bars, flowing)
    if any(traced.output == form.parameter for form in plan.jacobians):  # a parameter is the output
        bars = _sum(bars, {traced.output: every(seed)})

    outputs = read({**shared, **carried, **last}, traced.output)
    if traced.outputs_apart:
        outputs = evaluate(plan, operands, x, budget)
    elif isinstance(traced.output, Const) or traced.output in shared:
        outputs = every(jnp.asarray(outputs))
    kept = [layers[n] for n in range(len(plan.layers))]
    for form in plan.jacobians:
        kept.append(jax.vmap(lambda d, form=form: form.keep(None, (), d))(bars[form.parameter]))
    return Factors(jnp.reshape(outputs, (len(x), -1)), kept, len(rows))


def evaluate(plan: Plan, operands: Operands, x: Array, budget: int | None = None) -> Array:
    """The model's outputs for a batch, `[N, K]`, without factors."""
    program, slot = plan.traced.program, plan.traced.sample_slot
    steps = range(len(program.steps))

    evaluate_step = _evaluator(plan)

    def one(sample: Array) -> Array:
        given = {**dict(enumerate(operands.parameters)), slot: sample}
        values, _ = run(program, given, steps, evaluate_step)
        return jnp.reshape(read(values, plan.traced.output), (-1,))

    size = min((_block_rows(plan, part, len(x), 1, budget) for part in plan.parts), default=len(x))
    return map_rows(one, x, len(x), size)


def _evaluator(plan: Plan) -> Evaluate:
    """Evaluates a primitive on the plan's device."""
    return functools.partial(apply_primitive, platform=plan.spec.device.platform)


def _written(plan: Plan, part: Part, values: Mapping[int, Any]) -> dict[int, Any]:
    """The values that a segment writes for others, from the values that it reads."""
    # Run as the forward pass of a VJP, so that a `custom_vjp` function computes the same here as in
    # the backward pass when the kernel itself is differentiated.
    return _linearise(plan, part, values, part.writes)[0]


def _pull(
    plan: Plan,
    operands: Operands,
    part: Part,
    values: Mapping[int, Any],
    bars: dict[int, Array],
    seed: Array,
) -> tuple[dict[int, Any], dict[int, Array], dict[int, Array]]:
    """Run one segment backwards, for one sample.

    **Returns:**

    The factors or tangents of its layers, the cotangents `[R, ...]` of the slots that it read, and
    the output if it wrote it.
    """
    output = plan.traced.output
    if output in part.pushed:
        bars = _sum(bars, {output: seed})
    _, pull, tapped, written = _linearise(plan, part, values, tuple(bars))
    d, back = jax.vmap(pull)(bars) if bars else ({}, {})
    found = {}
    for n in part.layers:
        form = plan.layers[n]
        site = form.layer.site
        found[n] = form.keep(operands.metrics[n], tapped[site], d[site])
    return found, back, written


def _pull_once(
    plan: Plan,
    operands: Operands,
    part: Part,
    values: Mapping[int, Any],
    bars: dict[int, Array],
) -> tuple[dict[int, Any], dict[int, Array]]:
    """Run the segment of parameters alone backwards, with the cotangents of all samples."""
    _, pull, tapped, _ = _linearise(plan, part, values, tuple(bars))
    d, back = jax.vmap(jax.vmap(pull))(bars)
    found = {}
    for n in part.layers:
        form = plan.layers[n]
        site = form.layer.site
        keep = functools.partial(form.keep, operands.metrics[n], tapped[site])
        found[n] = jax.vmap(keep)(d[site])
    return found, back


def _linearise(
    plan: Plan, part: Part, values: Mapping[int, Any], wanted: tuple[int, ...]
) -> tuple[dict[int, Any], Callable[..., Any], dict[Site, tuple[Array, ...]], dict[int, Array]]:
    """The values that a segment writes, and its VJP to its layers' outputs and to its inputs."""
    program = plan.traced.program
    layers = [plan.layers[n].layer for n in part.layers]
    taps = {layer.site: layer.use.operands for layer in layers}
    zeros = {}
    for layer in layers:
        aval = program.step_at(layer.site).avals[0]
        zeros[layer.site] = jnp.zeros((*layer.loops, *aval.shape), aval.dtype)

    zeros = like_varying(zeros, list(values.values()))
    many = any(layer.positions > 1 for layer in layers)
    evaluate_step, settle = _evaluator(plan), None
    if many and is_branched(program, taps):
        settle = functools.partial(in_memory, platform=plan.spec.device.platform)

    def perturbed(zeros, flowing):
        given = {**values, **flowing}
        found, tapped = run(program, given, part.steps, evaluate_step, zeros, taps, settle)
        last = {slot: found[slot] for slot in slots_of([plan.traced.output]) if slot in part.writes}
        return {slot: found[slot] for slot in wanted}, (tapped, last)

    flowing = {slot: values[slot] for slot in part.pulled}
    found, pull, (tapped, last) = jax.vjp(perturbed, zeros, flowing, has_aux=True)
    return found, pull, tapped, last


def _block_rows(plan: Plan, part: Part, samples: int, directions: int, budget: int | None) -> int:
    """Number of samples that a segment takes at a time."""
    after_a_head = part.name == "tail" and len(plan.parts) > 2
    limit = plan.spec.costs.tail_bytes if after_a_head else plan.spec.costs.block_bytes
    each = part.sample_bytes * directions
    # A loop over two blocks costs more than its cache saves: a second forward pass in the gradient
    # and, for LeNet-300-100, 50 of 470 fused operations to compile.
    if samples * each <= 2 * limit:
        limit *= 2
    return block_size(samples, each, limit if budget is None else min(limit, budget))


def _sum(bars: dict[int, Array], more: Mapping[int, Array]) -> dict[int, Array]:
    return bars | {slot: bars[slot] + v if slot in bars else v for slot, v in more.items()}
