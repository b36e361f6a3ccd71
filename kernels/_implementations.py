"""The implementations that every operation has, by name."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from ._dispatch import Device
from ._mosaic_gpu import InterpretGPUParams
from ._operation import Case, Implementation, Plan, reference_implementation


def implementations(
    reference: Callable[..., jax.Array],
    gpu: ModuleType,
    gpu_config: Callable[..., Any],
    tpu: ModuleType,
    tpu_config: Callable[..., Any],
) -> dict[str, Implementation]:
    """The pure-JAX version, the kernels, and the kernels as JAX interprets them on any device.

    A module of kernels has `refusal`, `WITHOUT_MASK`, `forward` and `backward`; a config is made
    from the plan and the arguments of a call.
    """
    interpreted = InterpretGPUParams(detect_races=True)
    return {
        "reference": reference_implementation(reference),
        "pallas_gpu": _pallas(gpu, gpu_config, None, interpreted=False),
        "pallas_tpu": _pallas(tpu, tpu_config, False, interpreted=False),
        "pallas_gpu_interpret": _pallas(gpu, gpu_config, interpreted, interpreted=True),
        "pallas_tpu_interpret": _pallas(tpu, tpu_config, True, interpreted=True),
    }


def _pallas(
    module: ModuleType, config: Callable[..., Any], interpret: Any, *, interpreted: bool
) -> Implementation:
    def refusal(device: Device, case: Case) -> str | None:
        reason = None if interpreted else module.refusal(device)
        return reason or _refusal_of_case(module, case)

    def options(plan: Plan, args: tuple[Any, ...]) -> dict[str, Any]:
        return dict(precision=plan.precision, config=config(plan, *args), interpret=interpret)

    return Implementation(
        refusal=refusal,
        forward=lambda plan, *args: module.forward(*args, **options(plan, args)),
        backward=lambda plan, *args: module.backward(*args, **options(plan, args)),
    )


def _refusal_of_case(module: ModuleType, case: Case) -> str | None:
    """Why a kernel cannot take a call on any device, or `None`."""
    if case.dtype not in (jnp.float32, jnp.bfloat16):
        return f"takes float32 and bfloat16, not {case.dtype}"
    if case.mask == "none":
        return f"has nothing to fuse without a mask: {module.WITHOUT_MASK}"
    if case.mask == "gathered":
        return "takes the whole mask, not its gathered non-zeros"
    return None
