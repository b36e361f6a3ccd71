"""The implementations of the masked NTK product, by name."""

import importlib
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from .._chips import lacks_mosaic_gpu, lacks_mosaic_tpu
from .._dispatch import Device
from .._operation import Case, Implementation, Plan, reference_implementation
from .reference import masked_ntk_reference


def _by_kernels(
    name: str, lacks: Callable[[Device], str | None], interpret: bool
) -> Implementation:
    """The kernels of the module `name`, which is imported when a call first takes them.

    Pallas for a GPU takes longer to import than all else in this package, and a CPU never needs it.
    """

    def module() -> Any:
        return importlib.import_module(f".{name}", __package__)

    def forward(plan: Plan, *args: Any) -> Any:
        return module().forward(plan, *args, interpret=interpret)

    def backward(plan: Plan, *args: Any) -> Any:
        return module().backward(plan, *args, interpret=interpret)

    def refusal(device: Device, case: Case) -> str | None:
        reason = None if interpret else lacks(device)  # interpreted, they run on any device
        if reason is not None:
            return reason
        if case.dtype not in (jnp.float32, jnp.bfloat16):
            return f"takes float32 and bfloat16, not {case.dtype}"
        if case.mask == "none":
            return "has nothing to fuse without a mask: the sums over i and j separate"
        return None

    return Implementation(refusal, forward, backward)


IMPLEMENTATIONS = {
    "reference": reference_implementation(masked_ntk_reference),
    "pallas_gpu": _by_kernels("pallas_gpu", lacks_mosaic_gpu, interpret=False),
    "pallas_tpu": _by_kernels("pallas_tpu", lacks_mosaic_tpu, interpret=False),
    "pallas_gpu_interpret": _by_kernels("pallas_gpu", lacks_mosaic_gpu, interpret=True),
    "pallas_tpu_interpret": _by_kernels("pallas_tpu", lacks_mosaic_tpu, interpret=True),
}
