"""A sparse model as a program of one sample, with the values that its steps have there."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array

from .._checks import sample_of, sample_output
from .._parameters import parameter_marks
from .._program import Const, Program, bind, is_call, run, unfold, without_dead_steps
from .._sparse import SparseModel


@dataclasses.dataclass(frozen=True)
class TracedModel:
    """A sparse model, opened.

    Attributes:
        program: its steps; the inputs are its arrays in the order of its leaves, then the sample.
        names: path of each array.
        masks: of each array, `None` where it has none.
        marks: which arrays are parameters.
        values: slot -> value on one sample, on the host; none of random keys.
        probed: the same where weights that are kept but happen to be zero are 1.
    """

    program: Program
    names: tuple[str, ...]
    masks: tuple[np.ndarray | None, ...]
    marks: tuple[bool, ...]
    values: dict[int, np.ndarray]
    probed: dict[int, np.ndarray]

    def value(self, operand: Any) -> np.ndarray | None:
        """The value of an operand, where it is an array of numbers."""
        return host(operand.value) if isinstance(operand, Const) else self.values.get(operand)

    @property
    def sample(self) -> int:
        """The slot of the sample."""
        return len(self.names)


def trace(caller: str, sparse: SparseModel, x: Array) -> TracedModel:
    """Open `sparse`, in inference mode, on the first sample of `x`.

    **Raises:**

    `ValueError` where the model does not map one sample to one floating-point array.
    """
    dense = eqx.nn.inference_mode(sparse.to_dense())
    sample_output(caller, dense, sample_of(x))
    named, treedef = flat(dense)
    held = [n for n, (_, leaf) in enumerate(named) if eqx.is_array(leaf)]
    arrays = [named[n][1] for n in held]

    def function(arrays: Sequence[Array], x: Array) -> Array:
        leaves = [leaf for _, leaf in named]
        for n, array in zip(held, arrays, strict=True):
            leaves[n] = array
        return treedef.unflatten(leaves)(x)

    closed = jax.make_jaxpr(function)(arrays, x[0])
    program = without_dead_steps(unfold(closed, _opens))
    marks = jtu.tree_leaves(parameter_marks(dense), is_leaf=lambda leaf: leaf is None)
    names = tuple(jtu.keystr(named[n][0]) for n in held)
    masks = tuple(None if sparse.masks[n] is None else np.asarray(sparse.masks[n]) for n in held)

    @jax.jit
    def evaluate(inputs: Sequence[Array]) -> dict[int, Array]:
        return run(program, dict(enumerate(inputs)), range(len(program.steps)), bind)[0]

    values = on_host(evaluate([*arrays, x[0]]))
    parameters = [bool(marks[n]) for n in held]
    shown = [
        _without_chance(*given) for given in zip(arrays, names, masks, parameters, strict=True)
    ]
    same = all(a is b for a, b in zip(arrays, shown, strict=True))
    probed = values if same else on_host(evaluate([*shown, x[0]]))
    return TracedModel(program, names, masks, tuple(parameters), values, probed)


def flat(model: Any) -> tuple[list[tuple[Any, Any]], Any]:
    """The leaves of a model with their paths, `None` being one, as a `SparseModel` counts them."""
    return jtu.tree_flatten_with_path(model, is_leaf=lambda leaf: leaf is None)


def host(value: Any) -> np.ndarray | None:
    """An array of numbers on the host; `None` for random keys."""
    if jnp.issubdtype(getattr(value, "dtype", np.float32), jax.dtypes.extended):
        return None
    return np.asarray(value)


def on_host(values: dict[int, Any]) -> dict[int, np.ndarray]:
    """All of these that are numbers, on the host."""
    found = {slot: host(value) for slot, value in values.items()}
    return {slot: value for slot, value in found.items() if value is not None}


def _without_chance(array: Array, name: str, mask: np.ndarray | None, parameter: bool) -> Array:
    """1 in place of weights that nothing prunes but that are zero, as where they start at zero."""
    if not parameter or (mask is None and name.rsplit(".", 1)[-1].startswith("bias")):
        return array
    zero = np.asarray(array) == 0
    zero = zero if mask is None else zero & mask
    return jnp.where(zero, jnp.ones_like(array), array) if zero.any() else array


def _opens(eqn: Any) -> bool:
    """A function with a derivative of its own is opened, too: only its values are asked for."""
    return is_call(eqn) or eqn.primitive.name in ("custom_jvp_call", "custom_vjp_call")
