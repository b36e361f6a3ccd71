"""What the two masked NTK products share: one call, its gradient, and its batching rule.

An operation maps the factors of two sides and a mask to `Theta[n, m, k, l]`. It is symmetric:
exchanging the sides transposes `Theta` to `[m, n, l, k]`, so that a gradient of the first side is
one of the second, too (`from_one_side`).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp

from ._dispatch import Choice, Device, Request, choose, target_device
from ._precision import Precision, accumulator_dtype, at_precision, resolve
from .manual_axes import like_varying, varying_alike

Sizes: TypeAlias = tuple[int, int, int, int, int, int]
"""(N, M, K, L, I, J): samples and outputs of both sides, output and input features."""


@dataclasses.dataclass(frozen=True)
class Case:
    """What an implementation needs to know to take a call or refuse it."""

    dtype: jnp.dtype
    mask: Literal["none", "whole", "gathered"]
    shape: Sizes


def case_of(factor: Any, mask: Any, shape: Sizes) -> Case:
    """The case of a call whose arguments were checked."""
    kind = "none" if mask is None else "whole" if hasattr(mask, "dtype") else "gathered"
    return Case(jnp.dtype(factor.dtype), kind, shape)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How one call is carried out; static, known before tracing."""

    implementation: "Implementation"
    precision: Precision
    kind: str
    shape: Sizes


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute an operation.

    Attributes:
        refusal: from the device and the case to the reason why not, or `None`.
        forward: `(plan, a1, d1, a2, d2, c) -> (Theta, kept)`, with what it keeps for the gradient,
            if anything.
        backward: `(plan, a1, d1, a2, d2, c, g, kept, sides)`, the cotangents of the four factors
            from that of `Theta`; `sides` says which of the two are asked for.
        maps: whether `jax.vmap` is right for it as it is; otherwise a batch runs one by one.
    """

    refusal: Callable[[Device, Case], str | None]
    forward: Callable[..., tuple[jax.Array, Any]]
    backward: Callable[..., list[jax.Array | None]]
    maps: bool = False


def plan_call(
    operation: str,
    implementations: Mapping[str, Implementation],
    case: Case,
    precision: Precision | None,
    implementation: Request,
) -> tuple[Plan, Choice]:
    """Choose the implementation of one call, without tracing anything."""
    resolved = resolve(operation, precision, case.dtype)
    refusals = {
        name: (lambda device, impl=impl: impl.refusal(device, case))
        for name, impl in implementations.items()
    }
    n, m, k, l, i, j = case.shape  # noqa: E741
    flops = 2.0 * n * m * i * (j + k + k * l)
    choice = choose(operation, refusals, implementation, flops)
    chosen = implementations[choice.implementation]
    return Plan(chosen, resolved, target_device().kind, case.shape), choice


def check_factors(
    operation: str, factors: tuple[Any, ...], mask: Any, *, ranks: tuple[int, ...]
) -> None:
    """Raise `ValueError` unless axes and dtypes of all arguments are as the operation asks."""
    dtype = factors[0].dtype
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{operation}: the factors must be floating point, got {dtype}.")
    for name, x, rank in zip(("a1", "d1", "a2", "d2"), factors, ranks, strict=True):
        if x.ndim != rank:
            raise ValueError(f"{operation}: {name} must have {rank} axes, got shape {x.shape}.")
        if x.dtype != dtype:
            raise ValueError(
                f"{operation}: {name} is {x.dtype} but a1 is {dtype}; the four factors must have "
                "one dtype."
            )
    kind = getattr(mask, "dtype", jnp.dtype(bool))
    if kind != jnp.dtype(bool) and not jnp.issubdtype(kind, jnp.floating):
        raise ValueError(f"{operation}: mask must be boolean or floating point, got {kind}.")


def check_shapes(
    operation: str, arguments: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise `ValueError` unless every argument but `None` has the expected shape."""
    for name, shape in expected.items():
        x = arguments[name]
        if x is not None and x.shape != shape:
            given = ", ".join(f"{n} {v.shape}" for n, v in arguments.items() if v is not None)
            raise ValueError(
                f"{operation}: {name} has shape {x.shape} where {shape} fits the others ({given})."
            )


