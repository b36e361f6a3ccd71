"""Evaluate one equation of a jaxpr, by a cheaper equivalent where the CPU has a slow one."""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Array


def apply_primitive(eqn: Any, inputs: Sequence[Any]) -> list[Array]:
    """The outputs of `eqn` for concrete or traced `inputs`."""
    out = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(eqn.params))
    return list(out) if eqn.primitive.multiple_results else [out]
