"""Refuse forward-mode derivatives of the kernel, with a message of this library.

Its products carry rules of their own for the way back (`jax.custom_vjp`), and JAX would speak of
these, which no user wrote. What goes into a kernel therefore passes through an identity whose
tangent is linear, can be transposed, and cannot be computed: reverse mode transposes every tangent
before anything runs, forward mode runs it.
"""

from typing import Any

import equinox as eqx
import jax
import jax.extend.core as jex_core
from jax.interpreters import ad, batching, mlir

from .._types import PyTree

_MESSAGE = (
    "ntk: the kernel is differentiable in reverse mode only (jax.grad, jax.vjp, jax.jacrev), and "
    "this is forward mode (jax.jvp, jax.jacfwd, jax.linearize, jax.hessian). Use jax.jacrev, or "
    "jax.jacrev twice for second derivatives; implementation='jacobian' of ntk has both modes."
)


def reverse_only(tree: PyTree) -> PyTree:
    """Return the arrays unchanged; a forward derivative by any of them raises `ValueError`."""
    return jax.tree.map(lambda a: _value.bind(a) if eqx.is_inexact_array(a) else a, tree)


def _refuse(*_: Any, **__: Any) -> Any:
    raise ValueError(_MESSAGE)


def _differentiated(primals: Any, tangents: Any) -> Any:
    (x,), (t,) = primals, tangents
    # An argument that nobody differentiates by stays one: a zero is not made an array.
    return _value.bind(x), t if type(t) is ad.Zero else _tangent.bind(t)


_value = jex_core.Primitive("reverse_only")
_value.def_impl(lambda x: x)
_value.def_abstract_eval(lambda x: x)
mlir.register_lowering(_value, lambda context, x: [x])
batching.primitive_batchers[_value] = lambda arguments, axes: (_value.bind(*arguments), axes[0])
ad.primitive_jvps[_value] = _differentiated

_tangent = jex_core.Primitive("reverse_only_tangent")
_tangent.def_impl(_refuse)
_tangent.def_abstract_eval(lambda x: x)
mlir.register_lowering(_tangent, _refuse)
batching.primitive_batchers[_tangent] = _refuse
ad.deflinear2(_tangent, lambda cotangent, _: [cotangent])
