"""Which entries depend on the input, and which the outputs depend on.

Both err on one side alone: an entry that is said to be constant is, and one that is said not to
be needed is not. What a step does that is not known here takes all of what it reads.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .._program import Const, Step
from ._moves import is_move, move, sources
from ._traced import TracedModel

# Entry by entry, of operands of one shape or of none.
ELEMENTWISE = frozenset(
    "abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil "
    "clamp conj convert_element_type copy_p cos cosh digamma div eq erf erf_inv erfc exp exp2 "
    "expm1 floor ge gt imag integer_pow is_finite le lgamma log log1p logistic lt max min mul ne "
    "neg nextafter not or population_count pow real reduce_precision rem round rsqrt select_n "
    "shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square "
    "stop_gradient sub tan tanh xor optimization_barrier".split()
)
REDUCTIONS = ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_or", "reduce_and",
              "argmax", "argmin")  # fmt: skip
WINDOWS = ("reduce_window_sum", "reduce_window_max", "reduce_window_min", "reduce_window")
SCANS = ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")


@dataclasses.dataclass(frozen=True)
class UnitFlow:
    """The entries that depend on the input.

    Attributes:
        varies: slot -> which entries depend on the input.
        nonzero: slot -> which entries may be other than zero.
    """

    varies: dict[int, np.ndarray]
    nonzero: dict[int, np.ndarray]

    def of(self, step: Step) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Both, of the operands of a step."""
        return [self._look(self.varies, slot, False) for slot in step.inputs], [
            self._look(self.nonzero, slot, True) for slot in step.inputs
        ]

    def _look(self, kind: dict[int, np.ndarray], slot: Any, nonzero: bool) -> np.ndarray:
        if not isinstance(slot, Const):
            return kind[slot]
        if not nonzero:
            return np.zeros(np.shape(slot.value), bool)
        return np.asarray(np.asarray(slot.value) != 0)  # of a scalar, too


def flow_forwards(traced: TracedModel) -> UnitFlow:
    """Follow the input to the outputs."""
    flow = UnitFlow({}, {})

    def settle(slot: int, varies: np.ndarray, shape: tuple[int, ...]) -> None:
        flow.varies[slot] = varies = np.broadcast_to(varies, shape)
        value, probed = traced.values.get(slot), traced.probed.get(slot)
        held = np.True_ if value is None or probed is None else (value != 0) | (probed != 0)
        flow.nonzero[slot] = np.broadcast_to(varies | held, shape)

    for slot in range(traced.program.num_inputs):
        value = traced.values.get(slot)
        shape = () if value is None else value.shape
        settle(slot, np.asarray(slot == traced.sample), shape)
        if slot < traced.sample and (mask := traced.masks[slot]) is not None:
            flow.nonzero[slot] = mask
    for step in traced.program.steps:
        outputs = _forwards(step, *flow.of(step))
        for slot, varies, aval in zip(step.outputs, outputs, step.avals, strict=True):
            settle(slot, varies, aval.shape)
    return flow


@dataclasses.dataclass(frozen=True)
class Needs:
    """The entries that the outputs depend on.

    Attributes:
        slots: slot -> which entries are needed.
        operands: (step, number of the operand) -> which of its entries that step needs.
    """

    slots: dict[int, np.ndarray]
    operands: dict[tuple[int, int], np.ndarray]


def flow_backwards(
    traced: TracedModel,
    flow: UnitFlow,
    cut: Callable[[int, np.ndarray], np.ndarray] | None = None,
    paths: bool = False,
) -> Needs:
    """Follow the outputs to what they depend on.

    **Arguments:**

    - `cut`: what is left of the needs of a slot, where some entries are not computed at all.
    - `paths`: ask constants whether they meet something that depends on the input.
    """
    needs = Needs({}, {})
    for slot in traced.program.outputs:
        if not isinstance(slot, Const):
            needs.slots[slot] = np.ones(flow.varies[slot].shape, bool)
    for index in reversed(range(len(traced.program.steps))):
        step = traced.program.steps[index]
        wanted = []
        for slot, aval in zip(step.outputs, step.avals, strict=True):
            found = needs.slots.get(slot, np.zeros(aval.shape, bool))
            needs.slots[slot] = found = found if cut is None else cut(slot, found)
            wanted.append(found)
        varies, nonzero = flow.of(step)
        if paths:
            met = [_others(varies, nonzero, n) for n in range(len(varies))]
        else:
            met = [nonzero] * len(varies)
        for n, slot in enumerate(step.inputs):
            if isinstance(slot, Const):
                found = _backwards(step, wanted, met[n], n) if step.name in _PRODUCTS else None
            else:
                found = _backwards(step, wanted, met[n], n)
                old = needs.slots.get(slot)
                needs.slots[slot] = np.asarray(found if old is None else old | found)
            if found is not None:
                needs.operands[index, n] = found
    for slot in range(traced.program.num_inputs):
        found = needs.slots.get(slot, np.zeros(flow.varies[slot].shape, bool))
        needs.slots[slot] = found if cut is None else cut(slot, found)
    return needs


