"""The implementations that every operation has, by name."""

from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from ._dispatch import Device
from ._gather import GatheredMetric
from ._mosaic_gpu import InterpretGPUParams
from ._operation import Case, Implementation, Plan, reference_implementation

Gathered: TypeAlias = tuple[
    tuple[Callable[..., Any], Callable[..., Any]], tuple[Callable[..., Any], Callable[..., Any]]
]
"""(forward, backward) on a GPU and on a TPU, for a mask's gathered non-zeros."""


def implementations(
    reference: Callable[..., jax.Array],
    gpu: ModuleType,
    gpu_config: Callable[..., Any],
    tpu: ModuleType,
    tpu_config: Callable[..., Any],
    gathered: Gathered,
) -> dict[str, Implementation]:
    """The pure-JAX version, the kernels, and the kernels as JAX interprets them on any device.

    A module of kernels has `refusal`, `WITHOUT_MASK`, `forward` and `backward`; a config is made
    from the plan and the arguments of a call. `gathered` has what takes gathered non-zeros.
    """
    one, two = gathered
    interpreted = InterpretGPUParams(detect_races=True)
    return {
        "reference": reference_implementation(reference),
        "pallas_gpu": _pallas(gpu, gpu_config, one, None, interpreted=False),
        "pallas_tpu": _pallas(tpu, tpu_config, two, False, interpreted=False),
        "pallas_gpu_interpret": _pallas(gpu, gpu_config, one, interpreted, interpreted=True),
        "pallas_tpu_interpret": _pallas(tpu, tpu_config, two, True, interpreted=True),
    }


def _pallas(
    module: ModuleType,
    config: Callable[..., Any],
    gathered: tuple[Callable[..., Any], Callable[..., Any]],
    interpret: Any,
    *,
    interpreted: bool,
) -> Implementation:
    def refusal(device: Device, case: Case) -> str | None:
        reason = None if interpreted else module.refusal(device)
        return reason or _refusal_of_case(module, case)

    def options(plan: Plan, args: tuple[Any, ...]) -> dict[str, Any]:
        return dict(precision=plan.precision, config=config(plan, *args), interpret=interpret)

    def forward(plan: Plan, *args: Any) -> jax.Array:
        if isinstance(args[4], GatheredMetric):
            return gathered[0](*args, precision=plan.precision, interpret=interpret)
        return module.forward(*args, **options(plan, args))

    def backward_gathered(plan: Plan, *args: Any) -> list[jax.Array | None]:
        return gathered[1](*args, precision=plan.precision, interpret=interpret)

    return Implementation(
        refusal=refusal,
        forward=forward,
        backward=lambda plan, *args: module.backward(*args, **options(plan, args)),
        backward_gathered=backward_gathered,
    )


def _refusal_of_case(module: ModuleType, case: Case) -> str | None:
    """Why a kernel cannot take a call on any device, or `None`."""
    if case.dtype not in (jnp.float32, jnp.bfloat16):
        return f"takes float32 and bfloat16, not {case.dtype}"
    if case.mask == "none":
        return f"has nothing to fuse without a mask: {module.WITHOUT_MASK}"
    return None
