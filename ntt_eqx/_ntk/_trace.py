"""A model as a program of its parameters and one sample."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, get_abstract_mesh, use_abstract_mesh
from jaxtyping import Array

from .._checks import calling_model, checked_output
from .._masks._collapse import is_traced
from .._parameters import parameter_marks, partition_parameters
from .._program import Program, unfold, without_dead_steps
from .._types import PyTree
from ..kernels.manual_axes import like_varying, varies
from ._own_rules import loses_rules


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter of a model.

    Attributes:
        path: its key string, such as `".layers[0].weight"`.
        shape: its shape in the model.
        dtype: its dtype in the model.
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any

    @property
    def is_complex(self) -> bool:
        """Whether it is complex, and so stored as pairs of real numbers, `[*shape, 2]`."""
        return bool(jnp.issubdtype(self.dtype, jnp.complexfloating))

    def spread(self, c: Array | None) -> Array | None:
        """Broadcast a metric of the parameter's shape to its real numbers."""
        if c is None or not self.is_complex:
            return c
        return jnp.broadcast_to(c[..., None], (*self.shape, 2))


@dataclasses.dataclass(frozen=True)
class Traced:
    """A traced model: its parameters are slots 0 .. P - 1 of the program, the sample is slot P.

    Attributes:
        outputs_apart: whether outputs need a forward pass of their own to have the right gradient.
    """

    program: Program
    parameters: tuple[Parameter, ...]
    output_aval: jax.ShapeDtypeStruct
    outputs_apart: bool

    @property
    def sample_slot(self) -> int:
        """The slot of the sample."""
        return len(self.parameters)

    @property
    def output(self) -> Any:
        """The slot of the outputs, or a constant."""
        return self.program.outputs[0]

    @property
    def num_outputs(self) -> int:
        """K, the number of outputs (logits) of one sample."""
        return self.output_aval.size


def real_parameters(
    model: PyTree,
) -> tuple[list[Array], tuple[Parameter, ...], Callable[[list[Array]], PyTree]]:
    """Convert the parameters of a model to real arrays, and return the inverse.

    The kernel sums over real parameters. A complex one counts as a pair, with the share
    `Re(df/dz conj(df'/dz))`, and becomes a real array with one more axis of size 2.

    **Returns:**

    The arrays, their descriptions, and a function from such arrays to the model.
    """
    dynamic, static = partition_parameters(model)
    named, treedef = jax.tree_util.tree_flatten_with_path(dynamic)
    parameters = tuple(
        Parameter(jax.tree_util.keystr(path), leaf.shape, leaf.dtype) for path, leaf in named
    )

    def rebuild(arrays: list[Array]) -> PyTree:
        leaves = [
            jax.lax.complex(a[..., 0], a[..., 1]) if p.is_complex else a
            for a, p in zip(arrays, parameters, strict=True)
        ]
        return eqx.combine(jax.tree_util.tree_unflatten(treedef, leaves), static)

    arrays = [
        jnp.stack([leaf.real, leaf.imag], axis=-1) if p.is_complex else leaf
        for (_, leaf), p in zip(named, parameters, strict=True)
    ]
    return arrays, parameters, rebuild


def trace(model: PyTree, sample: jax.ShapeDtypeStruct) -> tuple[Traced, list[Array]]:
    """Trace `model` on one sample.

    **Returns:**

    The traced model, and its parameters as real arrays.
    """
    inputs = jax.tree.map(lambda p, a: is_traced(a) and not p, parameter_marks(model), model)
    others, model = eqx.partition(model, inputs)
    arrays, parameters, rebuild = real_parameters(model)

    def call(arrays: list[Array], x: Array, others: PyTree) -> Any:
        return eqx.combine(rebuild(arrays), others)(x)

    # Trace without a mesh: the tiles of the program run inside `shard_map`, and derivative rules
    # remember the mesh under which they were traced.
    plain = lambda tree: jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)
    given, mesh = (plain(arrays), sample, plain(others)), get_abstract_mesh()
    if not getattr(mesh, "manual_axes", ()):
        mesh = AbstractMesh((), ())
    elif varies(arrays):  # a `jax.shard_map` of the user's own, where types say so
        given = arrays, like_varying(jnp.zeros(sample.shape, sample.dtype), arrays), others
    with calling_model("ntk", model, sample), use_abstract_mesh(mesh):
        closed, out = jax.make_jaxpr(call, return_shape=True)(*given)
        outputs_apart = loses_rules(closed)
    checked_output("ntk", out)
    (aval,) = closed.out_avals
    program = without_dead_steps(unfold(closed, known=jax.tree.leaves(others)))
    output_aval = jax.ShapeDtypeStruct(aval.shape, aval.dtype)
    return Traced(program, parameters, output_aval, outputs_apart), arrays
