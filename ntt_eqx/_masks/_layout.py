"""The order of a weight's axes, for patterns: which are outputs, inputs, and a window's."""

import math
from collections.abc import Mapping

import equinox as eqx
from jaxtyping import Array, Bool, Float

from ._pattern import AbstractLayerPattern


class InLayout(AbstractLayerPattern):
    """A pattern for weights whose axes do not have the order `[outputs, inputs, *window]`.

    Patterns read a weight as Equinox and PyTorch store it. Flax and Haiku store `[inputs, outputs]`
    and `[*window, inputs, outputs]`. A layout has a letter for each axis: `"o"` for outputs, `"i"`
    for inputs, `"k"` for the window of a convolution. The weight of a dense layer is `"io"` in
    Flax, that of a convolution `"kkio"`, the queries of an attention layer `"ioo"`. Several axes of
    outputs (or inputs) count as one, in their order.

    Attributes:
        pattern: what is kept or dropped together.
        layouts: the layout of every layer by path, as `weight_layouts(model, x)` gives it. The
            first layer of the network comes first and the last one last, for patterns that leave
            the ends whole.
    """

    pattern: AbstractLayerPattern
    layouts: tuple[tuple[str, str], ...] = eqx.field(static=True)

    def __init__(self, pattern: AbstractLayerPattern, layouts: Mapping[str, str]):
        """Check and store the arguments.

        Raises:
            ValueError: `pattern` is no `AbstractLayerPattern`, or a layout has other letters than
                o, i and k.
        """
        if not isinstance(pattern, AbstractLayerPattern) or isinstance(pattern, InLayout):
            raise ValueError(
                f"InLayout: pattern must be one of layers, such as NM(2, 4), got "
                f"{type(pattern).__name__}."
            )
        if not isinstance(layouts, Mapping) or not layouts:
            raise ValueError(
                "InLayout: layouts must map the path of every layer to its layout, as "
                f"weight_layouts(model, x) does, got {layouts!r:.60}."
            )
        for path, letters in layouts.items():
            if not isinstance(letters, str) or set(letters) - set("oik"):
                raise ValueError(
                    "InLayout: a layout has a letter for each axis, o for outputs, i for inputs, "
                    f'k for a window, such as "kkio"; got {letters!r} for {path}.'
                )
        self.pattern = pattern
        self.layouts = tuple(layouts.items())

    def groups(
        self, scores: Float[Array, "..."], name: str, density: float | Array | None
    ) -> Float[Array, "..."]:
        """The groups of the weight as `[outputs, inputs, *window]`."""
        order, shape = self._order(scores.shape, name)
        scores = scores.transpose(order).reshape(shape)
        return self.pattern.groups(scores, name, density)

    def spread(
        self, marks: Bool[Array, "..."], shape: tuple[int, ...], name: str
    ) -> Bool[Array, "..."]:
        """The mask of the weight in its own order."""
        order, ordered = self._order(shape, name)
        mask = self.pattern.spread(marks, ordered, name)
        inverse = sorted(range(len(order)), key=order.__getitem__)
        return mask.reshape([shape[axis] for axis in order]).transpose(inverse)

    def spared(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
        """The weights that the pattern spares, in the order of the layouts."""
        known = [name for name, _ in self.layouts if name in shapes]
        names = known + [name for name in shapes if name not in known]
        return self.pattern.spared({name: self._order(shapes[name], name)[1] for name in names})

    def keeps_count(self, shape: tuple[int, ...]) -> bool:
        """Whether it does so in all layouts that such a weight may have."""
        may_be = [letters for _, letters in self.layouts if len(letters) == len(shape)]
        return all(self.pattern.keeps_count(_ordered(shape, letters)[1]) for letters in may_be)

    def averages(self, shape: tuple[int, ...]) -> bool:
        """Whether it does so in one of the layouts that such a weight may have."""
        may_be = [letters for _, letters in self.layouts if len(letters) == len(shape)]
        return any(self.pattern.averages(_ordered(shape, letters)[1]) for letters in may_be)

    def _order(self, shape: tuple[int, ...], name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        letters = dict(self.layouts).get(name)
        if letters is None:
            raise ValueError(
                f"make_mask: InLayout has no layout of {name}, only of "
                f"{', '.join(dict(self.layouts))}. weight_layouts leaves out weights that are not "
                "used in exactly one linear layer; add theirs, or leave them out with `where=`."
            )
        if len(letters) != len(shape):
            raise ValueError(
                f"make_mask: the layout {letters!r} of {name} has {len(letters)} axes, but its "
                f"shape is {tuple(shape)}."
            )
        return _ordered(shape, letters)


def _ordered(shape: tuple[int, ...], letters: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes as outputs, inputs, window; and the shape of that, with one axis for the first two.

    A layout without outputs (or inputs) has one of them.
    """
    of = {kind: [axis for axis, letter in enumerate(letters) if letter == kind] for kind in "oik"}
    sizes = (math.prod(shape[axis] for axis in of[kind]) for kind in "oi")
    return (*of["o"], *of["i"], *of["k"]), (*sizes, *(shape[axis] for axis in of["k"]))
