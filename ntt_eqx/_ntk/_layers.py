"""Find how a program uses each parameter: as weight or bias of a linear layer, or otherwise.

A parameter may reach the layer through operations that only rearrange its entries (a reshape, a
transpose, a change of dtype); the metric `c` is then rearranged in the same way. It may also enter
the body of a `scan`. As a constant of the scan it is the weight of one layer at the positions of
all iterations; if the scan iterates over its rows, each iteration is a group.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .._program import Const, Loop, Program, Site, Step, bind, slots_of
from ._linear import (
    AbstractEntryUse,
    AbstractLinearUse,
    AbstractUse,
    Places,
    RegisteredRule,
    linear_use,
)

_REARRANGING = (
    "reshape", "transpose", "squeeze", "expand_dims", "rev", "copy", "copy_p", "broadcast_in_dim",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Layer:
    """A linear layer, and the parameters that are its weight and, if it has one, its bias.

    Attributes:
        view: the weight parameter, and how the program rearranges it before the layer.
        use: the equation that is linear in the weight.
        site: the place of that equation in the program.
        loops: lengths of the loops around the site.
        bias: number of the parameter that is its bias, if there is one.
        bias_order: the entry of the bias that each output feature gets, `[G I]`.
        index: what says where the entries of a weight are that stores some alone.
    """

    view: "View"
    use: AbstractUse
    site: Site
    loops: tuple[int, ...]
    bias: int | None = None
    bias_order: np.ndarray | None = None
    index: tuple[Array, ...] | None = None

    @property
    def weight(self) -> int:
        """Number of the parameter that is its weight."""
        return self.view.param

    @property
    def kind(self) -> str:
        """The name of its linear use, such as `"dense"`."""
        return self.use.kind

    @property
    def groups(self) -> int:
        """G, over all iterations of loops that have a weight for each iteration."""
        return self.use.groups * math.prod(self.loops[axis] for axis in self.view.walks)

    @property
    def features(self) -> int:
        """I, output features of a group."""
        return self.use.features

    @property
    def inputs(self) -> int:
        """J, input features of a group, without the bias."""
        return self.use.inputs

    @property
    def positions(self) -> int:
        """S, over all iterations of loops that share the weight."""
        return self.use.positions * math.prod(self.loops[axis] for axis in self._shared)

    @property
    def places(self) -> Places:
        """Where the entries of a weight are that stores some alone."""
        assert isinstance(self.use, AbstractEntryUse) and self.index is not None
        return self.use.places(*self.index)

    @property
    def keeps_order(self) -> bool:
        """Whether `[G, I, J]` holds the parameter's entries in the parameter's own order."""
        if not isinstance(self.use, AbstractLinearUse):
            return False
        places = np.arange(math.prod(self.view.shape)).reshape(self.view.shape)
        return np.array_equal(self.metric(places).ravel(), np.arange(places.size))

    def metric(self, c: Any) -> Any:
        """The metric of the weight, `[G, I, J]`, from one of the parameter's shape.

        For a weight that stores all entries, which alone has one.
        """
        assert isinstance(self.use, AbstractLinearUse)
        found = _each(self.use.weight, len(self.view.walks), self.view.apply(c))
        return found.reshape(self.groups, self.features, self.inputs)

    def bias_metric(self, c: Array) -> Array:
        """The metric of the bias, `[G, I]`."""
        assert self.bias_order is not None
        return c.reshape(-1)[self.bias_order].reshape(self.groups, self.features)

    def activations(self, *operands: Array) -> Array:
        """The layer's input `[G, J, S]`, from the operands of its step.

        A bias is one more input feature that is always 1.
        """
        a = self.weight_activations(*operands)
        return a if self.bias is None else jnp.concatenate([a, jnp.ones_like(a[:, :1])], axis=1)

    def weight_activations(self, *operands: Array) -> Array:
        """The layer's input `[G, J, S]` without a feature for the bias."""
        return self._joined(_each(self.use.activations, len(self.loops), *operands))

    def cotangents(self, d: Array) -> Array:
        """The cotangent of the layer's output, `[G, I, S]`, from that of its step's output."""
        return self._joined(_each(self.use.cotangents, len(self.loops), d))

    @property
    def _shared(self) -> list[int]:
        return [axis for axis in range(len(self.loops)) if axis not in self.view.walks]

    def _joined(self, each: Array) -> Array:
        """`[G, X, S]` of the whole layer from those of each iteration, `[*loops, G, X, S]`."""
        if not self.loops:
            return each
        g = len(self.loops)
        each = each.transpose(*self.view.walks, g, g + 1, *self._shared, g + 2)
        return each.reshape(self.groups, -1, self.positions)