_PRODUCTS = ("dot_general", "conv_general_dilated")


def _others(varies: list[np.ndarray], nonzero: list[np.ndarray], n: int) -> list[np.ndarray]:
    """The entries that operand `n` must meet on a path.

    A constant must meet an input, unless all are constants: a weight that is made of parameters.
    """
    made = not any(other.any() for other in varies)
    return nonzero if made or varies[n].any() else varies


def _forwards(
    step: Step, varies: Sequence[np.ndarray], nonzero: Sequence[np.ndarray]
) -> list[np.ndarray]:
    if is_move(step):
        return move(step, varies)
    if step.name == "mul":
        return [np.asarray((varies[0] & nonzero[1]) | (varies[1] & nonzero[0]))]
    if step.name == "div":
        return [np.asarray(varies[0] | (varies[1] & nonzero[0]))]
    if step.name in ELEMENTWISE and len(step.outputs) == 1:
        return [_any_of(varies)]
    if step.name in REDUCTIONS:
        return [np.asarray(varies[0].any(axis=tuple(step.eqn.params["axes"])))]
    if (axes := touched_axes(step)) is not None:
        return [np.broadcast_to(varies[0].any(axis=axes, keepdims=True), step.shape)]
    if step.name == "dot_general":
        a, b, out = dot_letters(step)
        product = lambda one, two: _einsum(f"{a},{b}->{out}", one, two)
        return [np.asarray(product(varies[0], nonzero[1]) | product(nonzero[0], varies[1]))]
    if step.name == "conv_general_dilated" and step.eqn.params["batch_group_count"] == 1:
        x, w = _features(step, *varies), _features(step, *nonzero)
        product = lambda one, two: _einsum("ngi,goi->ngo", one, two)
        return [_maps(step, product(x[0], w[1]) | product(w[0], x[1]))]
    anything = np.asarray(any(v.any() for v in varies))
    return [np.broadcast_to(anything, aval.shape) for aval in step.avals]


def _backwards(
    step: Step, wanted: Sequence[np.ndarray], met: Sequence[np.ndarray], n: int
) -> np.ndarray:
    shape, out = met[n].shape, wanted[0]
    if is_move(step):
        found = np.zeros(met[n].size, bool)
        for source, want in zip(sources(step, [m.shape for m in met])[n], wanted, strict=True):
            found[source[want & (source >= 0)]] = True
        return found.reshape(shape)
    if step.name == "mul":
        return _fold_to(np.asarray(out & met[1 - n]), shape)
    if step.name == "div" and n == 1:
        return _fold_to(np.asarray(out & met[0]), shape)
    if step.name in ELEMENTWISE and len(step.outputs) == 1:
        return _fold_to(out, shape)
    if step.name in REDUCTIONS:
        return np.broadcast_to(np.expand_dims(out, tuple(step.eqn.params["axes"])), shape)
    if (axes := touched_axes(step)) is not None and len(shape) == out.ndim:
        return np.broadcast_to(out.any(axis=axes, keepdims=True), shape)
    if step.name == "dot_general":
        a, b, to = dot_letters(step)
        if n == 0:
            return _einsum(f"{to},{b}->{a}", out, met[1])
        return _einsum(f"{to},{a}->{b}", out, met[0])
    if step.name == "conv_general_dilated" and step.eqn.params["batch_group_count"] == 1:
        x, w = _features(step, met[0], met[1])
        spec = step.eqn.params["dimension_numbers"]
        groups = step.eqn.params["feature_group_count"]
        maps = np.transpose(out, spec.out_spec)
        maps = maps.any(axis=tuple(range(2, maps.ndim))).reshape(len(maps), groups, -1)
        if n == 0:
            found = _einsum("ngo,goi->ngi", maps, w).reshape(len(x), -1)
            return _with_positions(found, spec.lhs_spec, shape)
        found = _einsum("ngo,ngi->goi", maps, x)
        return _with_positions(found.reshape(-1, found.shape[-1]), spec.rhs_spec, shape)
    return np.broadcast_to(np.asarray(any(w.any() for w in wanted)), shape)


