"""Find how a program uses each parameter: as weight or bias of a linear layer, or otherwise.

A linear layer computes `y[g,i,s] = sum_j W[g,i,j] a[g,j,s]`: groups g, output features i, input
features j, positions s. A dense layer has one group and one position, a dense layer that `vmap`
applies along a sequence has many positions, a convolution has its patches as input features, and an
embedding's input is 1 at one feature.
A parameter that reaches the layer through operations that only rearrange its entries (a reshape, a
transpose, a change of dtype) still counts: the metric `c` is rearranged with it.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ._primitives import apply_primitive, patches
from ._program import Const, Program, Step

_REARRANGING = ("reshape", "transpose", "squeeze", "expand_dims", "rev", "copy", "copy_p")


@dataclasses.dataclass(frozen=True)
class Layer:
    """A linear layer, and the parameters that are its weight and, if it has one, its bias."""

    kind: str
    weight: int
    bias: int | None
    step: int
    operand: int
    groups: int
    features: int
    inputs: int
    positions: int
    keeps_order: bool
    _weight_view: Callable[[Array], Array]
    _bias_order: np.ndarray | None
    _activations: Callable[[Array], Array]
    _cotangents: Callable[[Array], Array]

    def metric(self, c: Array) -> Array:
        """The metric of the weight, `[G, I, J]`."""
        return self._weight_view(c)

    def bias_metric(self, c: Array) -> Array:
        """The metric of the bias, `[G, I]`."""
        assert self._bias_order is not None
        return c.reshape(-1)[self._bias_order].reshape(self.groups, self.features)

    def activations(self, operand: Array) -> Array:
        """What comes into the layer, `[G, J, S]`, from the operand of its step.

        A bias is one more input feature that is always 1.
        """
        a = self._activations(operand)
        return a if self.bias is None else jnp.concatenate([a, jnp.ones_like(a[:, :1])], axis=1)

    def cotangents(self, d: Any) -> Any:
        """What flows back to its output, `[G, I, S]`, from the cotangent of its step's output."""
        return self._cotangents(d)


def find_layers(program: Program) -> tuple[list[Layer], list[int]]:
    """The linear layers of `program`, and the parameters that are in none of them."""
    views, uses = _follow(program)
    layers = []
    for index, step in enumerate(program.steps):
        found = _linear_layer(program, index, step, views, uses)
        if found is not None:
            layers.append(found)
    layers = [_with_bias(program, layer, views, uses) for layer in layers]
    covered = {p for layer in layers for p in (layer.weight, layer.bias)}
    return layers, [p for p in range(len(program.params)) if p not in covered]


@dataclasses.dataclass(frozen=True)
class _View:
    """A value that holds the entries of one parameter in another order, or repeated."""

    param: int
    steps: tuple[Step, ...]
    repeats: bool

    def apply(self, array: Any) -> Any:
        for step in self.steps:
            array = _rearrange(step, array)
        return array


@dataclasses.dataclass(frozen=True)
class _Use:
    step: int  # -1: the program's output
    operand: int
    view: _View


def _follow(program: Program) -> tuple[dict[int, _View], list[list[_Use]]]:
    """Views of the parameters by slot, and every use of each parameter that is not a view."""
    views = {p: _View(p, (), False) for p in range(len(program.params))}
    uses: list[list[_Use]] = [[] for _ in program.params]
    for index, step in enumerate(program.steps):
        seen = [(n, views[s]) for n, s in enumerate(step.inputs) if _is_view(s, views)]
        if len(seen) == 1 and len(step.inputs) == 1 and _rearranges(step):
            view = seen[0][1]
            repeats = math.prod(step.shape) != math.prod(program.params[view.param].shape)
            views[step.outputs[0]] = _View(view.param, (*view.steps, step), repeats)
        else:
            for n, view in seen:
                uses[view.param].append(_Use(index, n, view))
    if _is_view(program.output, views):
        view = views[program.output]
        uses[view.param].append(_Use(-1, 0, view))
    return views, uses


def _is_view(slot: Any, views: dict[int, _View]) -> bool:
    return not isinstance(slot, Const) and slot in views


def _rearranges(step: Step) -> bool:
    if step.name == "convert_element_type":
        return jnp.issubdtype(step.eqn.params["new_dtype"], jnp.floating)
    return step.name in _REARRANGING or step.name == "broadcast_in_dim"


def _rearrange(step: Step, array: Any) -> Any:
    """Apply one rearranging step to a jax array, or (compiling nothing) to a NumPy array."""
    params = step.eqn.params
    if step.name in ("convert_element_type", "copy", "copy_p"):
        return array
    if not isinstance(array, np.ndarray):
        return apply_primitive(step.eqn, [array])[0]
    if step.name == "transpose":
        return array.transpose(params["permutation"])
    if step.name == "rev":
        return np.flip(array, params["dimensions"])
    if step.name == "broadcast_in_dim":
        shape = [1] * len(step.shape)
        for axis, size in zip(params["broadcast_dimensions"], array.shape, strict=True):
            shape[axis] = size
        return np.broadcast_to(array.reshape(shape), step.shape)
    return array.reshape(step.shape)  # reshape, squeeze, expand_dims


