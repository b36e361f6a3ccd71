"""The definition of a parameter, for masks, kernels, optimisers and scores."""

import sys
from typing import Any

import equinox as eqx
import jax

from ._types import PyTree


class Fixed(eqx.Module):
    """A tree of which no array is a parameter.

    Attributes:
        value: the tree.
    """

    value: Any


def is_state(node: Any) -> bool:
    """Whether no array of `node` is a parameter: it is `Fixed`, or a library marks it as state.

    Equinox does so by an `eqx.nn.State`, or the index of an entry of one; Flax NNX by an
    `nnx.Variable` that is no `nnx.Param`, such as an `nnx.BatchStat`. Running means and variances
    are floating-point arrays too, but they follow from the data: no gradient moves them, and the
    tangent kernel has no term for them. An index holds the initial value of its entry until
    `eqx.nn.make_with_state` takes it out.
    """
    if isinstance(node, Fixed | eqx.nn.State | eqx.nn.StateIndex):
        return True
    return is_nnx_variable(node) and not isinstance(node, sys.modules["flax.nnx"].Param)


def is_nnx_variable(node: Any) -> bool:
    """Whether `node` is a variable of Flax NNX, which is a PyTree with one leaf, its value."""
    # Who has such a node has imported Flax, so there is no need to.
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(node, nnx.Variable)


def parameter_marks(model: PyTree) -> PyTree:
    """The structure of `model` with `True` at every parameter and `False` at every other leaf.

    A parameter is a floating-point or complex array, of JAX or NumPy, that is not part of a state.
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
