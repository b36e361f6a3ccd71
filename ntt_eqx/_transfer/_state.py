"""`NTTState`: everything that a step needs and returns."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.tree_util as jtu
from jaxtyping import Array, Int, UInt32

from .._distribute import layout_in_use
from .._kept import kept_layers
from .._masks._collapse import is_traced
from .._ntk import has_room, index_concrete, index_masks, is_index, kernel_spec, stored
from .._parameters import parameters, partition_parameters
from .._sparse import SparseModel, kept_of
from .._sparse_layers import (
    KeptEntries,
    current_entries,
    entries_have_room,
    kept_entries,
    on_entries,
    pays_in_a_transfer,
    sparse_layers,
)
from .._stateful import StatefulModel
from .._step_info import StepInfo, step_key
from .._types import MaskTree, PyTree
from ..kernels import target_device
from ._given import hold_mask
from ._matching import KernelMatching
from ._method import NeuralTangentTransfer

_NO_ROOM = (
    "{}: the mask keeps more weights than the one that this state was made for, or lacks its "
    "pattern: put a mask into an NTTState by state.with_mask(mask)."
)


class NTTState(eqx.Module):
    """Everything that `ntt_step` needs and returns: a PyTree of arrays with static settings.

    `with_mask` sets another mask and rebuilds everything that is derived from it. If the student's
    mask is replaced in another way, the next step detects it and uses the current mask, or its
    kernel is NaN if the mask cannot be stored.

    Attributes:
        teacher: the dense model, fixed.
        student: the sparse model to fit, which keeps its dense weights under the mask.
        opt_state: the optimiser's state for the student's floating-point leaves.
        step: number of steps done, int32.
        key: two words, from which every step derives its own PRNG key.
        support: a `MaskIndex` for each layer that keeps a fixed number of weights. They make the
            kernel faster. Each step compares them with its own mask, and finds them anew where a
            refresh or a user has changed that.
        method: the loss, the sparsity, the refresh and the optimiser.
        entries: the kept weights of large layers with few of them, which a step evaluates on these
            alone. Each step compares them with its own mask, as `support`.
    """

    teacher: Any
    student: SparseModel
    opt_state: Any
    step: Int[Array, ""]
    key: UInt32[Array, "2"]
    support: Any
    method: NeuralTangentTransfer
    entries: dict[str, KeptEntries]

    def with_mask(self, mask: MaskTree) -> "NTTState":
        """The state with another mask, and everything that is derived from it.

        A mask that fits the method's sparsity leaves the method unchanged. With any other mask,
        refreshes keep the counts of its layers, as after `ntt_init(..., mask=...)`; inside `jit`,
        where counts are unknown, such a mask is an error at run time.

        Raises:
            ValueError: the mask does not fit the student, or the refreshes cannot keep it.
        """
        student = self.student.with_mask(mask)
        method, mask = hold_mask("with_mask", self.method, mask, self.step)
        student = student.with_mask(mask)
        entries = entries_for(method, student.model, mask)
        support = support_for(method, mask, entries)
        if is_traced(mask):
            support = stored(index_masks(mask, self.support))
            entries, _ = current_entries(student.model, mask, self.entries)
        return dataclasses.replace(
            self, student=student, support=support, method=method, entries=entries
        )

    def on_kept_weights(self, where: Callable[[str, eqx.Module], bool] | None = None) -> "NTTState":
        """The state with a student that stores kept weights alone, for a transfer under one mask.

        Steps give what they give without, to rounding, and neither weights nor moments under the
        mask are stored any more. `ntt.masked_layers(state.student)` brings the masked form back.

        **Arguments:**

        - `where`: which layers; see `sparse_layers`.

        **Returns:**

        The state whose student is `sparse_layers(student, where)`, and whose optimiser has the
        moments of kept weights.

        **Raises:**

        `ValueError` if the method refreshes the mask, for which it needs all weights, and inside
        `jit`.
        """
        if self.method.refreshes:
            raise ValueError(
                "on_kept_weights: the method refreshes the mask, for which it needs all weights; "
                "a transfer under one mask has NoRefresh(), or mask_every=None."
            )
        student = sparse_layers(self.student, where)
        chosen = kept_layers(student.model)
        params, static = partition_parameters(self.student)
        like_params = lambda node: jax.tree.structure(node) == jax.tree.structure(params)

        def one(node: Any) -> Any:  # moments, in a tree like that of the parameters
            if not like_params(node):
                return node
            moments = sparse_layers(eqx.combine(node, static), lambda path, _: path in chosen)
            return parameters(moments)

        opt_state = jax.tree.map(one, self.opt_state, is_leaf=like_params)
        entries = entries_for(self.method, student.model, student.mask)
        return dataclasses.replace(
            self,
            student=student,
            opt_state=opt_state,
            support=support_for(self.method, student.mask, entries),
            entries=entries,
        )

    @property
    def evaluated(self) -> SparseModel:
        """The student as a step evaluates it, on kept weights alone in layers with `entries`.

        `explain(state.evaluated, x)` says what the kernel of a step does and costs.
        """
        if not self.entries:
            return self.student
        entries, room = current_entries(self.student.model, self.student.mask, self.entries)
        return on_entries(self.student, entries, room)

    def step_info(self, support: Any = None) -> StepInfo:
        """Number, key and density of the next step, for its loss; `support` if it was checked."""
        key = step_key(self.key, self.step)
        density = self.method.sparsity.at(self.step)
        if isinstance(density, Mapping):  # by layer
            # A program may divide by multiplication: to float32 that is not the same quotient for
            # each form of a student, and the loss of a model in float64 would tell them apart.
            kept, size = kept_of(self.student)
            density = kept.astype(jax.dtypes.canonicalize_dtype(float)) / size
        return StepInfo(self.step, key, density, self.support if support is None else support)


def check_state(caller: str, state: Any) -> None:
    """Raise `ValueError` unless `state` is one of a transfer."""
    if not isinstance(state, NTTState):
        raise ValueError(
            f"{caller}: the state must be an NTTState, as ntt_init makes one, got "
            f"{type(state).__name__}."
        )


def entries_for(
    method: NeuralTangentTransfer, model: PyTree, mask: MaskTree
) -> dict[str, KeptEntries]:
    """The entries of the layers that a step evaluates on kept weights alone, by key strings.

    On one CPU, for the library's own loss, whose value depends on the student's function and its
    active kernel alone; the layers keep a fixed number of weights that are in no shared pattern.
    """
    loss, pattern = method.loss, method.sparsity.pattern
    if not isinstance(loss, KernelMatching) or loss.metric is not None:
        return {}
    if (loss.kernel, loss.implementation) != ("active", "factors"):
        return {}
    if target_device().platform != "cpu" or layout_in_use() is not None:
        return {}
    if is_traced(mask) or isinstance(model, StatefulModel):
        return {}

    def chosen(mask: Any) -> bool:
        shared = pattern.alike_outputs(mask.shape) > 1
        return not shared and method.keeps_count(mask.shape) and pays_in_a_transfer(mask)

    return kept_entries(model, mask, lambda _, mask: chosen(mask))


def support_for(
    method: NeuralTangentTransfer, mask: MaskTree, entries: dict[str, KeptEntries]
) -> Any:
    """The support of a concrete mask, where it makes the loss faster and its layers keep counts.

    A loss whose `kernel` is "ambient" does not look at a mask's entries; layers with `entries` need
    no other index.
    """
    if is_traced(mask) or getattr(method.loss, "kernel", "active") == "ambient":
        return jax.tree.map(lambda _: None, mask)
    pattern = method.sparsity.pattern

    def wanted(path: Any, m: Any) -> bool:
        return method.keeps_count(m.shape) and jtu.keystr(path[:-1]) not in entries

    kept = jtu.tree_map_with_path(lambda path, m: m if wanted(path, m) else None, mask)
    row_blocks = lambda m: pattern.alike_outputs(m.shape)
    return stored(index_concrete(kept, kernel_spec().costs, row_blocks=row_blocks))


def check_room(caller: str, state: NTTState) -> None:
    """Raise `ValueError` when a mask was put into `state` for which its support has no room.

    It looks at values: to be called once a run, outside of `jit`, where the kernel is NaN instead.
    """

    def one(mask: Any, known: Any) -> None:
        if not has_room(mask, known):
            raise ValueError(_NO_ROOM.format(caller))

    student = state.student
    jax.tree.map(one, student.mask, state.support, is_leaf=is_index)
    if not entries_have_room(student.model, student.mask, state.entries):
        raise ValueError(_NO_ROOM.format(caller))