def _linear_layer(
    program: Program, index: int, step: Step, views: dict[int, _View], uses: list[list[_Use]]
) -> Layer | None:
    candidates = [
        (n, views[s])
        for n, s in enumerate(step.inputs)
        if _is_view(s, views) and not views[s].repeats and len(uses[views[s].param]) == 1
    ]
    if len(candidates) != 1:
        return None
    operand, view = candidates[0]
    if step.name == "dot_general":
        return _dense(step, index, operand, view)
    if step.name == "conv_general_dilated" and operand == 1:
        return _convolution(step, index, view)
    if step.name in ("gather", "dynamic_slice") and operand == 0:
        return _embedding(step, index, view)
    return None


def _dense(step: Step, index: int, operand: int, view: _View) -> Layer:
    (contract, batch) = step.eqn.params["dimension_numbers"]
    shapes = [v.aval.shape for v in step.eqn.invars]
    mine, other = operand, 1 - operand
    free = [
        [ax for ax in range(len(shapes[n])) if ax not in (*contract[n], *batch[n])] for n in (0, 1)
    ]
    size = lambda n, axes: math.prod(shapes[n][ax] for ax in axes)
    groups, features = size(mine, batch[mine]), size(mine, free[mine])
    inputs, positions = size(mine, contract[mine]), size(other, free[other])

    def weight_view(c: Any) -> Any:
        c = view.apply(c).transpose(*batch[mine], *free[mine], *contract[mine])
        return c.reshape(groups, features, inputs)

    def activations(a: Array) -> Array:
        a = a.transpose(*batch[other], *contract[other], *free[other])
        return a.reshape(groups, inputs, positions)

    def cotangents(d: Any) -> Any:
        # a dot_general's output axes: batch, then the left operand's free axes, then the right's
        first, second = (features, positions) if mine == 0 else (positions, features)
        d = d.reshape(groups, first, second)
        return d if mine == 0 else d.swapaxes(1, 2)

    return Layer(
        "dense", view.param, None, index, other, groups, features, inputs, positions,
        _keeps_order(weight_view, view, step, mine), weight_view, None, activations, cotangents,
    )  # fmt: skip


