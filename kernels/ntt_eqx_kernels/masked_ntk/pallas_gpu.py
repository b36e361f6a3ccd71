"""The masked NTK product by kernels for a GPU: which of them make a call and its gradient."""

import functools
from typing import Any

from .._gather import GatheredMetric
from .._mosaic_gpu import InterpretGPUParams
from .._operation import Plan
from . import dense_gpu, gathered, gathered_gpu, outputs_gpu
from .composed import Kernels

_WHOLE = Kernels(dense_gpu.u, outputs_gpu.theta, outputs_gpu.cotangents, dense_gpu.pulled)
_GATHERED = Kernels(
    functools.partial(gathered.u, gathered_gpu),
    outputs_gpu.theta,
    outputs_gpu.cotangents,
    functools.partial(gathered.pulled, gathered_gpu),
)


def forward(plan: Plan, *args: Any, interpret: bool) -> Any:
    """`Implementation.forward`; interpreted, it looks for races too."""
    return _kernels(args[4]).forward(*args, **_options(plan, interpret))


def backward(plan: Plan, *args: Any, interpret: bool) -> Any:
    """`Implementation.backward`."""
    return _kernels(args[4]).backward(*args, **_options(plan, interpret))


def _kernels(c: Any) -> Kernels:
    return _GATHERED if isinstance(c, GatheredMetric) else _WHOLE


def _options(plan: Plan, interpret: bool) -> dict[str, Any]:
    params = InterpretGPUParams(detect_races=True) if interpret else None
    return dict(precision=plan.precision, interpret=params)
