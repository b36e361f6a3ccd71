"""The share of constant units in a product, and the bias that can hold it instead."""

import dataclasses

import numpy as np

from .._program import Const, Step
from ._axes import Meeting
from ._flow import UnitFlow, dot_letters
from ._moves import is_move, move
from ._traced import TracedModel


@dataclasses.dataclass(frozen=True)
class Bias:
    """The bias behind a product.

    Attributes:
        leaf: which array of the model.
        steps: what happens to the product before the bias is added.
        entries: for each entry of the sum, which entry of the bias is added to it.
    """

    leaf: int
    steps: tuple[Step, ...]
    entries: np.ndarray


class Constants:
    """Where constants can be folded, and into what.

    A constant can go into the bias behind a product with weights where it is one number at all
    positions, no zeros are padded beside it, and the bias is read there alone and has no mask.
    """

    def __init__(self, traced: TracedModel, flow: UnitFlow):
        """Look at the readers of each value once."""
        self._traced, self._flow = traced, flow
        self._readers: dict[int, list[Step]] = {}
        self._makers = {slot: step for step in traced.program.steps for slot in step.outputs}
        for step in traced.program.steps:
            for slot in step.reads:
                self._readers.setdefault(slot, []).append(step)
        self._outputs = {slot for slot in traced.program.outputs if not isinstance(slot, Const)}

    def signal(self, meeting: Meeting) -> int | None:
        """Which operand of a product is the signal; `None` where the other is no weight."""
        varies, _ = self._flow.of(self._traced.program.steps[meeting.step])
        found = [bool(v.any()) for v in varies[:2]]
        return None if found[0] == found[1] else found.index(True)

    def obstacle(self, meeting: Meeting, index: int) -> str | None:
        """Why what is constant at `index` of the axis cannot be folded; `None` where it can."""
        step = self._traced.program.steps[meeting.step]
        values = [self._traced.value(slot) for slot in step.inputs[:2]]
        taken = [
            None if value is None else np.take(value, index, axis)
            for value, axis in zip(values, meeting.axes, strict=True)
        ]
        if any(part is not None and not part.any() for part in taken):
            return None
        side = self.signal(meeting)
        constant = None if side is None else taken[side]
        if side is None or constant is None or taken[1 - side] is None:
            return "a constant meets no weight of a layer"
        if not np.isfinite(constant).all():
            return "their constant is not finite"
        if (constant != constant.reshape(-1)[0]).any():
            return "their constant is another one at each position"
        if step.name == "conv_general_dilated":
            padded = any(tuple(pad) != (0, 0) for pad in step.eqn.params["padding"])
            if padded or any(size != 1 for size in step.eqn.params["lhs_dilation"]):
                return "their constant goes into a padded convolution"
        elif step.eqn.params["dimension_numbers"][1][0]:
            return "their constant goes into a batched product"
        elif len(step.eqn.params["dimension_numbers"][0][0]) != 1:
            return "their constant goes into a product over several axes"
        if self.bias(meeting) is None:
            return "the next layer has no bias for their constant"
        return None

    def bias(self, meeting: Meeting) -> Bias | None:
        """The bias that is added to a product, feature by feature."""
        step = self._traced.program.steps[meeting.step]
        slot, steps = step.outputs[0], []
        while slot not in self._outputs and len(self._readers.get(slot, [])) == 1:
            reader = self._readers[slot][0]
            if reader.name in ("add", "add_any"):
                others = [operand for operand in reader.inputs if operand != slot]
                if len(others) != 1:
                    return None
                traced = self._entries(others[0], reader.shape)
                if traced is None:
                    return None
                bias = Bias(traced[0], tuple(steps), traced[1])
                features = self._moved(bias, self._feature(meeting))
                known = np.full(self._traced.values[bias.leaf].size, -1)
                known[bias.entries] = features
                return bias if np.array_equal(known[bias.entries], features) else None
            if not is_move(reader) or len(reader.inputs) != 1 or len(reader.outputs) != 1:
                return None
            steps.append(reader)
            slot = reader.outputs[0]
        return None

    def brought(self, meeting: Meeting, bias: Bias, indices: np.ndarray) -> np.ndarray:
        """The sum that these indices of the axis add to the bias, flat, float64 at least."""
        step = self._traced.program.steps[meeting.step]
        side = self.signal(meeting)
        values = [self._traced.value(slot) for slot in step.inputs[:2]]
        signal, weight = values[side or 0], values[1 - (side or 0)]
        assert side is not None and signal is not None and weight is not None
        axis, across = meeting.axes[side], meeting.axes[1 - side]
        signal = np.moveaxis(signal, axis, 0).reshape(signal.shape[axis], -1)[indices, 0]
        kind = np.result_type(signal.dtype, weight.dtype, np.float64)
        weight = np.take(weight, indices, across).astype(kind)
        if step.name == "conv_general_dilated":
            spec = step.eqn.params["dimension_numbers"]
            rows = np.transpose(weight, spec.rhs_spec)
            rows = rows.sum(axis=tuple(range(2, rows.ndim)))
            made = rows @ signal.astype(kind)
        else:
            made = np.tensordot(weight, signal.astype(kind), axes=(across, 0)).reshape(-1)
        features = self._moved(bias, self._feature(meeting))
        delta = np.zeros(self._traced.values[bias.leaf].size, kind)
        delta[bias.entries] = made[features]
        return delta

    def _feature(self, meeting: Meeting) -> np.ndarray:
        """For each entry of a product, which of the features of its weight it is."""
        step = self._traced.program.steps[meeting.step]
        if step.name == "conv_general_dilated":
            spec = step.eqn.params["dimension_numbers"].out_spec
            inner = [1] * len(step.shape)
            inner[spec[1]] = -1
            return np.broadcast_to(np.arange(step.shape[spec[1]]).reshape(inner), step.shape)
        side = self.signal(meeting)
        assert side is not None
        names = dot_letters(step)
        free = [n for n, name in enumerate(names[2]) if name in names[1 - side]]
        sizes = [step.shape[n] for n in free]
        inner = [size if n in free else 1 for n, size in enumerate(step.shape)]
        count = int(np.prod(sizes, dtype=int))
        return np.broadcast_to(np.arange(count).reshape(inner), step.shape)

    def _moved(self, bias: Bias, array: np.ndarray) -> np.ndarray:
        for step in bias.steps:
            array = move(step, [array])[0]
        return array

    def _entries(self, slot: int, shape: tuple[int, ...]) -> tuple[int, np.ndarray] | None:
        """The leaf that an operand is made of, and which of its entries is where."""
        steps = []
        while slot in self._makers:
            step = self._makers[slot]
            if not is_move(step) or len(step.inputs) != 1 or len(self._readers[slot]) != 1:
                return None
            if len(step.outputs) != 1 or isinstance(step.inputs[0], Const):
                return None
            steps.append(step)
            slot = step.inputs[0]
        if isinstance(slot, Const) or slot >= self._traced.sample:
            return None
        alone = len(self._readers[slot]) == 1 and self._traced.masks[slot] is None
        if not alone or not self._traced.marks[slot]:
            return None
        value = self._traced.values[slot]
        entries = np.arange(value.size).reshape(value.shape)
        for step in reversed(steps):
            entries = move(step, [entries])[0]
        if entries.ndim != len(shape):
            return None
        return slot, np.broadcast_to(entries, shape)