@dataclasses.dataclass(frozen=True)
class View:
    """A value that consists of the entries of one parameter, rearranged or repeated.

    Attributes:
        param: the parameter's number.
        shape: its shape.
        chain: the steps that rearrange it; `None` stands for a loop that iterates over its rows.
        walks: indices of the enclosing loops that iterate over its rows; the outermost is 0.
        repeats: whether it has an entry more than once.
    """

    param: int
    shape: tuple[int, ...]
    chain: tuple[Step | None, ...] = ()
    walks: tuple[int, ...] = ()
    repeats: bool = False

    def rearranged(self, step: Step) -> "View":
        """The view after one more step."""
        repeats = math.prod(step.shape) != math.prod(step.eqn.invars[0].aval.shape)
        return dataclasses.replace(self, chain=(*self.chain, step), repeats=self.repeats or repeats)

    def walked(self, loop: int) -> "View":
        """The row that an iteration of a loop receives."""
        return dataclasses.replace(self, chain=(*self.chain, None), walks=(*self.walks, loop))

    def apply(self, array: Any) -> Any:
        """Rearrange an array of the parameter's shape; rows walked over are leading axes."""
        return _apply(self.chain, array)


def _each(function: Callable[..., Any], axes: int, *arrays: Any) -> Any:
    """`function` of every row of some arrays along leading axes."""
    if axes == 0:
        return function(*arrays)
    row = lambda *rows: _each(function, axes - 1, *rows)
    if all(isinstance(array, np.ndarray) for array in arrays):
        return np.stack([row(*rows) for rows in zip(*arrays, strict=True)])
    return jax.vmap(row)(*arrays)


def find_layers(
    program: Program, shapes: list[tuple[int, ...]], rules: tuple[RegisteredRule, ...]
) -> tuple[list[Layer], list[int]]:
    """The linear layers of `program`, and the parameters in no layer.

    **Arguments:**

    - `shapes`: shapes of the parameters, which are the first slots of the program.
    - `rules`: the linear uses of primitives.
    """
    once = {p: of[0] for p, of in enumerate(_uses(program, shapes)) if len(of) == 1}
    at: dict[Site, Layer] = {}
    for use in once.values():
        layer = _layer(use, rules)
        if layer is not None:  # of a product of two parameters the larger is the weight
            other = at.get(layer.site, layer)
            at[layer.site] = max(other, layer, key=lambda layer: math.prod(layer.view.shape))
    layers = [_with_bias(at[site], once) for site in sorted(at)]
    covered = {p for layer in layers for p in (layer.weight, layer.bias)}
    # A parameter without entries has no share in the sum.
    return layers, [p for p, shape in enumerate(shapes) if p not in covered and math.prod(shape)]


def linear_uses(
    program: Program, shapes: list[tuple[int, ...]], rules: tuple[RegisteredRule, ...]
) -> list[list[Layer | None]]:
    """All uses of each parameter as a layer without a bias; `None` for one in another form.

    Arguments as of `find_layers`.
    """
    return [[_layer(use, rules) for use in of] for of in _uses(program, shapes)]


