"""A network as the sum of its paths: what SynFlow and Path eXclusion look at.

Biases, and all else that is added to a signal, are left out (a path runs from an input to an
output), and normalisations scale by their weight only, as batch normalisation does before training.
"""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float

from .._parameters import parameter_marks
from .._program import (
    Const,
    Program,
    Site,
    bind,
    dependent_operands,
    is_call,
    read,
    run,
    slots_of,
    unfold,
)
from .._prunable import is_bare
from .._sparse import _NORMALISATIONS
from .._types import PyTree, at_trace_time

_MOVES = (
    "broadcast_in_dim", "convert_element_type", "copy", "expand_dims", "reshape", "slice",
    "squeeze", "transpose",
)  # fmt: skip
_SUMS = ("add", "add_any", "sub")
_CONTROL = ("scan", "while", "cond")
_COMPARISONS = ("gt", "ge", "lt", "le")


def path_network(
    model: PyTree, sample: jax.ShapeDtypeStruct, change: Callable[[Array], Array]
) -> PyTree:
    """`model`, of one `sample`, with every parameter passed through `change`, biases zero.

    The result has the structure of `model`; call it through `without_normalisation`.
    """

    def rule(path: Any, is_parameter: bool, is_bias: bool, leaf: Any) -> Any:
        if not is_parameter:
            return leaf
        changed = change(leaf)
        return jnp.zeros_like(changed) if is_bias else changed

    marks = parameter_marks(model)
    return jtu.tree_map_with_path(rule, marks, _biases(model, marks, sample), model)


def _biases(model: PyTree, marks: PyTree, sample: jax.ShapeDtypeStruct) -> PyTree:
    """Which parameters are biases: by their uses, and by their names in Equinox modules.

    A bias may have any name (`b1`, `positions`) or none (the pairs of `stax`).
    """
    named = jtu.tree_leaves_with_path(model)
    rows = zip(jax.tree.leaves(marks), named, _only_added(model, sample), strict=True)
    found = [
        mark and (added or not is_bare(model, path) and _last_name(path).startswith("bias"))
        for mark, (path, _), added in rows
    ]
    return jax.tree.structure(model).unflatten(found)


def _last_name(path: jtu.KeyPath) -> str:
    return jtu.keystr(path).rsplit(".", 1)[-1]


def _only_added(model: PyTree, sample: jax.ShapeDtypeStruct) -> list[bool]:
    """For each leaf, whether the program of `model` does nothing with it but to add it to a signal.

    A signal depends on the sample. What is added to a weight, as in `w + down @ up`, is no bias.
    """
    leaves, structure = jax.tree.flatten(model)
    places = [n for n, leaf in enumerate(leaves) if isinstance(leaf, jax.Array | np.ndarray)]

    def call(arrays: Sequence[Array], x: Array) -> Array:
        given = dict(zip(places, arrays, strict=True))
        return structure.unflatten([given.get(n, leaf) for n, leaf in enumerate(leaves)])(x)

    arrays = [jax.ShapeDtypeStruct(leaves[n].shape, leaves[n].dtype) for n in places]
    program = unfold(jax.make_jaxpr(call)(arrays, sample), _opens)
    signals = dependent_operands(program, [len(places)])
    added: set[int] = set()
    other: set[int] = set()

    def visit(program: Program, views: dict[int, frozenset[int]], outer: Site) -> None:
        """Follow slots that hold nothing but entries of leaves, and their sums."""
        for index, step in enumerate(program.steps):
            site = (*outer, index)
            held = {
                n: views[slot]
                for n, slot in enumerate(step.inputs)
                if not isinstance(slot, Const) and slot in views
            }
            if step.loop is not None:
                carry = range(step.loop.consts, step.loop.consts + step.loop.carry)
                other.update(*(of for n, of in held.items() if n in carry))
                visit(step.loop.body, {n: of for n, of in held.items() if n not in carry}, site)
            elif step.name in _SUMS and any((site, n) in signals for n in range(len(step.inputs))):
                added.update(*held.values())
            elif step.name in (*_SUMS, *_MOVES) and held:
                views[step.outputs[0]] = frozenset().union(*held.values())
            else:
                other.update(*held.values())
        other.update(*(views[slot] for slot in slots_of(program.outputs) if slot in views))

    visit(program, {slot: frozenset([n]) for slot, n in enumerate(places)}, ())
    return [n in added - other for n in range(len(leaves))]


