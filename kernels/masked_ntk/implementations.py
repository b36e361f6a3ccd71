"""The implementations of the masked NTK product, by name."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from .. import _mosaic_gpu, _mosaic_tpu
from .._dispatch import Device
from .._gather import GatheredMetric
from .._mosaic_gpu import InterpretGPUParams
from .._operation import Case, Implementation, Plan, from_one_side, reference_implementation
from .._precision import at_precision
from . import dense_gpu, dense_tpu, gathered, gathered_gpu, gathered_tpu, outputs, outputs_gpu
from .composed import Kernels
from .reference import masked_ntk_reference


def _theta(u, d1, d2, *, precision, interpret):
    del interpret
    with at_precision(precision):
        return outputs.theta(u, d1.astype(jnp.float32), d2.astype(jnp.float32))


def _cotangents(g, u, d1, d2, *, sides, precision, interpret):
    del sides, interpret  # XLA removes what is not used
    with at_precision(precision):
        return outputs.cotangents(g, u, d1.astype(jnp.float32), d2.astype(jnp.float32))


_WHOLE_GPU = Kernels(dense_gpu.u, outputs_gpu.theta, outputs_gpu.cotangents, dense_gpu.pulled)
_GATHERED_GPU = Kernels(
    functools.partial(gathered.u, gathered_gpu),
    outputs_gpu.theta,
    outputs_gpu.cotangents,
    functools.partial(gathered.pulled, gathered_gpu),
)
_GATHERED_TPU = Kernels(
    functools.partial(gathered.u, gathered_tpu),
    _theta,
    _cotangents,
    functools.partial(gathered.pulled, gathered_tpu),
)


def _on_gpu(interpret: Any) -> Implementation:
    def kernels(c: Any) -> Kernels:
        return _GATHERED_GPU if isinstance(c, GatheredMetric) else _WHOLE_GPU

    def forward(plan: Plan, *args: Any):
        options = dict(precision=plan.precision, interpret=interpret)
        return kernels(args[4]).forward(*args, **options)

    def backward(plan: Plan, *args: Any):
        options = dict(precision=plan.precision, interpret=interpret)
        return kernels(args[4]).backward(*args, **options)

    return Implementation(_refusal(_mosaic_gpu.refusal, interpret), forward, backward)


def _on_tpu(interpret: bool) -> Implementation:
    def options(plan: Plan) -> dict[str, Any]:
        return dict(precision=plan.precision, interpret=interpret)

    def config(plan: Plan) -> dense_tpu.Config:
        return dense_tpu.config_for(plan.kind, plan.shape)

    @from_one_side
    def whole_backward(plan: Plan, *args: Any) -> tuple[jax.Array, jax.Array]:
        return dense_tpu.backward(*args, config=config(plan), **options(plan))

    def forward(plan: Plan, *args: Any):
        if isinstance(args[4], GatheredMetric):
            return _GATHERED_TPU.forward(*args, **options(plan))
        return dense_tpu.forward(*args, config=config(plan), **options(plan)), None

    def backward(plan: Plan, *args: Any):
        if isinstance(args[4], GatheredMetric):
            return _GATHERED_TPU.backward(*args, **options(plan))
        return whole_backward(plan, *args)

    return Implementation(_refusal(_mosaic_tpu.refusal, interpret), forward, backward)


def _refusal(of_device: Any, interpret: Any) -> Any:
    """Why kernels cannot take a call on a device; interpreted, they run on any."""

    def refusal(device: Device, case: Case) -> str | None:
        reason = None if interpret else of_device(device)
        if reason is not None:
            return reason
        if case.dtype not in (jnp.float32, jnp.bfloat16):
            return f"takes float32 and bfloat16, not {case.dtype}"
        if case.mask == "none":
            return "has nothing to fuse without a mask: the sums over i and j separate"
        return None

    return refusal


IMPLEMENTATIONS = {
    "reference": reference_implementation(masked_ntk_reference),
    "pallas_gpu": _on_gpu(None),
    "pallas_tpu": _on_tpu(False),
    "pallas_gpu_interpret": _on_gpu(InterpretGPUParams(detect_races=True)),
    "pallas_tpu_interpret": _on_tpu(True),
}