def _convolution(step: Step, index: int, view: _View) -> Layer | None:
    p = step.eqn.params
    if p["batch_group_count"] != 1:
        return None
    numbers, groups = p["dimension_numbers"], p["feature_group_count"]
    rhs = step.eqn.invars[1].aval.shape
    kernel = [rhs[ax] for ax in numbers.rhs_spec]  # (O, C / G, *spatial)
    features, inputs = kernel[0] // groups, math.prod(kernel[1:])
    out_spec = numbers.out_spec  # where (batch, features, *spatial) stand in the output
    positions = math.prod(step.shape) // kernel[0]

    def weight_view(c: Any) -> Any:
        c = view.apply(c).transpose(numbers.rhs_spec)
        return c.reshape(groups, features, inputs)

    def activations(a: Array) -> Array:
        seen = patches(step.eqn, a)  # [B, *out, taps, C]
        taps, channels = seen.shape[-2:]
        seen = seen.reshape(positions, taps, groups, channels // groups)
        return seen.transpose(2, 3, 1, 0).reshape(groups, inputs, positions)

    def cotangents(d: Any) -> Any:
        d = d.transpose(out_spec)  # (B, O, *out)
        d = d.reshape(d.shape[0], groups, features, -1)
        return d.transpose(1, 2, 0, 3).reshape(groups, features, positions)

    return Layer(
        "convolution", view.param, None, index, 0, groups, features, inputs, positions,
        _keeps_order(weight_view, view, step, 1), weight_view, None, activations, cotangents,
    )  # fmt: skip


def _embedding(step: Step, index: int, view: _View) -> Layer | None:
    """Rows of a table: a dense layer whose input is 1 at the row's number and 0 elsewhere."""
    p, (table, *places) = step.eqn.params, [v.aval.shape for v in step.eqn.invars]
    count, *row = table
    if tuple(p["slice_sizes"]) != (1, *row):
        return None
    column, clips, offsets = 0, True, tuple(range(len(step.shape)))  # dynamic_slice: one row
    if step.name == "gather":
        numbers, offsets = p["dimension_numbers"], tuple(p["dimension_numbers"].offset_dims)
        clips = p["mode"] == jax.lax.GatherScatterMode.CLIP
        starts = tuple(numbers.start_index_map)
        # Other starts can only be 0, and are made so where places are clipped.
        if starts != (0,) and not (clips and 0 in starts) or numbers.operand_batching_dims:
            return None
        column = starts.index(0)
    positions = math.prod(places[0][:-1]) if step.name == "gather" else 1
    features, order = math.prod(row), [n for n in range(len(step.shape)) if n not in offsets]

    def weight_view(c: Any) -> Any:
        return view.apply(c).reshape(1, count, features).swapaxes(1, 2)

    def activations(places: Array) -> Array:
        places = jnp.reshape(places, (positions, -1))[:, column]
        places = jnp.clip(places, 0, count - 1) if clips else places  # else: as no row at all
        rows = jax.nn.one_hot(places, count, dtype=step.eqn.outvars[0].aval.dtype)
        return rows.T[None]

    def cotangents(d: Any) -> Any:
        return d.transpose(*offsets, *order).reshape(1, features, positions)

    return Layer(
        "embedding", view.param, None, index, 1, 1, features, count, positions,
        _keeps_order(weight_view, view, step, 0), weight_view, None, activations, cotangents,
    )  # fmt: skip


def _keeps_order(
    weight_view: Callable[[Array], Array], view: _View, step: Step, operand: int
) -> bool:
    """Whether `[G, I, J]` holds the parameter's entries in the parameter's own order."""
    shape = view.steps[0].eqn.invars[0].aval.shape if view.steps else None
    shape = step.eqn.invars[operand].aval.shape if shape is None else shape
    places: Any = weight_view(np.arange(math.prod(shape)).reshape(shape))  # pyright: ignore
    return np.array_equal(places.ravel(), np.arange(math.prod(shape)))


def _with_bias(
    program: Program, layer: Layer, views: dict[int, _View], uses: list[list[_Use]]
) -> Layer:
    """Fold the bias into the layer where the very next thing done to its output is to add one."""
    chain: list[Step] = []
    slot = program.steps[layer.step].outputs[0]
    for index in range(layer.step + 1, len(program.steps)):
        step = program.steps[index]
        if slot not in [s for s in step.inputs if not isinstance(s, Const)]:
            continue
        if len(step.inputs) == 1 and _rearranges(step):
            chain.append(step)
            slot = step.outputs[0]
            continue
        if step.name not in ("add", "add_any"):
            return layer
        other = step.inputs[1 - list(step.inputs).index(slot)]
        if not _is_view(other, views):
            return layer
        view = views[other]
        if len(uses[view.param]) != 1 or _is_read_elsewhere(program, layer, slot, chain, index):
            return layer
        order = _bias_order(program, layer, view, chain, step)
        if order is None:
            return layer
        return dataclasses.replace(layer, bias=view.param, _bias_order=order)
    return layer


def _is_read_elsewhere(
    program: Program, layer: Layer, slot: int, chain: list[Step], add: int
) -> bool:
    """Whether the layer's output is also used without its bias."""
    inner = {program.steps[layer.step].outputs[0], slot, *(s.outputs[0] for s in chain)}
    allowed = {id(program.steps[add]), *map(id, chain)}
    if not isinstance(program.output, Const) and program.output in inner:
        return True
    return any(
        id(step) not in allowed and any(s in inner for s in step.inputs if not isinstance(s, Const))
        for step in program.steps
    )


def _bias_order(
    program: Program, layer: Layer, view: _View, chain: list[Step], add: Step
) -> np.ndarray | None:
    """Which bias entry is added to each output feature, `[G I]`; `None` if it is no plain bias.

    Feature numbers, and the numbers of the bias's entries, go through the very operations that
    the program applies; the bias is plain if they meet one to one, each as often as the others.
    """
    total = layer.groups * layer.features
    if math.prod(program.params[view.param].shape) != total:
        return None
    numbers = np.arange(total).reshape(layer.groups, layer.features, 1)
    numbers = np.broadcast_to(numbers, (layer.groups, layer.features, layer.positions))
    features = _transpose_of(layer, numbers, program.steps[layer.step].shape)
    for rearrangement in chain:
        features = _rearrange(rearrangement, features)
    entries: Any = np.arange(total).reshape(program.params[view.param].shape)
    try:
        features, entries = np.broadcast_arrays(features, view.apply(entries))
    except ValueError:
        return None
    if features.shape != add.shape or features.size != total * layer.positions:
        return None
    pairs = np.unique(np.stack([features.ravel(), entries.ravel()], 1), axis=0)
    if len(pairs) != total or not np.array_equal(np.sort(pairs[:, 1]), np.arange(total)):
        return None
    return pairs[:, 1]


def _transpose_of(layer: Layer, numbers: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Send `[G, I, S]` back to the shape of the step's output: the inverse of `cotangents`."""
    places: Any = np.arange(math.prod(shape)).reshape(shape)
    order = np.asarray(layer.cotangents(places)).ravel()
    out = np.empty(math.prod(shape), numbers.dtype)
    out[order] = numbers.ravel()
    return out.reshape(shape)
