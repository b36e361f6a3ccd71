"""The mean and the spread, over a batch, of the inputs that each weight is multiplied with."""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float, Shaped

from .._examples import as_inference
from .._ntk._layers import Layer, linear_uses
from .._ntk._linear import AbstractLinearUse, RegisteredRule, rules_in_use
from .._program import (
    Program,
    bind,
    dependent_operands,
    is_call,
    run,
    unfold,
    without_dead_steps,
)
from .._sparse import SparseModel
from .._types import PyTree, widen
from ..kernels import block_size, map_rows
from ._base import split_weights

_BLOCK_BYTES = 1 << 26  # of the inputs of all layers that are computed at a time
_RULES_OF_THEIR_OWN = ("custom_jvp_call", "custom_vjp_call")


class InputMoments(eqx.Module):
    """Moments of the inputs that the weights of one leaf are multiplied with.

    They are taken over a batch and, where a layer uses a weight at several positions (of a
    convolution, of a sequence) or several layers share it, over all of these.

    Attributes:
        mean: their mean, an array of the weight's shape.
        spread: their standard deviation, likewise.
        count: how many inputs each weight has.
        of_sample: whether no input has passed through a prunable weight.
    """

    mean: Float[Array, "..."]
    spread: Float[Array, "..."]
    count: int = eqx.field(static=True)
    of_sample: bool = eqx.field(static=True)

    @property
    def norm(self) -> Float[Array, "..."]:
        """The Euclidean norm of all inputs that a weight has."""
        return jnp.sqrt(self.count * (jnp.square(self.mean) + jnp.square(self.spread)))


def input_moments(caller: str, sparse: SparseModel, x: Shaped[Array, "batch ..."]) -> PyTree:
    """The `InputMoments` of each prunable weight, in the masked network.

    **Arguments:**

    - `caller`: the name that errors begin with.
    - `sparse`: the network.
    - `x`: inputs `[batch, ...]`.

    **Raises:**

    `ValueError` for a prunable weight that is used other than as the weight of linear layers: it
    has no input.
    """
    return _moments(caller, sparse, x, rules_in_use())


@eqx.filter_jit
def _moments(
    caller: str, sparse: SparseModel, x: Array, rules: tuple[RegisteredRule, ...]
) -> PyTree:
    weights, rest = split_weights(as_inference(sparse), sparse.mask)
    named, treedef = jtu.tree_flatten_with_path(weights)
    leaves = [leaf for _, leaf in named]

    def call(leaves: list[Array], sample: Array) -> Any:
        return eqx.combine(jtu.tree_unflatten(treedef, leaves), rest)(sample)

    program = without_dead_steps(unfold(jax.make_jaxpr(call)(leaves, x[0]), _opens))
    uses = _linear_uses(caller, program, named, rules)
    size = block_size(len(x), _bytes(uses), _BLOCK_BYTES)
    each = map_rows(_moments_of_sample(program, leaves, uses), x, len(x), size)
    dependent = dependent_operands(program, range(len(leaves)))
    found = []
    for layers, of_uses in zip(uses, each, strict=True):
        parts = []
        for layer, (means, squares) in zip(layers, of_uses, strict=True):
            counts = np.full(len(x), layer.positions)
            count, mean, square = _joined(counts, means, squares)
            parts.append((count, _placed(layer, mean), _placed(layer, square)))
        counts, means, squares = zip(*parts, strict=True)
        count, mean, square = _joined(np.asarray(counts), jnp.stack(means), jnp.stack(squares))
        reads = {(layer.site, n) for layer in layers for n in layer.use.operands}
        spread = jnp.sqrt(square / count)
        found.append(InputMoments(mean, spread, count, not reads & dependent))
    return jtu.tree_unflatten(treedef, found)


def _opens(eqn: Any) -> bool:
    """Values alone count here, so a function with a derivative of its own is opened, too."""
    return is_call(eqn) or eqn.primitive.name in _RULES_OF_THEIR_OWN


def _linear_uses(
    caller: str, program: Program, named: list[Any], rules: tuple[RegisteredRule, ...]
) -> list[list[Layer]]:
    """The layers of each weight; `ValueError` for a weight that is used otherwise."""
    found = []
    all_uses = linear_uses(program, [leaf.shape for _, leaf in named], rules)
    for (path, _), uses in zip(named, all_uses, strict=True):
        layers = [use for use in uses if use and isinstance(use.use, AbstractLinearUse)]
        if not layers or len(layers) < len(uses):
            raise ValueError(
                f"{caller}: {jtu.keystr(path)} is used other than as the weight of linear layers, "
                "and so has no input to look at. Leave it out of the prunable weights, see "
                "`sparsify`, or take another score."
            )
        found.append(layers)
    return found


def _bytes(uses: list[list[Layer]]) -> int:
    each = [layer.groups * layer.inputs * layer.positions for of in uses for layer in of]
    return 4 * sum(each)


def _moments_of_sample(
    program: Program, leaves: list[Array], uses: list[list[Layer]]
) -> Callable[[Array], list[list[tuple[Array, Array]]]]:
    """From a sample: mean and sum of squared deviations `[G, J]` of each use's inputs."""
    taps: dict[Any, tuple[int, ...]] = {}
    zeros = {}
    for layer in (layer for of in uses for layer in of):
        taps[layer.site] = tuple(sorted({*taps.get(layer.site, ()), *layer.use.operands}))
        aval = program.step_at(layer.site).avals[0]
        zeros[layer.site] = jnp.zeros((*layer.loops, *aval.shape), aval.dtype)

    def moments(layer: Layer, tapped: dict[Any, tuple[Array, ...]]) -> tuple[Array, Array]:
        operands = dict(zip(taps[layer.site], tapped[layer.site], strict=True))
        a = layer.weight_activations(*(operands[n] for n in layer.use.operands))
        a = widen(a)
        mean = jnp.mean(a, axis=-1)
        return mean, jnp.sum(jnp.square(a - mean[..., None]), axis=-1)

    def of_sample(sample: Array) -> list[list[tuple[Array, Array]]]:
        given = dict(enumerate([*leaves, sample]))
        _, tapped = run(program, given, range(len(program.steps)), bind, zeros, taps)
        return [[moments(layer, tapped) for layer in of] for of in uses]

    return of_sample


def _joined(counts: np.ndarray, means: Array, squares: Array) -> tuple[int, Array, Array]:
    """Count, mean and sum of squared deviations of all, from those of parts along the first axis.

    Chan et al. (1983): squares of the inputs themselves would lose a small spread beside a large
    mean.
    """
    total = int(counts.sum())
    n = counts.reshape(-1, *(1,) * (means.ndim - 1)).astype(squares.dtype)
    mean = jnp.sum(n * means, axis=0) / total
    return total, mean, jnp.sum(squares + n * jnp.square(means - mean[None]), axis=0)


def _placed(layer: Layer, values: Array) -> Array:
    """An array of the parameter's shape from `[G, J]`: each weight has the value of its input."""
    shape = layer.view.shape
    numbers = layer.metric(np.arange(math.prod(shape)).reshape(shape))
    values = jnp.broadcast_to(values[:, None, :], numbers.shape)
    return values.ravel()[np.argsort(numbers.ravel())].reshape(shape)
