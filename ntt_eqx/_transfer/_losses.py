"""Losses that compare outputs and kernels."""

import abc
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, Shaped

from .._checks import check_weight
from .._ntk._kernel import Implementation
from .._ntk._plan import KernelKind
from .._sparse import SparseModel
from .._types import widen
from ..kernels import PRECISIONS, Precision
from ._kernels import outputs_and_kernels
from ._loss import AbstractTransferLoss, l2_penalty
from ._moment import Moment
from ._probes import AbstractProbe, Full, Sketch

_CHOICES = (
    ("kernel", ("active", "ambient")),
    ("precision", PRECISIONS),
    ("implementation", ("factors", "jacobian", "ntk_vector_products")),
)


class AbstractKernelLoss(AbstractTransferLoss):
    """The squared distance of the outputs, and a distance D of the kernels that subclasses define.

        L = mean (f_s(x) - f_t(x))^2 + lambda_K D(Theta_s(x1,x2), Theta_t(x1,x2))
            + (lambda_2 / density) sum |m W|^2

    Attributes:
        kernel: `"active"` (the paper's definition) or `"ambient"` (what its published code runs).
        probe: which pairs of outputs of the kernels are compared.
        kernel_weight: lambda_K.
        l2_weight: lambda_2.
        metric: weights of the parameters in both kernels, such as their learning rates; see `ntk`.
        precision: precision of matrix products; see `ntk`.
        implementation: implementation of the kernels; see `ntk`.
    """

    kernel: eqx.AbstractVar[KernelKind]
    probe: eqx.AbstractVar[AbstractProbe]
    kernel_weight: eqx.AbstractVar[float]
    l2_weight: eqx.AbstractVar[float]
    metric: eqx.AbstractVar[Any]
    precision: eqx.AbstractVar[Precision]
    implementation: eqx.AbstractVar[Implementation]

    @abc.abstractmethod
    def distance(
        self,
        student_kernel: Float[Array, "n m *outputs"],
        teacher_kernel: Float[Array, "n m *outputs"],
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Return D, and further metrics of the kernels by name."""

    def __check_init__(self) -> None:
        """Reject settings that cannot work."""
        name = type(self).__name__
        for field, allowed in _CHOICES:
            if getattr(self, field) not in allowed:
                raise ValueError(
                    f"{name}: {field} must be one of {allowed}, got {getattr(self, field)!r}."
                )
        for field in ("kernel_weight", "l2_weight"):
            check_weight(f"{name}: {field}", getattr(self, field))
        if not isinstance(self.probe, AbstractProbe):
            raise ValueError(f"{name}: probe must be an AbstractProbe, got {self.probe!r}.")
        if isinstance(self.probe, Sketch) and self.implementation != "factors":
            raise ValueError(f"{name}: a sketch needs implementation='factors'.")

    def __call__(
        self,
        student: SparseModel,
        teacher: PyTree,
        x: Shaped[Array, "batch ..."],
        moment: Moment,
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """The loss, and its terms without their weights."""
        found = outputs_and_kernels(
            student,
            teacher,
            x,
            moment,
            kernel=self.kernel,
            probe=self.probe,
            metric=self.metric,
            precision=self.precision,
            implementation=self.implementation,
        )
        target = jnp.mean(jnp.square(widen(found.student) - widen(found.teacher)))
        distance, shown = self.distance(found.student_kernel, found.teacher_kernel)
        penalty, norm = l2_penalty(self.l2_weight, student, moment)
        terms = {
            "kernel_distance": _mean_square(found.student_kernel, found.teacher_kernel),
            "target_distance": target,
            "weight_norm": norm,
        }
        return target + self.kernel_weight * distance + penalty, {**terms, **shown}


class KernelMatching(AbstractKernelLoss):
    """The paper's loss (Liu & Zenke, ICML 2020, arXiv 2006.08228).

        D = mean (Theta_s(x1,x2) - Theta_t(x1,x2))^2

    in the loss of `AbstractKernelLoss`, which explains the settings.
    """

    kernel: KernelKind = eqx.field(static=True, default="active")
    probe: AbstractProbe = eqx.field(default_factory=Full)
    kernel_weight: float = eqx.field(static=True, default=1e-3)
    l2_weight: float = eqx.field(static=True, default=1e-4)
    metric: Any = None
    precision: Precision = eqx.field(static=True, default="float32")
    implementation: Implementation = eqx.field(static=True, default="factors")

    def distance(
        self,
        student_kernel: Float[Array, "n m *outputs"],
        teacher_kernel: Float[Array, "n m *outputs"],
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """The mean squared difference of all entries."""
        return _mean_square(student_kernel, teacher_kernel), {}


class KernelAlignment(AbstractKernelLoss):
    """Match the shape of the kernels, not their scale.

        D = 1 - A,   A = <C Theta_s, C Theta_t> / (|C Theta_s| |C Theta_t|)

    in the loss of `AbstractKernelLoss`, which explains the settings, with the Frobenius product
    over all entries. `C` subtracts the means over either batch, for each pair of outputs: centred
    kernel alignment (Cortes et al., JMLR 2012). A multiple of the teacher's kernel has A = 1,
    because the learning rate can absorb the factor. A kernel that is constant over all pairs of
    samples has A = 0 and no gradient.
    """

    kernel: KernelKind = eqx.field(static=True, default="active")
    probe: AbstractProbe = eqx.field(default_factory=Full)
    kernel_weight: float = eqx.field(static=True, default=1.0)
    l2_weight: float = eqx.field(static=True, default=1e-4)
    metric: Any = None
    precision: Precision = eqx.field(static=True, default="float32")
    implementation: Implementation = eqx.field(static=True, default="factors")

    def distance(
        self,
        student_kernel: Float[Array, "n m *outputs"],
        teacher_kernel: Float[Array, "n m *outputs"],
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """1 - A, and A as `kernel_alignment`."""
        alignment = jnp.sum(_shape_of(student_kernel) * _shape_of(teacher_kernel))
        return 1.0 - alignment, {"kernel_alignment": alignment}


def _mean_square(one: Float[Array, "*shape"], two: Float[Array, "*shape"]) -> Float[Array, ""]:
    return jnp.mean(jnp.square(one - two))


def _shape_of(theta: Float[Array, "n m *outputs"]) -> Float[Array, "n m *outputs"]:
    """The centred kernel divided by its norm; 0 where its entries differ by rounding alone."""
    size = jax.lax.stop_gradient(jnp.max(jnp.abs(theta)))  # so that no square under- or overflows
    centred = _centred(theta / jnp.where(size > 0, size, jnp.ones_like(size)))
    square = jnp.sum(jnp.square(centred))
    differs = square > theta.size * (4 * jnp.finfo(theta.dtype).eps) ** 2
    # Both branches of a `where` are differentiated: the root of 0 has no slope.
    norm = jnp.sqrt(jnp.where(differs, square, jnp.ones_like(square)))
    return jnp.where(differs, centred / norm, jnp.zeros_like(centred))


def _centred(theta: Float[Array, "n m *outputs"]) -> Float[Array, "n m *outputs"]:
    rows = theta - jnp.mean(theta, axis=0, keepdims=True)
    return rows - jnp.mean(rows, axis=1, keepdims=True)
