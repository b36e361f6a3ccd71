"""`NTTConfig`: the published recipe as a record of settings."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from .._checks import check_count, check_weight
from .._masks import AbstractPattern, GradualDensity, Sparsity
from .._masks._allocation import Allocation, check_density
from .._masks._sparsity import LayerDensities
from .._refreshes import AbstractRefresh, MagnitudeRefresh, NoRefresh
from .._scores import LogitSnip, Magnitude
from .._types import GradientTransformation
from ..kernels import PRECISIONS, Precision
from ._matching import KernelMatching
from ._method import NeuralTangentTransfer, Pruned, check_arrival
from ._probes import AbstractProbe, Diagonal, Full, Sketch, Trace


@dataclasses.dataclass(frozen=True)
class NTTConfig:
    """Settings of a transfer; the defaults are the published ones for LeNet-300-100.

    With an optimiser they define a `NeuralTangentTransfer`; build that directly to use your own
    loss, refresh, probe or pattern.

    Attributes:
        density: share of prunable weights that are kept, in (0, 1]; or one for each layer, or a
            schedule of the step: see `Sparsity`.
        num_steps: length of the whole transfer. The mask stays fixed during the last `mask_every`
            steps. With `None` the refreshes never end. With a schedule of the density, but a
            `GradualDensity` that ends before these steps, the mask follows it to the last step; at
            the schedule's end it is always refreshed.
        scope: `"layer"` keeps this share in every layer, `"global"` in all layers together.
        initial_mask: `"magnitude"` of the teacher's weights, or `"logit_snip"`.
        mask_every: steps between two refreshes of the mask from the magnitudes of the dense student
            weights; `None` keeps the initial mask.
        kernel: `"active"` (the paper's definition) or `"ambient"` (what its published code runs).
        kernel_weight: lambda_K.
        l2_weight: lambda_2; divided by the density.
        outputs: which pairs of outputs the loss compares: `"full"` (all pairs, as in the paper),
            the `"diagonal"`, its mean (`"trace"`), or a `"sketch"`: the kernel along `sketch_size`
            random directions a side, drawn at every step, which estimates the squared distance
            without bias. Use it if all pairs of many outputs cost too much.
        sketch_size: R, at most the number of outputs.
        precision: precision of matrix products, for outputs and kernels; see `ntk`.
        implementation: implementation of the kernels; see `ntk`.
        allocation: how the density is distributed over the layers; see `Sparsity`.
        pattern: which weights are kept or dropped together; see `Sparsity`.
        pruned: what happens to weights under the mask; see `NeuralTangentTransfer`.
    """

    density: Any
    num_steps: int | None = None
    scope: Literal["layer", "global"] = "layer"
    initial_mask: Literal["magnitude", "logit_snip"] = "magnitude"
    mask_every: int | None = 100
    kernel: Literal["active", "ambient"] = "active"
    kernel_weight: float = 1e-3
    l2_weight: float = 1e-4
    outputs: Literal["full", "diagonal", "trace", "sketch"] = "full"
    sketch_size: int = 8
    precision: Precision = "float32"
    implementation: Literal["factors", "jacobian", "ntk_vector_products"] = "factors"
    allocation: Allocation | None = None
    pattern: AbstractPattern | None = None
    pruned: Pruned = "free"

    def __post_init__(self) -> None:
        """Reject settings that cannot work.

        Raises:
            ValueError: a value is outside its range.
        """
        density = self.density
        if isinstance(density, Mapping):
            density = LayerDensities(density, "NTTConfig")
        elif not callable(density):
            density = check_density(density, "NTTConfig")
        object.__setattr__(self, "density", density)
        for name, allowed in (
            ("scope", ("layer", "global")),
            ("initial_mask", ("magnitude", "logit_snip")),
            ("kernel", ("active", "ambient")),
            ("outputs", ("full", "diagonal", "trace", "sketch")),
            ("precision", PRECISIONS),
            ("implementation", ("factors", "jacobian", "ntk_vector_products")),
            ("pruned", ("free", "frozen", "zero")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"NTTConfig: {name} must be one of {allowed}, got {getattr(self, name)!r}."
                )
        for name in ("kernel_weight", "l2_weight"):
            check_weight(f"NTTConfig: {name}", getattr(self, name))
        if self.outputs == "sketch" and self.implementation != "factors":
            raise ValueError("NTTConfig: a sketch needs implementation='factors'.")
        for name in ("mask_every", "num_steps", "sketch_size"):
            check_count(f"NTTConfig: {name}", getattr(self, name), none=name != "sketch_size")
        try:
            sparsity = self.sparsity()
        except ValueError as error:
            raise ValueError(f"NTTConfig: {error}") from error
        check_arrival("NTTConfig", sparsity, self._refresh(), self.num_steps)

    def sparsity(self) -> Sparsity:
        """How many weights are kept, where, and in which pattern."""
        return Sparsity(self.density, self.scope, self.allocation, self.pattern)

    def loss(self) -> KernelMatching:
        """The loss of the paper with these settings."""
        probes: dict[str, AbstractProbe] = {
            "full": Full(),
            "diagonal": Diagonal(),
            "trace": Trace(),
            "sketch": Sketch(self.sketch_size),
        }
        return KernelMatching(
            self.kernel,
            probes[self.outputs],
            self.kernel_weight,
            self.l2_weight,
            precision=self.precision,
            implementation=self.implementation,
        )

    def _refresh(self) -> AbstractRefresh:
        every, end = self.mask_every, self.num_steps
        if every is None:
            return NoRefresh()
        # The last mask gets `every` steps to be fitted, if the density has its last value by then.
        until = None if end is None else end - every
        if until is not None and callable(self.density):
            arrived = isinstance(self.density, GradualDensity) and self.density.end <= until
            until = until if arrived else None
        return MagnitudeRefresh(every, until)

    def method(self, optimizer: GradientTransformation) -> NeuralTangentTransfer:
        """The method with these settings and an optimiser."""
        return NeuralTangentTransfer(
            sparsity=self.sparsity(),
            loss=self.loss(),
            refresh=self._refresh(),
            optimizer=optimizer,
            initial=LogitSnip() if self.initial_mask == "logit_snip" else Magnitude(),
            num_steps=self.num_steps,
            pruned=self.pruned,
        )
