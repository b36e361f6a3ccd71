"""A model written for one sample as a flat list of primitive steps, and how to run it.

The model is traced once to a jaxpr, calls such as `jit` are unfolded, and every value gets a slot.
Running its steps can add a perturbation to the output of chosen ones and hand out their operands:
that is all that `_factors` needs to differentiate with respect to a layer's output.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.extend.core as jex_core
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from .._checks import calling_model, checked_output
from ._primitives import apply_primitive

_INLINED = ("jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint")


@dataclasses.dataclass(frozen=True)
class Const:
    """An operand known at trace time (a literal, or an array that the model closes over)."""

    value: Any


@dataclasses.dataclass(frozen=True)
class Step:
    """One primitive: reads slots or constants, writes slots."""

    eqn: Any
    inputs: tuple[Any, ...]
    outputs: tuple[int, ...]

    @property
    def name(self) -> str:
        """The primitive's name."""
        return self.eqn.primitive.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the first output."""
        return self.eqn.outvars[0].aval.shape


@dataclasses.dataclass(frozen=True)
class Program:
    """A traced model `(params, x) -> outputs`: parameters hold slots 0 .. num_params - 1."""

    steps: tuple[Step, ...]
    params: tuple[jax.ShapeDtypeStruct, ...]
    paths: tuple[str, ...]
    output: Any
    output_aval: jax.ShapeDtypeStruct

    @property
    def num_outputs(self) -> int:
        """K, the number of outputs (logits) of one sample."""
        return self.output_aval.size


def trace(model: PyTree, sample: jax.ShapeDtypeStruct) -> tuple[Program, list[Array]]:
    """Trace `model` on one sample.

    **Returns:**

    The program, and the model's floating-point leaves in the order of the program's parameters.
    """
    dynamic, static = eqx.partition(model, eqx.is_inexact_array)
    named, treedef = jax.tree_util.tree_flatten_with_path(dynamic)
    leaves = [leaf for _, leaf in named]
    paths = tuple(jax.tree_util.keystr(path) for path, _ in named)

    def call(params: list[Array], x: Array) -> Any:
        return eqx.combine(jax.tree_util.tree_unflatten(treedef, params), static)(x)

    avals = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves)
    with calling_model("ntk", model, sample):
        closed, out = jax.make_jaxpr(call, return_shape=True)(list(avals), sample)
    checked_output("ntk", out)
    steps: list[Step] = []
    slots = _Slots()
    inputs = [slots.new() for _ in range(len(avals) + 1)]
    (output,) = _unfold(closed.jaxpr, closed.consts, inputs, steps, slots)
    (aval,) = closed.out_avals
    program = Program(
        tuple(steps), avals, paths, output, jax.ShapeDtypeStruct(aval.shape, aval.dtype)
    )
    return program, leaves


def run(
    program: Program,
    values: Mapping[int, Any],
    steps: Sequence[int],
    perturbations: Mapping[int, Array],
    tapped: Mapping[int, int],
) -> tuple[dict[int, Any], dict[int, Array]]:
    """Evaluate steps of the program for one sample.

    **Arguments:**

    - `values`: slot -> value; what the steps read and do not write themselves.
    - `steps`: indices of the steps, in their order.
    - `perturbations`: step index -> array added to that step's output.
    - `tapped`: step index -> operand number whose value is handed out.

    **Returns:**

    The values of all slots, and the tapped operands by step index.
    """
    values, operands = dict(values), {}
    for index in steps:
        step = program.steps[index]
        inputs = [_read(values, slot) for slot in step.inputs]
        if index in tapped:
            operands[index] = inputs[tapped[index]]
        outputs = apply_primitive(step.eqn, inputs)
        if index in perturbations:
            outputs = [outputs[0] + perturbations[index].astype(outputs[0].dtype)]
        values.update(zip(step.outputs, outputs, strict=True))
    return values, operands


def outputs_of(program: Program, values: Mapping[int, Any]) -> Array:
    """The program's outputs among `values`, flattened to `[K]`."""
    return jnp.reshape(_read(values, program.output), (-1,))


def _read(values: Mapping[int, Any], slot: Any) -> Any:
    return slot.value if isinstance(slot, Const) else values[slot]


class _Slots:
    def __init__(self) -> None:
        self.count = 0

    def new(self) -> int:
        self.count += 1
        return self.count - 1


def _unfold(
    jaxpr: Any, consts: Sequence[Any], inputs: Sequence[Any], steps: list[Step], slots: _Slots
) -> list[Any]:
    """Append the steps of `jaxpr` to `steps`, calls unfolded; return its output slots."""
    env: dict[Any, Any] = dict(zip(jaxpr.invars, inputs, strict=True))
    env.update(zip(jaxpr.constvars, map(Const, consts), strict=True))
    read = lambda v: Const(v.val) if isinstance(v, jex_core.Literal) else env[v]
    for eqn in jaxpr.eqns:
        operands = [read(v) for v in eqn.invars]
        if eqn.primitive.name in _INLINED:
            inner = eqn.params["jaxpr"] if "jaxpr" in eqn.params else eqn.params["call_jaxpr"]
            inner_jaxpr = getattr(inner, "jaxpr", inner)
            outputs = _unfold(inner_jaxpr, getattr(inner, "consts", ()), operands, steps, slots)
        else:
            outputs = [slots.new() for _ in eqn.outvars]
            steps.append(Step(eqn, tuple(operands), tuple(outputs)))
        env.update(zip(eqn.outvars, outputs, strict=True))
    return [read(v) for v in jaxpr.outvars]
