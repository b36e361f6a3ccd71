"""The definition of a parameter, for masks, kernels, optimisers and scores."""

from typing import Any

import equinox as eqx
import jax
from jaxtyping import PyTree


def is_state(node: Any) -> bool:
    """Whether Equinox marks `node` as state: an `eqx.nn.State`, or the index of an entry of one.

    Running means and variances are floating-point arrays too, but they follow from the data: no
    gradient moves them, and the tangent kernel has no term for them. An index holds the initial
    value of its entry until `eqx.nn.make_with_state` takes it out.
    """
    return isinstance(node, eqx.nn.State | eqx.nn.StateIndex)


def parameter_marks(model: PyTree) -> PyTree[bool]:
    """The structure of `model` with `True` at every parameter and `False` at every other leaf.

    A parameter is a floating-point or complex JAX array that is not part of a state.
    """
    mark = lambda node: (
        jax.tree.map(lambda _: False, node) if is_state(node) else eqx.is_inexact_array(node)
    )
    return jax.tree.map(mark, model, is_leaf=is_state)


def partition_parameters(model: PyTree) -> tuple[PyTree, PyTree]:
    """Split `model` into its parameters and all other leaves, as `eqx.partition` does."""
    return eqx.partition(model, parameter_marks(model))


def parameters(model: PyTree) -> PyTree:
    """`model` with `None` at every leaf that is not a parameter."""
    return partition_parameters(model)[0]
