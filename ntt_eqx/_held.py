"""Steps of a loop, between which the state stays a row of arrays."""

import abc
from collections.abc import Iterable
from typing import Any, Generic, TypeVar

import equinox as eqx
import jax

State = TypeVar("State")

_ARRAY = object()  # stands in a form where the state has an array


class AbstractHeld(abc.ABC, Generic[State]):
    """A state between two steps of a loop, in whatever form is quick to step."""

    @abc.abstractmethod
    def whole(self) -> State:
        """The state."""


class _Form:
    """The structure of a state and all leaves that are no arrays; a part of jit's key."""

    def __init__(self, state: Any):
        leaves, structure = jax.tree.flatten(state)
        others = tuple(_ARRAY if eqx.is_array(leaf) else leaf for leaf in leaves)
        self._structure, self._others = structure, others
        self._hash = hash((structure, others))  # taken once: jit asks for it in every step

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other or not isinstance(other, _Form):
            return self is other
        return self._structure == other._structure and self._others == other._others

    def filled(self, arrays: Iterable[Any]) -> Any:
        """The state with these arrays."""
        arrays = iter(arrays)
        return self._structure.unflatten(
            next(arrays) if leaf is _ARRAY else leaf for leaf in self._others
        )


@jax.tree_util.register_pytree_node_class
class Held(AbstractHeld[State]):
    """The state of a run between two steps: its arrays in a row, and what makes a state of them.

    `eqx.filter_jit` takes a state apart in Python at every call, puts the next one together, and
    waits for it: a third of the time of a step of LeNet-300-100. A loop needs none of it before
    somebody looks at the state.
    """

    def __init__(self, arrays: list[Any], form: _Form):
        self._arrays, self._form = arrays, form

    @classmethod
    def of(cls, state: State) -> "Held[State]":
        """Hold a state."""
        return cls(jax.tree.leaves(eqx.filter(state, eqx.is_array)), _Form(state))

    def whole(self) -> State:
        """The state."""
        return self._form.filled(self._arrays)

    def tree_flatten(self) -> tuple[list[Any], _Form]:
        """The arrays, for JAX."""
        return self._arrays, self._form

    @classmethod
    def tree_unflatten(cls, form: _Form, arrays: Any) -> "Held[State]":
        """What `tree_flatten` took apart."""
        return cls(list(arrays), form)


def whole(state: Any) -> Any:
    """The state itself, held or not."""
    return state.whole() if isinstance(state, AbstractHeld) else state
