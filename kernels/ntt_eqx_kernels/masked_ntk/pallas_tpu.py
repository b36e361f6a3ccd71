"""The masked NTK product by kernels for a TPU: which of them make a call and its gradient."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from .._gather import GatheredMetric
from .._operation import Plan, from_one_side
from .._precision import at_precision
from . import dense_tpu, gathered, gathered_tpu, outputs
from .composed import Kernels


def forward(plan: Plan, *args: Any, interpret: bool) -> Any:
    """`Implementation.forward`."""
    options = dict(precision=plan.precision, interpret=interpret)
    if isinstance(args[4], GatheredMetric):
        return _GATHERED.forward(*args, **options)
    return dense_tpu.forward(*args, config=_config(plan), **options), None


def backward(plan: Plan, *args: Any, interpret: bool) -> Any:
    """`Implementation.backward`."""
    options = dict(precision=plan.precision, interpret=interpret)
    if isinstance(args[4], GatheredMetric):
        return _GATHERED.backward(*args, **options)

    @from_one_side
    def whole(plan: Plan, *args: Any) -> tuple[jax.Array, jax.Array]:
        return dense_tpu.backward(*args, config=_config(plan), **options)

    return whole(plan, *args)


def _config(plan: Plan) -> dense_tpu.Config:
    return dense_tpu.config_for(plan.kind, plan.shape)


def _theta(u, d1, d2, *, precision, interpret):
    del interpret
    with at_precision(precision):
        return outputs.theta(u, d1.astype(jnp.float32), d2.astype(jnp.float32))


def _cotangents(g, u, d1, d2, *, sides, precision, interpret):
    del sides, interpret  # XLA removes what is not used
    with at_precision(precision):
        return outputs.cotangents(g, u, d1.astype(jnp.float32), d2.astype(jnp.float32))


_GATHERED = Kernels(
    functools.partial(gathered.u, gathered_tpu),
    _theta,
    _cotangents,
    functools.partial(gathered.pulled, gathered_tpu),
)
