"""Losses that compare outputs and kernels."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, Shaped

from .._checks import check_weight
from .._ntk._kernel import Implementation
from .._ntk._plan import KernelKind
from .._sparse import SparseModel
from .._types import widen
from ._kernels import outputs_and_kernels
from ._loss import AbstractTransferLoss, l2_penalty
from ._moment import Moment
from ._probes import AbstractProbe, Full, Sketch

_KERNELS = ("active", "ambient")
_IMPLEMENTATIONS = ("factors", "jacobian", "ntk_vector_products")


class KernelMatching(AbstractTransferLoss):
    """The paper's loss (Liu & Zenke, ICML 2020, arXiv 2006.08228).

        L = mean (f_s(x) - f_t(x))^2 + lambda_K mean (Theta_s(x1,x2) - Theta_t(x1,x2))^2
            + (lambda_2 / density) sum |m W|^2

    Attributes:
        kernel: `"active"` (the paper's definition) or `"ambient"` (what its published code runs).
        probe: which pairs of outputs of the kernels are compared.
        kernel_weight: lambda_K.
        l2_weight: lambda_2.
        metric: weights of the parameters in both kernels, such as their learning rates; see `ntk`.
        implementation: of the kernels; see `ntk`.
    """

    kernel: KernelKind = eqx.field(static=True, default="active")
    probe: AbstractProbe = eqx.field(default_factory=Full)
    kernel_weight: float = eqx.field(static=True, default=1e-3)
    l2_weight: float = eqx.field(static=True, default=1e-4)
    metric: Any = None
    implementation: Implementation = eqx.field(static=True, default="factors")

    def __check_init__(self) -> None:
        """Reject settings that cannot work."""
        _check(self)

    def __call__(
        self,
        student: SparseModel,
        teacher: PyTree,
        x: Shaped[Array, "batch ..."],
        moment: Moment,
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """The loss, and its three terms without their weights."""
        found = _compared(self, student, teacher, x, moment)
        target = jnp.mean(jnp.square(widen(found.student) - widen(found.teacher)))
        kernel = jnp.mean(jnp.square(found.student_kernel - found.teacher_kernel))
        penalty, norm = l2_penalty(self.l2_weight, student, moment)
        terms = {"kernel_distance": kernel, "target_distance": target, "weight_norm": norm}
        return target + self.kernel_weight * kernel + penalty, terms


class KernelAlignment(AbstractTransferLoss):
    """Outputs as in `KernelMatching`; of the kernels only the shape is matched, not the scale.

        L = mean (f_s(x) - f_t(x))^2 + lambda_K (1 - A) + (lambda_2 / density) sum |m W|^2
        A = <C Theta_s, C Theta_t> / (|C Theta_s| |C Theta_t|)

    with the Frobenius product over all entries, and `C` taking means over either batch away, for
    each pair of outputs: centred kernel alignment (Cortes et al., JMLR 2012). A kernel that is the
    teacher's times a number has A = 1: the learning rate makes up for the number.

    Attributes:
        kernel: `"active"` or `"ambient"`.
        probe: which pairs of outputs of the kernels are compared.
        kernel_weight: lambda_K.
        l2_weight: lambda_2.
        metric: weights of the parameters in both kernels; see `ntk`.
        implementation: of the kernels; see `ntk`.
    """

    kernel: KernelKind = eqx.field(static=True, default="active")
    probe: AbstractProbe = eqx.field(default_factory=Full)
    kernel_weight: float = eqx.field(static=True, default=1.0)
    l2_weight: float = eqx.field(static=True, default=1e-4)
    metric: Any = None
    implementation: Implementation = eqx.field(static=True, default="factors")

    def __check_init__(self) -> None:
        """Reject settings that cannot work."""
        _check(self)

    def __call__(
        self,
        student: SparseModel,
        teacher: PyTree,
        x: Shaped[Array, "batch ..."],
        moment: Moment,
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """The loss and its terms; `kernel_alignment` is A."""
        found = _compared(self, student, teacher, x, moment)
        target = jnp.mean(jnp.square(widen(found.student) - widen(found.teacher)))
        one, two = _centred(found.student_kernel), _centred(found.teacher_kernel)
        tiny = jnp.finfo(one.dtype).tiny
        length = lambda theta: jnp.sqrt(jnp.sum(jnp.square(theta)) + tiny)
        alignment = jnp.sum(one * two) / (length(one) * length(two))
        penalty, norm = l2_penalty(self.l2_weight, student, moment)
        terms = {
            "kernel_distance": jnp.mean(jnp.square(found.student_kernel - found.teacher_kernel)),
            "target_distance": target,
            "weight_norm": norm,
            "kernel_alignment": alignment,
        }
        return target + self.kernel_weight * (1.0 - alignment) + penalty, terms


def _compared(
    loss: KernelMatching | KernelAlignment,
    student: SparseModel,
    teacher: PyTree,
    x: Array,
    moment: Moment,
) -> Any:
    return outputs_and_kernels(
        student,
        teacher,
        x,
        moment,
        kernel=loss.kernel,
        probe=loss.probe,
        metric=loss.metric,
        implementation=loss.implementation,
    )


def _centred(theta: Float[Array, "n m *outputs"]) -> Float[Array, "n m *outputs"]:
    rows = theta - jnp.mean(theta, axis=0, keepdims=True)
    return rows - jnp.mean(rows, axis=1, keepdims=True)


def _check(loss: Any) -> None:
    name = type(loss).__name__
    for field, allowed in (("kernel", _KERNELS), ("implementation", _IMPLEMENTATIONS)):
        if getattr(loss, field) not in allowed:
            raise ValueError(
                f"{name}: {field} must be one of {allowed}, got {getattr(loss, field)!r}."
            )
    for field in ("kernel_weight", "l2_weight"):
        check_weight(f"{name}: {field}", getattr(loss, field))
    if not isinstance(loss.probe, AbstractProbe):
        raise ValueError(f"{name}: probe must be an AbstractProbe, got {loss.probe!r}.")
    if isinstance(loss.probe, Sketch) and loss.implementation != "factors":
        raise ValueError(f"{name}: a sketch needs implementation='factors'.")