@dataclasses.dataclass(frozen=True)
class _Use:
    """A use of a view by a step that does not rearrange; `site` is `None` for an output."""

    view: View
    site: Site | None
    operand: int
    program: Program  # the one that the step stands in: a loop's body, for example
    loops: tuple[int, ...]

    @property
    def step(self) -> Step:
        assert self.site is not None
        return self.program.steps[self.site[-1]]


def _uses(program: Program, shapes: list[tuple[int, ...]]) -> list[list[_Use]]:
    """The uses of each parameter."""
    views = {p: View(p, shape) for p, shape in enumerate(shapes)}
    uses: list[list[_Use]] = [[] for _ in shapes]
    for use in _follow(program, views, (), ()):
        uses[use.view.param].append(use)
    return uses


def _follow(
    program: Program, views: dict[int, View], prefix: Site, loops: tuple[int, ...]
) -> Iterable[_Use]:
    """Every use of each parameter beyond rearrangements, also in the bodies of loops."""
    views = dict(views)
    for index, step in enumerate(program.steps):
        seen = [(n, views[s]) for n, s in enumerate(step.inputs) if _is_view(s, views)]
        if len(step.inputs) == 1 and seen and _rearranges(step):
            views[step.outputs[0]] = seen[0][1].rearranged(step)
            continue
        inner: dict[int, View] = {}
        for n, view in seen:
            place = None if step.loop is None else _place(step.loop, n)
            if place is None:
                yield _Use(view, (*prefix, index), n, program, loops)
            else:
                inner[n] = view if place == "constant" else view.walked(len(loops))
        if inner:
            assert step.loop is not None
            around = (*loops, step.loop.length)
            yield from _follow(step.loop.body, inner, (*prefix, index), around)
    for n, slot in enumerate(program.outputs):
        if _is_view(slot, views):
            yield _Use(views[slot], None, n, program, loops)


def _place(loop: Loop, n: int) -> str | None:
    """Whether input n of a loop is a `"constant"` or iterated by `"row"`; `None` for a carry."""
    if n < loop.consts:
        return "constant"
    return "row" if n >= loop.consts + loop.carry else None


def _is_view(slot: Any, views: dict[int, View]) -> bool:
    return not isinstance(slot, Const) and slot in views


def _rearranges(step: Step) -> bool:
    if step.name == "convert_element_type":
        return jnp.issubdtype(step.eqn.params["new_dtype"], jnp.floating)
    return step.name in _REARRANGING


def _apply(chain: tuple[Step | None, ...], array: Any) -> Any:
    for n, step in enumerate(chain):
        if step is None:
            return _each(lambda row, rest=chain[n + 1 :]: _apply(rest, row), 1, array)
        array = _rearrange(step, array)
    return array


def _rearrange(step: Step, array: Any) -> Any:
    """Apply one rearranging step to a jax array, or (compiling nothing) to a NumPy array."""
    params = step.eqn.params
    if step.name in ("convert_element_type", "copy", "copy_p"):
        return array
    if not isinstance(array, np.ndarray):
        return bind(step.eqn, [array])[0]
    if step.name == "transpose":
        return array.transpose(params["permutation"])
    if step.name == "rev":
        return np.flip(array, params["dimensions"])
    if step.name == "broadcast_in_dim":
        shape = [1] * len(step.shape)
        for axis, size in zip(params["broadcast_dimensions"], array.shape, strict=True):
            shape[axis] = size
        return np.broadcast_to(array.reshape(shape), step.shape)
    if params.get("dimensions") is not None and step.name == "reshape":
        array = array.transpose(params["dimensions"])
    return array.reshape(step.shape)  # reshape, squeeze, expand_dims