def without_normalisation(model: PyTree) -> PyTree:
    """`model` with every normalisation replaced by a product with its weight."""
    is_norm = lambda node: isinstance(node, _NORMALISATIONS)
    return jax.tree.map(
        lambda node: _Scale(getattr(node, "weight", None)) if is_norm(node) else node,
        model,
        is_leaf=is_norm,
    )


def activation_pattern(model: PyTree, x: Float[Array, "..."]) -> list[Bool[Array, "..."]]:
    """Which units are on when `model` sees the one sample `x`, in order of use.

    Every maximum with zero (ReLU) and every comparison of floats (a ReLU or leaky ReLU written
    with `where`) is a set of gates.
    """
    gates: list[Array] = []

    def decide(gate: Array) -> Array:
        gates.append(gate)
        return gate

    _run(_hide_normalisation(model), x, decide)
    return gates


def apply_gated(
    model: PyTree, x: Float[Array, "..."], pattern: Sequence[Bool[Array, "..."]]
) -> Array:
    """`model` on one sample with the gates that another network set."""
    left = list(pattern)
    out = _run(model, x, lambda gate: left.pop(0))
    assert not left, "the gated network has other activations than the network itself"
    return out


class _Scale(eqx.Module):
    """A normalisation's weight alone: along the first axis, or of the input's own shape."""

    weight: Array | None

    def __call__(self, x: Array, state: Any = None, *, key: Any = None) -> Any:
        if self.weight is not None:
            trailing = (1,) * (x.ndim - self.weight.ndim)
            x = x * self.weight.reshape(self.weight.shape + trailing)
        return x if state is None else (x, state)


class _Hidden(eqx.Module):
    """A normalisation whose insides `_run` does not look into."""

    inner: Any

    def __call__(self, x: Array, *args: Any, **kwargs: Any) -> Any:
        def call(x: Array) -> Any:
            return self.inner(x, *args, **kwargs)

        call.__name__ = _Hidden.__name__
        return jax.jit(call)(x)


def _hide_normalisation(model: PyTree) -> PyTree:
    is_norm = lambda node: isinstance(node, _NORMALISATIONS)
    return jax.tree.map(
        lambda node: _Hidden(node) if is_norm(node) else node, model, is_leaf=is_norm
    )


def _opens(eqn: Any) -> bool:
    """Calls are looked into, those with a derivative of their own too; normalisations are not."""
    calls = is_call(eqn) or eqn.primitive.name in ("custom_jvp_call", "custom_vjp_call")
    return calls and eqn.params.get("name") != _Hidden.__name__


def _run(model: PyTree, x: Array, decide: Callable[[Array], Array]) -> Array:
    """Evaluate `model(x)`; `decide` may replace each set of gates by another."""

    def evaluate(eqn: Any, values: Sequence[Any]) -> list[Any]:
        name = eqn.primitive.name
        if name in _CONTROL:
            raise NotImplementedError(
                f"PathExclusion: cannot follow activations through `{name}`; unroll the loop."
            )
        if name == "max" and any(map(_is_zero, values)):
            z = values[0] if _is_zero(values[1]) else values[1]
            return [jnp.where(decide(z > 0), z, jnp.zeros_like(z))]
        out = _evaluate(eqn, values)
        if name in _COMPARISONS and jnp.issubdtype(eqn.invars[0].aval.dtype, jnp.floating):
            out = [decide(out[0])]
        return out

    program = unfold(jax.make_jaxpr(model)(x), _opens)
    values, _ = run(program, {0: x}, range(len(program.steps)), evaluate)
    (output,) = program.outputs
    return read(values, output)


def _evaluate(eqn: Any, values: Sequence[Any]) -> list[Any]:
    if any(isinstance(value, Tracer) for value in values):
        return bind(eqn, values)
    with at_trace_time():  # a constant stays one: a maximum with it is recognised
        return bind(eqn, values)


def _is_zero(value: Any) -> bool:
    return not isinstance(value, Tracer) and not np.any(np.asarray(value))
