"""Masks from outside, and what the refreshes must keep of them."""

import warnings
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from .._masks import Unstructured
from .._masks._collapse import is_traced
from .._masks._sparsity import looks_like
from .._types import GradientTransformation, MaskTree, at_trace_time
from ._method import NeuralTangentTransfer


class PatternWarning(UserWarning):
    """A mask seems to have a pattern that refreshes do not keep."""


def hold_mask(
    caller: str, method: NeuralTangentTransfer, mask: MaskTree, step: Int[Array, ""] | int
) -> tuple[NeuralTangentTransfer, MaskTree]:
    """Adapt a method so that its refreshes keep the counts of `mask`; return it with the mask.

    A mask that fits the method's own sparsity needs no change. With any other mask, refreshes keep
    the number of weights in every layer. A traced mask is checked when its values are known.
    """
    if not method.refreshes:
        return method, mask
    sparsity = method.sparsity
    if is_traced(mask) or is_traced(step):
        other = ~sparsity.holds(mask, step)
        why = (
            f"{caller}: inside jit only a mask that the method's sparsity makes can be given, for "
            "refreshes must know its counts; call it outside of jit, or use NoRefresh()."
        )
        return method, eqx.error_if(mask, other, why)
    with at_trace_time():  # the mask may be a constant of a traced function
        if isinstance(sparsity.pattern, Unstructured) and (seen := looks_like(mask)) is not None:
            warnings.warn(
                f"{caller}: the given mask looks like {seen}; refreshes keep the number of weights "
                "in each layer, and not this pattern. Name it in Sparsity(pattern=...), or keep "
                "the mask as it is (NoRefresh(), mask_every=None).",
                PatternWarning,
                stacklevel=3,
            )
        if bool(sparsity.holds(mask, int(step))):
            return method, mask
        if callable(sparsity.density):
            raise ValueError(
                f"{caller}: the given mask does not have the density that the schedule gives at "
                f"step {int(step)}; make it with `sparsity.mask(scores, step)`."
            )
        held = sparsity.of_mask(jax.tree.map(jnp.asarray, mask))
    return with_sparsity(method, held), mask


def with_sparsity(method: NeuralTangentTransfer, sparsity: Any) -> NeuralTangentTransfer:
    """The same method with another sparsity."""
    return _changed(method, sparsity=sparsity)


def with_optimizer(
    method: NeuralTangentTransfer, optimizer: GradientTransformation
) -> NeuralTangentTransfer:
    """The same method with another optimiser."""
    return _changed(method, optimizer=optimizer)


def _changed(method: NeuralTangentTransfer, **parts: Any) -> NeuralTangentTransfer:
    names = ("sparsity", "loss", "refresh", "optimizer", "initial", "num_steps", "pruned")
    return NeuralTangentTransfer(**{name: getattr(method, name) for name in names} | parts)
