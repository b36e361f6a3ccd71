"""The loss that compares the outputs and the kernels of student and teacher."""

from typing import Any

import equinox as eqx
from jaxtyping import Array, Float, Shaped

from .._checks import check_weight
from .._sparse import SparseModel
from .._step_info import StepInfo
from .._types import Implementation, KernelKind, PyTree
from ..kernels import PRECISIONS, Precision
from ._distances import AbstractDistance, MeanSquare
from ._kernels import outputs_and_kernels
from ._loss import AbstractTransferLoss, l2_penalty
from ._probes import AbstractProbe, Full, Sketch

_CHOICES = (
    ("kernel", ("active", "ambient")),
    ("precision", PRECISIONS),
    ("implementation", ("factors", "jacobian", "ntk_vector_products")),
)


class KernelMatching(AbstractTransferLoss):
    """The paper's loss (Liu & Zenke, ICML 2020, arXiv 2006.08228), with exchangeable distances.

        L = D_f(f_s(x), f_t(x))  +  lambda_K D_K(Theta_s(x1,x2), Theta_t(x1,x2))
            +  (lambda_2 / density) sum |m W|^2

    Both distances are the mean squared difference in the paper.

    Attributes:
        kernel: `"active"` (the paper's definition) or `"ambient"` (what its published code runs).
        probe: which pairs of outputs of the kernels are compared.
        kernel_weight: lambda_K.
        l2_weight: lambda_2.
        kernel_distance: D_K, such as `MeanSquare()` or `Alignment()`.
        output_distance: D_f.
        metric: weights of the parameters in both kernels, such as their learning rates; see `ntk`.
        precision: precision of matrix products; see `ntk`.
        implementation: implementation of the kernels; see `ntk`.
    """

    kernel: KernelKind = eqx.field(static=True, default="active")
    probe: AbstractProbe = eqx.field(default_factory=Full)
    kernel_weight: float = eqx.field(static=True, default=1e-3)
    l2_weight: float = eqx.field(static=True, default=1e-4)
    kernel_distance: AbstractDistance = eqx.field(default_factory=MeanSquare)
    output_distance: AbstractDistance = eqx.field(default_factory=MeanSquare)
    metric: Any = None
    precision: Precision = eqx.field(static=True, default="float32")
    implementation: Implementation = eqx.field(static=True, default="factors")

    def __check_init__(self) -> None:
        """Reject settings that cannot work."""
        for field, allowed in _CHOICES:
            if getattr(self, field) not in allowed:
                raise ValueError(
                    f"KernelMatching: {field} must be one of {allowed}, got "
                    f"{getattr(self, field)!r}."
                )
        for field in ("kernel_weight", "l2_weight"):
            check_weight(f"KernelMatching: {field}", getattr(self, field))
        parts = (("probe", AbstractProbe), ("kernel_distance", AbstractDistance),
                 ("output_distance", AbstractDistance))  # fmt: skip
        for field, kind in parts:
            if not isinstance(getattr(self, field), kind):
                raise ValueError(
                    f"KernelMatching: {field} must be an {kind.__name__}, got "
                    f"{getattr(self, field)!r}."
                )
        if isinstance(self.probe, Sketch) and self.implementation != "factors":
            raise ValueError("KernelMatching: a sketch needs implementation='factors'.")

    def __call__(
        self,
        student: SparseModel,
        teacher: PyTree,
        x: Shaped[Array, "batch ..."],
        info: StepInfo,
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """The loss, and its terms without their weights.

        `kernel_distance` and `target_distance` are always mean squares, so that runs with different
        distances can be compared; other distances add `kernel_term` and `output_term`.
        """
        found = outputs_and_kernels(
            student,
            teacher,
            x,
            info,
            kernel=self.kernel,
            probe=self.probe,
            metric=self.metric,
            precision=self.precision,
            implementation=self.implementation,
        )
        penalty, norm = l2_penalty(self.l2_weight, student, info)
        terms = {
            "kernel_distance": MeanSquare()(found.student_kernel, found.teacher_kernel),
            "target_distance": MeanSquare()(found.student, found.teacher),
            "weight_norm": norm,
        }
        on_kernels, on_outputs = terms["kernel_distance"], terms["target_distance"]
        if not isinstance(self.kernel_distance, MeanSquare):
            on_kernels = self.kernel_distance(found.student_kernel, found.teacher_kernel)
            terms["kernel_term"] = on_kernels
        if not isinstance(self.output_distance, MeanSquare):
            on_outputs = self.output_distance(found.student, found.teacher)
            terms["output_term"] = on_outputs
        return on_outputs + self.kernel_weight * on_kernels + penalty, terms