def _layer(use: _Use, rules: tuple[RegisteredRule, ...]) -> Layer | None:
    if use.site is None or use.view.repeats:
        return None
    linear = linear_use(use.step.eqn, use.operand, rules)
    if linear is None:
        return None
    if not isinstance(linear, AbstractEntryUse):
        return Layer(use.view, linear, use.site, use.loops)
    index = [use.step.inputs[n] for n in linear.index]
    if not all(isinstance(operand, Const) for operand in index):
        return None  # known to each run of the program alone, or to an iteration of a loop
    values = tuple(jnp.asarray(operand.value) for operand in index)
    return Layer(use.view, linear, use.site, use.loops, index=values)


def _with_bias(layer: Layer, once: dict[int, _Use]) -> Layer:
    """Add a bias to the layer if the next use of its output is the addition of a parameter."""
    weight = once[layer.weight]
    found = _next_addition(weight.program, weight.step)
    if found is None:
        return layer
    add, operand, chain = found
    for use in once.values():
        there = use.site == (*layer.site[:-1], add) and use.operand == operand
        if there and use.view.walks == layer.view.walks:
            order = _bias_order(layer, use, chain, weight.step)
            if order is not None:
                return dataclasses.replace(layer, bias=use.view.param, bias_order=order)
    return layer


def _next_addition(program: Program, layer: Step) -> tuple[int, int, list[Step]] | None:
    """The addition that is the only reader of a layer's output, rearranged or not.

    **Returns:**

    The number of its step, that of its other operand, and the steps that rearrange.
    """
    chain: list[Step] = []
    slot = layer.outputs[0]
    outputs = set(slots_of(program.outputs))
    while True:
        readers = [n for n, step in enumerate(program.steps) if slot in step.reads]
        if len(readers) != 1 or slot in outputs:
            return None
        step = program.steps[readers[0]]
        if len(step.inputs) == 1 and _rearranges(step):
            chain.append(step)
            slot = step.outputs[0]
        elif step.name in ("add", "add_any") and step.reads.count(slot) == 1:
            return readers[0], 1 - list(step.inputs).index(slot), chain
        else:
            return None


def _bias_order(layer: Layer, bias: _Use, chain: list[Step], step: Step) -> np.ndarray | None:
    """Which bias entry is added to each output feature, `[G I]`; `None` if it is no plain bias.

    Feature numbers, and the numbers of the bias's entries, go through the very operations that
    the program applies; the bias is plain if they meet one to one, each as often as the others.
    """
    use, view = layer.use, bias.view
    total = math.prod(view.shape)
    if total != layer.groups * layer.features:
        return None
    numbers = np.arange(use.groups * use.features).reshape(use.groups, use.features, 1)
    numbers = np.broadcast_to(numbers, (use.groups, use.features, use.positions))
    features = _transpose_of(use, numbers, step.shape)
    for rearrangement in chain:
        features = _rearrange(rearrangement, features)
    entries: Any = view.apply(np.arange(total).reshape(view.shape))
    walked = len(view.walks)
    order = []  # of one iteration after the other, where each has weights of its own
    for row in entries.reshape(math.prod(entries.shape[:walked]), *entries.shape[walked:]):
        try:
            seen, added = np.broadcast_arrays(features, row)
        except ValueError:
            return None
        if seen.shape != bias.step.shape or seen.size != numbers.size:
            return None
        pairs = np.unique(np.stack([seen.ravel(), added.ravel()], 1), axis=0)
        if len(pairs) != use.groups * use.features:
            return None
        order.append(pairs[:, 1])
    if not order:
        return None
    order = np.concatenate(order)
    return order if np.array_equal(np.sort(order), np.arange(total)) else None


def _transpose_of(use: AbstractUse, numbers: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Send `[G, I, S]` back to the shape of the step's output: the inverse of `cotangents`."""
    places: Any = np.arange(math.prod(shape)).reshape(shape)
    order = np.asarray(use.cotangents(places)).ravel()
    out = np.empty(math.prod(shape), numbers.dtype)
    out[order] = numbers.ravel()
    return out.reshape(shape)
