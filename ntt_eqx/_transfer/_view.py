"""`RefreshView`: what a refresh sees of a transfer."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from .._refreshes import AbstractRefreshView
from .._scores import split_weights
from .._sparse import SparseModel
from .._step_info import StepInfo
from .._types import PyTree
from ._loss import AbstractTransferLoss


class RefreshView(AbstractRefreshView):
    """The inputs of a refresh in a transfer.

    Attributes:
        student: the student after the step; dense weights live on under its mask.
        teacher: the dense model, fixed.
        x: the step's batch `[batch, ...]`.
        info: number of steps done, a key for this refresh, the density.
        loss: the transfer loss.
    """

    student: SparseModel
    teacher: Any
    x: Array
    info: StepInfo
    loss: AbstractTransferLoss

    def dense_gradient(self) -> PyTree:
        """The gradient of the transfer loss by every prunable weight, kept or not.

        The model is evaluated at the masked network, where pruned weights are zero, while the
        active kernel keeps summing over the student's mask: the gradient says how the loss changes
        if a pruned weight leaves zero. A custom loss gets this from `outputs_and_kernels`.
        """
        student = eqx.nn.inference_mode(self.student)
        weights, rest = split_weights(student.to_dense(), student.mask)
        ones = jax.tree.map(jnp.ones_like, student.mask)
        teacher = eqx.nn.inference_mode(self.teacher)
        info = StepInfo(self.info.step, self.info.key, self.info.density, metric_mask=student.mask)

        def value(weights: PyTree) -> Array:
            opened = SparseModel(eqx.combine(weights, rest), ones)
            return self.loss(opened, teacher, self.x, info)[0]

        return jax.grad(value)(weights)
