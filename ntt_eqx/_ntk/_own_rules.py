"""Functions with a derivative of their own, whose value under a derivative has another one."""

from typing import Any

import jax

from .._program import bind, equations, unfold, without_dead_steps

_OWN = ("custom_jvp_call", "custom_vjp_call")


def loses_rules(closed: Any) -> bool:
    """Whether the value that comes with a first derivative has another derivative than the value.

    A rule (`jax.custom_vjp`, `jax.custom_jvp`) gives the value beside its derivative. Where it
    computes it by code of its own, as a straight-through estimator may, JAX differentiates this
    code, and no more asks the rule. Where it calls the function again, as `jax.nn.relu` does, the
    rule still holds.
    """
    seen: dict[tuple[str, str], bool] = {}
    for eqn in equations(closed.jaxpr):
        if eqn.primitive.name in _OWN:
            key = _function(eqn)
            if key not in seen:
                seen[key] = _loses_rule(eqn)
    return any(seen.values())


def _function(eqn: Any) -> tuple[str, str]:
    return eqn.primitive.name, str(eqn.params["call_jaxpr"])


def _loses_rule(eqn: Any) -> bool:
    def value(*arguments: Any) -> Any:
        return jax.vjp(lambda *arguments: bind(eqn, arguments), *arguments)[0]

    try:
        closed = jax.make_jaxpr(value)(*(v.aval for v in eqn.invars))
    except Exception:  # a rule that needs what is around it: then its outputs are computed apart
        return True
    steps = without_dead_steps(unfold(closed)).steps
    return any(step.name not in _OWN or _function(step.eqn) != _function(eqn) for step in steps)
