"""Which axes of each weight are outputs, inputs and a window, read from the program."""

import math

import equinox as eqx
import numpy as np
from jaxtyping import Array, Shaped

from .._checks import sample_of
from .._sparse import SparseModel
from .._types import PyTree
from ._given import given_batches, given_model
from ._layers import Layer, find_layers
from ._linear import AbstractLinearUse, AbstractUse, Convolution, rules_in_use
from ._trace import trace


def weight_layouts(model: PyTree, x: Shaped[Array | np.ndarray, "n ..."]) -> dict[str, str]:
    """The order of the axes of every weight that the model uses in one linear layer.

    Read from how the traced model uses each weight, not from names: `dot_general` and convolutions
    say over which axes they sum. For `InLayout`.

    **Arguments:**

    - `model`: any model that `ntk` takes.
    - `x`: samples, of which only the shape and dtype count.

    **Returns:**

    By the path of a weight a string with a letter for each axis: `"o"` for outputs (and for what
    repeats the layer with other weights, as `vmap` over a stack of them does), `"i"` for inputs,
    `"k"` for the window of a convolution. In the order in which the program uses them. Left out are
    parameters that are used twice, or otherwise than as the weight of a linear layer, and weights
    of which one axis holds both inputs and outputs. Which letter an axis of length 1 has makes no
    difference.

    **Raises:**

    `ValueError` for models and inputs that `ntk` does not take.
    """
    caller = "weight_layouts"
    model, (x, _) = given_model(caller, model), given_batches(caller, x, None)
    dense = eqx.nn.inference_mode(model.model if isinstance(model, SparseModel) else model)
    traced, arrays = trace(dense, sample_of(x))
    layers, _ = find_layers(traced.program, [a.shape for a in arrays], rules_in_use())
    whole = [layer for layer in layers if isinstance(layer.use, AbstractLinearUse)]
    named = ((traced.parameters[layer.weight], layer) for layer in whole)
    found = {parameter.path: _layout(layer) for parameter, layer in named}
    return {path: letters for path, letters in found.items() if letters is not None}


def _layout(layer: Layer) -> str | None:
    """The letters of one layer's weight; `None` where one axis would need two."""
    letters = [_letter(layer, axis) for axis in range(len(layer.view.shape))]
    if "?" in letters:
        return None
    for kind, other in ("oi", "io"):  # an axis of length 1 may be either: the one beside the other
        ones = [axis for axis, letter in enumerate(letters) if letter == "1"]
        if kind not in letters and ones:
            beside = letters.index(other) if other in letters else 0
            letters[min(ones, key=lambda axis: abs(axis - beside))] = kind
    return "".join(letters).replace("1", "k")


def _letter(layer: Layer, axis: int) -> str:
    """The quantity that an axis counts: outputs, inputs, or taps of a window."""
    shape = layer.view.shape
    if shape[axis] == 1:
        return "1"
    along = [size if n == axis else 1 for n, size in enumerate(shape)]
    places = np.broadcast_to(np.arange(shape[axis]).reshape(along), shape)
    placed = np.asarray(layer.metric(places))  # [G, I, J]; in J taps vary fastest
    placed = placed.reshape(layer.groups * layer.features, -1, _taps(layer.use))
    kinds = [kind for n, kind in enumerate("oik") if (placed != placed.take([0], axis=n)).any()]
    return kinds[0] if len(kinds) == 1 else "?"


def _taps(use: AbstractUse) -> int:
    if not isinstance(use, Convolution):
        return 1
    shape, numbers = use.eqn.invars[1].aval.shape, use.eqn.params["dimension_numbers"]
    return math.prod(shape[axis] for axis in numbers.rhs_spec[2:])
