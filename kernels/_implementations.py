"""The implementations that every operation has, by name."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax

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

    The modules of kernels have `refusal`, `refusal_of_case`, `forward` and `backward`; a config
    is made from the plan and the arguments of a call.
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
        if interpreted:
            return module.refusal_of_case(case.dtype, masked=case.masked)
        return module.refusal(device, case.dtype, masked=case.masked)

    def options(plan: Plan, args: tuple[Any, ...]) -> dict[str, Any]:
        return dict(precision=plan.precision, config=config(plan, *args), interpret=interpret)

    return Implementation(
        refusal=refusal,
        forward=lambda plan, *args: module.forward(*args, **options(plan, args)),
        backward=lambda plan, *args: module.backward(*args, **options(plan, args)),
    )
