"""`compact`: a sparse model without what cannot matter."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from .._batch import as_array
from .._checks import check_batch, check_finite
from .._kept import check_masked_form
from .._sparse import SparseModel
from ._axes import Units
from ._constants import Constants
from ._flow import UnitFlow, flow_backwards, flow_forwards
from ._layers import with_sizes
from ._traced import TracedModel, flat, trace

_TOLERANCE = {8: 1e-12, 4: 1e-5, 2: 3e-2}  # by the bytes of an output, times its largest entry


@dataclasses.dataclass(frozen=True)
class CompactedArray:
    """An array of a model before and after.

    Attributes:
        name: its path.
        shape: its shape before.
        compact_shape: its shape after.
        kept: entries that the mask keeps; all where there is none.
        compact_kept: the same of the smaller array.
    """

    name: str
    shape: tuple[int, ...]
    compact_shape: tuple[int, ...]
    kept: int
    compact_kept: int

    @property
    def size(self) -> int:
        """Entries before."""
        return int(np.prod(self.shape, dtype=int))

    @property
    def compact_size(self) -> int:
        """Entries after."""
        return int(np.prod(self.compact_shape, dtype=int))


@dataclasses.dataclass(frozen=True)
class Compacted:
    """A smaller model of the same function; `print` it for a table.

    Attributes:
        model: the `SparseModel`, of the same classes, with the masks of what is left.
        arrays: one entry for each parameter, in the model's order.
        stayed: a sentence for each weight with empty rows or columns that could not go.
        difference: largest difference of an output from that of the model given, on the samples.
        indices: for each leaf of the model the indices that stay along each axis, `None` where
            all do.
        folded: whether constants other than zero went into biases of `model`.
    """

    model: SparseModel
    arrays: tuple[CompactedArray, ...]
    stayed: tuple[str, ...]
    difference: float
    indices: tuple[tuple[np.ndarray, ...] | None, ...]
    folded: bool

    def take(self, sparse: SparseModel) -> SparseModel:
        """The same part of another model, such as the same one under a mask of fewer weights.

        **Arguments:**

        - `sparse`: a model with arrays of the shapes that the compacted one had before.

        **Raises:**

        `ValueError` for a model of other arrays, and where constants went into biases of `model`:
        those of another model are not known.
        """
        self._check_parts("take")
        return _cut(sparse, self.indices, "Compacted.take")

    def expand(self, small: SparseModel, whole: SparseModel) -> SparseModel:
        """`whole` with the arrays of `small`, trained or not, where its indices stay.

        It is the inverse of `take`.

        **Arguments:**

        - `small`: a model like `model`.
        - `whole`: one like that which was compacted; the rest of its arrays and masks stays.

        **Raises:**

        `ValueError` for models of other arrays, and where constants went into biases of `model`: in
        `whole` they would count twice.
        """
        self._check_parts("expand")
        same = [
            (old.shape, old.dtype) == (new.shape, new.dtype)
            for old, new in zip(*map(_arrays, (self.take(whole), small)), strict=False)
        ]
        if len(same) != len(_arrays(small)) or not all(same):
            raise ValueError("Compacted.expand: `small` has other arrays than the compacted model.")
        (named, treedef), found = flat(whole.model), flat(small.model)[0]
        leaves, masks = [leaf for _, leaf in named], list(whole.masks)
        for n, (index, (_, leaf)) in enumerate(zip(self.indices, found, strict=True)):
            if index is None:
                leaves[n], masks[n] = leaf, small.masks[n]
                continue
            leaves[n] = _put(leaves[n], index, leaf)
            if masks[n] is not None:
                masks[n] = _put(masks[n], index, small.masks[n])
        return SparseModel(treedef.unflatten(leaves), treedef.unflatten(masks))

    def _check_parts(self, name: str) -> None:
        if self.folded:
            raise ValueError(
                f"Compacted.{name}: the model has constants of units that left in its biases, so "
                "that it is no part of the one before; compact a mask that keeps nothing which "
                "reads such units, as one of few channels does."
            )

    @property
    def parameters(self) -> int:
        """Entries of all parameters before."""
        return sum(array.size for array in self.arrays)

    @property
    def compact_parameters(self) -> int:
        """Entries of all parameters after."""
        return sum(array.compact_size for array in self.arrays)

    def __str__(self) -> str:
        """A table with one line a parameter, and what stayed."""
        dims = lambda shape: "x".join(map(str, shape)) or "scalar"
        rows = [
            (a.name, dims(a.shape), dims(a.compact_shape), f"{a.kept:,}", f"{a.compact_kept:,}")
            for a in self.arrays
        ]
        table = [("parameter", "shape", "compact", "kept", "kept after"), *rows]
        widths = [max(len(row[n]) for row in table) for n in range(5)]
        lines = [
            "  ".join(
                cell.ljust(w) if n < 3 else cell.rjust(w)
                for n, (cell, w) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in table
        ]
        total = f"{self.parameters:,} parameters before, {self.compact_parameters:,} after"
        return "\n".join([*lines, total, *self.stayed])


def compact(sparse: SparseModel, x: Shaped[Array | np.ndarray, "n ..."]) -> Compacted:
    """A smaller model of the same function: all that cannot matter is left out.

    Units (features, channels) that no path of kept weights leads to are constant; what they add to
    the next layer goes into its bias. Units from which no path leads to an output are not needed.
    Both go, with all that makes or reads them, wherever in the program that the model is: through
    residual sums, concatenation, flattening, pooling, batch norm in inference mode and depthwise
    convolutions. Inputs and outputs stay as they are.

    Units stay where the program does something with their axis that depends on all of them or on
    their number: a mean or a softmax over them, a reshape that splits them (heads, group
    normalisation), groups of a convolution. So do constants other than zero before a padded
    convolution or a layer without a bias. `stayed` says which and why.

    **Arguments:**

    - `sparse`: a `SparseModel` of any Equinox model of one sample; it is looked at in inference
      mode, and comes back in the modes that it has.
    - `x`: inputs `[n, ...]` on which both models are compared; a few are enough.

    **Returns:**

    A `Compacted`, whose `model` has the dtypes of `sparse` and masks wherever that had some.

    **Raises:**

    `ValueError` for what is no `SparseModel`, inputs that do not suit it, outputs that are NaN or
    infinite, a model that cannot be called once it is smaller, and outputs that differ by more than
    rounding: 1e-12 of the largest (or of 1, if that is more) in float64, 1e-5 in float32, 3e-2 in
    16 bits.
    """
    x = _given("compact", sparse, x)
    traced = trace("compact", sparse, x)
    flow = flow_forwards(traced)
    want = np.asarray(_outputs(sparse, x))
    check_finite("compact", "an output of the model under its mask", want)
    scale = max(1.0, float(np.abs(want).max(initial=0.0)))
    refusal: Exception | None = None
    for fragile in (False, True):
        units = Units(traced, fragile)
        removed, obstacles = _removed(traced, flow, units)
        indices = _indices(sparse, traced, units, removed)
        deltas = _folded(traced, flow, units, removed)
        model = _cut(_with_biases(sparse, deltas), indices, "compact")
        try:
            got = np.asarray(_outputs(model, x))
            if got.shape != want.shape:
                raise ValueError(f"its outputs have shape {got.shape[1:]}.")
        except Exception as error:  # the model may hold sizes that nobody knows of
            refusal = error
            continue
        difference = float(np.abs(got - want).max(initial=0.0))
        if difference <= _TOLERANCE[want.dtype.itemsize] * scale:
            arrays = _compared(sparse, model, traced)
            stayed = _stayed(traced, units, removed, obstacles)
            folded = any(delta.any() for delta in deltas.values())
            return Compacted(model, arrays, stayed, difference, indices, folded)
        refusal = ValueError(f"its outputs differ by up to {difference:.3g}.")
    name = type(sparse.model).__name__
    raise ValueError(
        f"compact: {name} is another function once it is smaller: {refusal} A model whose "
        "operations depend on the number of its units (a scale, a fixed shape) must take it from "
        "the shapes of its arrays only where that number does not change."
    ) from refusal


def _given(caller: str, sparse: Any, x: Any) -> Array:
    if not isinstance(sparse, SparseModel):
        raise ValueError(
            f"{caller}: needs a SparseModel, got {type(sparse).__name__}; "
            "ntt.SparseModel(model, mask) pairs a model with its mask."
        )
    check_masked_form(caller, sparse)
    check_batch(f"{caller}: x", x := as_array(caller, "x", x))
    return x


@eqx.filter_jit
def _outputs(sparse: SparseModel, x: Array) -> Array:
    return jax.vmap(eqx.nn.inference_mode(sparse))(x)


def _removed(
    traced: TracedModel, flow: UnitFlow, units: Units
) -> tuple[np.ndarray, dict[int, str]]:
    """Which units can go, by their root, and for constants that cannot, why."""
    constants = Constants(traced, flow)
    obstacles: dict[int, str] = {}
    while True:
        roots = {slot: [units.root(axis) for axis in axes] for slot, axes in units.labels.items()}
        pinned = np.isin(np.arange(len(units.parent)), list(units.reasons))
        removed = np.zeros(len(units.parent), bool)
        while True:
            met, matters, found = _matters(traced, flow, units, constants, roots, removed)
            now = met & ~matters & ~pinned
            if np.array_equal(now, removed):
                break
            removed = now
        obstacles.update(found)
        empty = [
            axis for axes in roots.values() for axis in axes if len(axis) and removed[axis].all()
        ]
        if not empty:
            return removed, obstacles
        for axis in empty:
            units.pin(axis[:1], "there is no other left")


def _matters(
    traced: TracedModel,
    flow: UnitFlow,
    units: Units,
    constants: Constants,
    roots: dict[int, list[np.ndarray]],
    removed: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
    """Which units are summed over somewhere, and for which of them a term of a sum matters."""

    def cut(slot: int, needed: np.ndarray) -> np.ndarray:
        if not removed.any():
            return needed
        needed = needed.copy()
        for n, axis in enumerate(roots[slot]):
            gone = removed[axis]
            if gone.any():
                needed[(slice(None),) * n + (gone,)] = False
        return needed

    needs = flow_backwards(traced, flow, cut)
    met, matters = np.zeros(len(removed), bool), np.zeros(len(removed), bool)
    obstacles: dict[int, str] = {}
    for meeting in units.meetings:
        step = traced.program.steps[meeting.step]
        varies, nonzero = flow.of(step)
        axis = units.root(meeting.units)
        met[axis] = True
        terms, moving = [], []
        for n in (0, 1):
            needed = needs.operands[meeting.step, n]
            terms.append(_any_along(needed & nonzero[n], meeting.axes[n]))
            moving.append(_any_along(needed & varies[n], meeting.axes[n]))
        some, vary = terms[0] & terms[1], moving[0] | moving[1]
        matters[axis[some & vary]] = True
        for index in np.flatnonzero(some & ~vary).tolist():
            if matters[axis[index]]:
                continue
            obstacle = constants.obstacle(meeting, index)
            if obstacle is not None:
                matters[axis[index]] = True
                obstacles[int(axis[index])] = obstacle
    return met, matters, obstacles


def _any_along(array: np.ndarray, axis: int) -> np.ndarray:
    """For each index of an axis, whether any entry there is set."""
    return np.asarray(array.any(axis=tuple(n for n in range(array.ndim) if n != axis)))


def _indices(
    sparse: SparseModel, traced: TracedModel, units: Units, removed: np.ndarray
) -> tuple[tuple[np.ndarray, ...] | None, ...]:
    """The indices of each leaf that stay without these units, `None` where all do."""
    named, _ = flat(sparse.model)
    found: list[tuple[np.ndarray, ...] | None] = [None] * len(named)
    for slot, n in enumerate(n for n, (_, leaf) in enumerate(named) if eqx.is_array(leaf)):
        kept = [~removed[units.root(axis)] for axis in units.labels[slot]]
        if not all(axis.all() for axis in kept):
            found[n] = tuple(np.flatnonzero(axis) for axis in kept)
    return tuple(found)


def _with_biases(sparse: SparseModel, deltas: dict[int, np.ndarray]) -> SparseModel:
    """The model with sums added to biases, by their slot."""
    named, treedef = flat(sparse.model)
    leaves = [leaf for _, leaf in named]
    held = [n for n, leaf in enumerate(leaves) if eqx.is_array(leaf)]
    for slot, delta in deltas.items():
        leaf = leaves[held[slot]]
        wide = np.asarray(leaf).astype(delta.dtype) + delta
        leaves[held[slot]] = jnp.asarray(wide.astype(leaf.dtype))
    return SparseModel(treedef.unflatten(leaves), sparse.mask)


def _cut(
    sparse: SparseModel, indices: tuple[tuple[np.ndarray, ...] | None, ...], caller: str
) -> SparseModel:
    """The model with these indices of its leaves alone."""
    named, treedef = flat(sparse.model)
    leaves, masks = [leaf for _, leaf in named], list(sparse.masks)
    if len(leaves) != len(indices):
        raise ValueError(f"{caller}: the model has other arrays than the compacted one.")
    for n, index in enumerate(indices):
        if index is None:
            continue
        shape = np.shape(leaves[n])
        if len(shape) != len(index) or any(
            i.max(initial=0) >= size for i, size in zip(index, shape, strict=True)
        ):
            raise ValueError(f"{caller}: the model has other arrays than the compacted one.")
        leaves[n] = jnp.asarray(np.asarray(leaves[n])[np.ix_(*index)])
        if masks[n] is not None:
            masks[n] = jnp.asarray(np.asarray(masks[n])[np.ix_(*index)])
    model = with_sizes(treedef.unflatten(leaves))
    return SparseModel(model, flat(model)[1].unflatten(masks))


def _arrays(sparse: SparseModel) -> list[Any]:
    return [leaf for leaf in jax.tree.leaves(sparse.model) if eqx.is_array(leaf)]


def _put(array: Array, index: tuple[np.ndarray, ...], values: Any) -> Array:
    found = np.array(array)
    found[np.ix_(*index)] = np.asarray(values)
    return jnp.asarray(found)


def _folded(
    traced: TracedModel, flow: UnitFlow, units: Units, removed: np.ndarray
) -> dict[int, np.ndarray]:
    """The sums that removed constants add to biases, by the slot of the bias."""
    constants = Constants(traced, flow)
    deltas: dict[int, np.ndarray] = {}
    for meeting in units.meetings:
        gone = np.flatnonzero(removed[units.root(meeting.units)])
        side = constants.signal(meeting)
        if not len(gone) or side is None:
            continue
        step = traced.program.steps[meeting.step]
        varies, _ = flow.of(step)
        gone = gone[~_any_along(varies[side], meeting.axes[side])[gone]]
        gone = np.array([i for i in gone if constants.obstacle(meeting, int(i)) is None], int)
        bias = constants.bias(meeting) if len(gone) else None
        if bias is not None:
            shape = traced.values[bias.leaf].shape
            delta = constants.brought(meeting, bias, gone).reshape(shape)
            deltas[bias.leaf] = deltas[bias.leaf] + delta if bias.leaf in deltas else delta
    return deltas


def _compared(
    sparse: SparseModel, model: SparseModel, traced: TracedModel
) -> tuple[CompactedArray, ...]:
    before, after = (
        [
            (leaf, mask)
            for (_, leaf), mask in zip(flat(m.model)[0], m.masks, strict=True)
            if eqx.is_array(leaf)
        ]
        for m in (sparse, model)
    )
    kept = lambda leaf, mask: leaf.size if mask is None else int(np.asarray(mask).sum())
    return tuple(
        CompactedArray(name, old[0].shape, new[0].shape, kept(*old), kept(*new))
        for name, mark, old, new in zip(traced.names, traced.marks, before, after, strict=True)
        if mark
    )


def _stayed(
    traced: TracedModel, units: Units, removed: np.ndarray, obstacles: dict[int, str]
) -> tuple[str, ...]:
    """A sentence for the empty rows and columns of each weight that stayed, by reason."""
    counts: dict[tuple[str, str, str], int] = {}
    for slot, (name, mask) in enumerate(zip(traced.names, traced.masks, strict=True)):
        for axis, kind in ((0, "rows"), (1, "columns")):
            if mask is None or mask.ndim <= axis:
                continue
            slices = np.moveaxis(mask, axis, 0).reshape(mask.shape[axis], -1)
            for root in units.root(units.labels[slot][axis])[~slices.any(axis=1)].tolist():
                reason = units.reasons.get(root) or obstacles.get(root)
                if removed[root] or reason is None or reason.startswith("they are the model's"):
                    continue
                counts[name, kind, reason] = counts.get((name, kind, reason), 0) + 1
    return tuple(
        f"{name}: {count} empty {kind} stay: {reason}."
        for (name, kind, reason), count in counts.items()
    )