def reference_implementation(reference: Callable[..., jax.Array]) -> Implementation:
    """The pure-JAX version, which takes every case on every device, by its own gradient rule."""

    def forward(plan, a1, d1, a2, d2, c):
        with at_precision(plan.precision):
            return reference(a1, d1, a2, d2, c), None

    def backward(plan, a1, d1, a2, d2, c, g, kept, sides):
        del kept
        full = [a1, d1, a2, d2]
        indices = [index for index in range(4) if sides[index // 2]]

        def of_asked(*factors):
            arguments = list(full)
            for index, factor in zip(indices, factors, strict=True):
                arguments[index] = factor
            return reference(*arguments, c)

        with at_precision(plan.precision):
            _, vjp = jax.vjp(of_asked, *(full[index] for index in indices))  # the product is dead
            found = dict(zip(indices, vjp(g), strict=True))
        return [found.get(index) for index in range(4)]

    return Implementation(lambda device, case: None, forward, backward, maps=True)


def from_one_side(one: Callable[..., tuple[jax.Array, jax.Array]]) -> Callable[..., Any]:
    """`Implementation.backward` from `(plan, a1, d1, a2, d2, c, g) -> (a1_bar, d1_bar)`."""

    def backward(plan, a1, d1, a2, d2, c, g, kept, sides):
        del kept
        bars: list[jax.Array | None] = [None] * 4
        if sides[0]:
            bars[:2] = one(plan, a1, d1, a2, d2, c, g)
        if sides[1]:
            n, m, k, l, i, j = plan.shape  # noqa: E741
            exchanged = dataclasses.replace(plan, shape=(m, n, l, k, i, j))
            bars[2:] = one(exchanged, a2, d2, a1, d1, c, g.transpose(1, 0, 3, 2))
        return bars

    return backward


def run(plan: Plan, a1, d1, a2, d2, mask) -> jax.Array:
    """Carry out `plan`; differentiable in the factors of both sides, mappable by `jax.vmap`."""
    out_shape = (a1.shape[0], a2.shape[0], d1.shape[1], d2.shape[1])
    if 0 in (*a1.shape, *d1.shape, *a2.shape, *d2.shape):
        return jnp.zeros(out_shape, accumulator_dtype(a1.dtype))
    return _product(plan, *varying_alike(a1, d1, a2, d2, mask))


def _mappable(plan: Plan, function: Callable[..., Any]) -> Callable[..., Any]:
    """A pass of the implementation, which `jax.vmap` maps as it is or one by one."""
    call = functools.partial(function, plan)
    return call if plan.implementation.maps else jax.custom_batching.sequential_vmap(call)


def _primal(plan, *args):
    return like_varying(_mappable(plan, plan.implementation.forward)(*args)[0], args)


_product = jax.custom_vjp(_primal, nondiff_argnums=(0,))


def _forward(plan, *args):
    values = [jax.tree.map(lambda x: x.value, arg, is_leaf=_is_primal) for arg in args]
    perturbed = [any(map(_is_perturbed, jax.tree.leaves(arg, is_leaf=_is_primal))) for arg in args]
    if perturbed[4]:
        raise NotImplementedError(
            "masked NTK product: the mask is a constant of the product, and its derivative was "
            "asked for; pass it through jax.lax.stop_gradient."
        )
    # A static flag travels between the passes as a tree: () for True, None for False.
    sides = (() if any(perturbed[:2]) else None, () if any(perturbed[2:4]) else None)
    found = _mappable(plan, plan.implementation.forward)(*values)
    theta, kept = like_varying(found, values)
    return theta, (values, kept, sides)


def _backward(plan, residuals, g):
    values, kept, flags = residuals
    sides = tuple(flag is not None for flag in flags)
    if isinstance(g, jax.custom_derivatives.SymbolicZero) or not any(sides):
        return None, None, None, None, None
    backward = plan.implementation.backward
    asked = lambda plan, *args: backward(plan, *args, sides)
    bars = like_varying(_mappable(plan, asked)(*values, g, kept), (*values, g, kept))
    cast = [None if b is None else b.astype(x.dtype) for b, x in zip(bars, values[:4], strict=True)]
    return (*cast, None)


_product.defvjp(_forward, _backward, symbolic_zeros=True)


def _is_perturbed(x: Any) -> bool:
    return x.perturbed and jnp.issubdtype(x.value.dtype, jnp.inexact)


def _is_primal(x: Any) -> bool:
    return isinstance(x, jax.custom_derivatives.CustomVJPPrimal)