def touched_axes(step: Step) -> tuple[int, ...] | None:
    """The axes along which windows or running sums mix entries; `None` for other steps."""
    params = step.eqn.params
    if step.name in WINDOWS and len(step.outputs) == 1:
        strides = params.get("window_strides") or (1,) * len(params["window_dimensions"])
        padding = params.get("padding") or ((0, 0),) * len(params["window_dimensions"])
        sizes = zip(params["window_dimensions"], strides, padding, strict=True)
        return tuple(
            axis
            for axis, (size, stride, pad) in enumerate(sizes)
            if size != 1 or stride != 1 or tuple(pad) != (0, 0)
        )
    if step.name in SCANS:
        return (params["axis"],)
    if step.name == "sort" and len(step.outputs) == 1:
        return (params["dimension"],)
    return None


def dot_letters(step: Step) -> tuple[str, str, str]:
    """The subscripts of a `dot_general`: of its operands and of its output."""
    (lc, rc), (lb, rb) = step.eqn.params["dimension_numbers"]
    names = iter("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
    ndims = [v.aval.ndim for v in step.eqn.invars]
    one, two = [""] * ndims[0], [""] * ndims[1]
    for left, right in (*zip(lb, rb, strict=True), *zip(lc, rc, strict=True)):
        one[left] = two[right] = next(names)
    one, two = ([name or next(names) for name in side] for side in (one, two))
    batch = [one[axis] for axis in lb]
    free = [c for n, c in enumerate(one) if n not in (*lb, *lc)]
    free += [c for n, c in enumerate(two) if n not in (*rb, *rc)]
    return "".join(one), "".join(two), "".join([*batch, *free])


def _einsum(subscripts: str, one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """Whether any product is set. NumPy makes scalars of arrays without axes, here and above."""
    one, two = one.astype(np.float32), two.astype(np.float32)
    return np.asarray(np.einsum(subscripts, one, two, optimize=True) > 0)


def _any_of(arrays: Sequence[np.ndarray]) -> np.ndarray:
    found = np.asarray(False)
    for array in arrays:
        found = np.asarray(found | array)
    return found


def _fold_to(found: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Of an operand that is repeated along axes, whether any entry along them needs it."""
    if shape == ():
        return np.asarray(found.any())
    repeated = tuple(n for n, size in enumerate(shape) if size == 1)
    return np.broadcast_to(found.any(axis=repeated, keepdims=True), shape)


def _features(step: Step, x: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`x[N, groups, I]` and `w[groups, O, I]` of a convolution, anywhere in maps and windows."""
    spec, groups = step.eqn.params["dimension_numbers"], step.eqn.params["feature_group_count"]
    x, w = np.transpose(x, spec.lhs_spec), np.transpose(w, spec.rhs_spec)
    x, w = (np.asarray(a.any(axis=tuple(range(2, a.ndim)))) for a in (x, w))
    return x.reshape(len(x), groups, -1), w.reshape(groups, -1, w.shape[1])


def _maps(step: Step, found: np.ndarray) -> np.ndarray:
    spec = step.eqn.params["dimension_numbers"].out_spec
    return _with_positions(found.reshape(len(found), -1), spec, step.shape)


def _with_positions(found: np.ndarray, spec: Sequence[int], shape: tuple[int, ...]) -> np.ndarray:
    """Two axes of features put where `spec` has them, the same at every position."""
    inner = found.reshape(*found.shape, *[1] * (len(shape) - 2))
    return np.broadcast_to(np.transpose(inner, np.argsort(spec)), shape)
