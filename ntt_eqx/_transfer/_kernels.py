"""Outputs and kernels of student and teacher on one batch, which losses compare."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from .._checks import sample_of, sample_output
from .._examples import as_inference
from .._ntk import kernel_spec, outputs_and_ntk
from .._ntk._given import given_batch, given_leaves
from .._sparse import SparseModel
from .._step_info import StepInfo
from .._types import Implementation, KernelKind, PyTree
from ..kernels import Precision
from ._probes import AbstractProbe, Full


class OutputsAndKernels(NamedTuple):
    """Two models on one batch of samples.

    Attributes:
        student: the student's outputs `[batch, K]`.
        teacher: the teacher's, without a gradient.
        student_kernel: the student's kernel between the halves of the batch, `[N, M, ...]`.
        teacher_kernel: the teacher's, without a gradient.
    """

    student: Float[Array, "batch outputs"]
    teacher: Float[Array, "batch outputs"]
    student_kernel: Float[Array, "n m *outputs"]
    teacher_kernel: Float[Array, "n m *outputs"]


def outputs_and_kernels(
    student: SparseModel,
    teacher: PyTree,
    x: Shaped[Array | np.ndarray, "batch ..."],
    info: StepInfo,
    *,
    kernel: KernelKind = "active",
    probe: AbstractProbe | None = None,
    metric: PyTree | None = None,
    precision: Precision = "float32",
    implementation: Implementation = "factors",
) -> OutputsAndKernels:
    """Outputs and kernels of student and teacher, each from one pass over the batch.

    **Arguments:**

    - `student`, `teacher`: models of one sample, in inference mode.
    - `x`: `[batch, ...]`, an even number of samples: kernels are taken between its halves.
    - `info`: number, key and density of the step.
    - `kernel`: `"active"` or `"ambient"`, see `ntk`.
    - `probe`: which pairs of outputs; all of them without.
    - `metric`: weights of the parameters in both kernels, see `ntk`; for all 1, `None`.
    - `precision`, `implementation`: of the kernels, and of the outputs; see `ntk`.

    **Returns:**

    `OutputsAndKernels`; those of the teacher carry no gradient.

    **Raises:**

    `ValueError` for an odd number of samples, and for what `ntk` does not take.
    """
    caller = "outputs_and_kernels"
    samples = given_batch(caller, "x", x)
    if len(samples) < 2 or len(samples) % 2:
        raise ValueError(
            f"{caller}: x must have an even number of samples, for kernels are taken between its "
            f"halves; got {len(samples)}."
        )
    student = given_leaves(caller, "student", student)
    teacher = given_leaves(caller, "teacher", teacher)
    metric = given_leaves(caller, "metric", metric)
    num_outputs = math.prod(sample_output("ntt_loss", teacher, sample_of(samples)).shape)
    outputs, directions = (Full() if probe is None else probe).view(info.key, num_outputs)
    spec = kernel_spec(kernel, outputs, precision, implementation)
    f_t, theta_t = jax.lax.stop_gradient(
        outputs_and_ntk(spec, teacher, samples, directions=directions, metric=metric)
    )
    if spec.device.platform != "cpu":
        # The student waits for the teacher's kernel, so that only one of them has its factors in
        # an accelerator's memory at a time.
        samples, f_t, theta_t = jax.lax.optimization_barrier((samples, f_t, theta_t))
    index = info.support
    if kernel == "active" and info.metric_mask is not None:
        # To differentiate by pruned weights, too, the model is evaluated with an open mask, while
        # the kernel still sums over the student's own mask, as a metric.
        student, spec = as_inference(student), dataclasses.replace(spec, kernel="ambient")
        index, metric = None, _masked(metric, info.metric_mask)
    f_s, theta_s = outputs_and_ntk(
        spec, student, samples, index=index, directions=directions, metric=metric
    )
    return OutputsAndKernels(f_s, f_t, theta_s, theta_t)


def _masked(metric: PyTree | None, mask: PyTree) -> PyTree:
    if metric is None:
        return mask
    one = lambda m, c: c if m is None else m if c is None else jnp.where(m, c, jnp.zeros_like(c))
    return jax.tree.map(one, mask, metric, is_leaf=lambda leaf: leaf is None)
