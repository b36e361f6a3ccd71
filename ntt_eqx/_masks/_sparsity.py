"""`Sparsity`: how many weights are kept, where, and in which pattern."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Int

from .._checks import asked_for_values, check_count
from .._sparse import count_kept_in_all
from .._types import MaskTree, PyTree, ScoreTree, at_trace_time
from ._allocation import Allocation, Density, check_density
from ._collapse import check_collapse, is_traced
from ._make import build_mask, lost, ranked
from ._pattern import AbstractPattern, Unstructured

Schedule: TypeAlias = Callable[[Any], Any]
"""The density after a number of steps: `step -> density`, as optax writes schedules."""

_FAR = 2**30  # steps that no run takes


class Sparsity(eqx.Module):
    """How many weights are kept, where, and in which pattern: one description for every mask.

    `make_mask`, `prune`, the first mask of a transfer and all of its refreshes use it.

    Attributes:
        density: share of prunable weights to keep, in `(0, 1]`; or, with `scope="layer"`, a mapping
            from the path of every layer to its own; or a schedule `step -> density`, such as
            `GradualDensity`, where `step` is the number of steps done. With a schedule every layer
            keeps at least one weight.
        scope: `"layer"` keeps the density in every layer, `"global"` in all of them together.
        allocation: with `scope="layer"`, how one density is distributed: `"uniform"` (the default)
            or `"erk"`; see `allocate`.
        pattern: which weights are kept or dropped together: `Unstructured` (each by itself, the
            default, also given as `None`), `NM`, `Block`, `Channels`, `CoupledChannels`,
            `ConstantFanIn`, `FewChannels`, or an `AbstractLayerPattern` of your own.
    """

    density: Any = eqx.field(static=True)
    scope: Literal["layer", "global"] = eqx.field(static=True)
    allocation: Allocation | None = eqx.field(static=True)
    pattern: AbstractPattern

    def __init__(
        self,
        density: Density | Schedule,
        scope: Literal["layer", "global"] = "layer",
        allocation: Allocation | None = None,
        pattern: AbstractPattern | None = None,
    ):
        """Check and store the arguments.

        Raises:
            ValueError: a value is outside its range, or two contradict each other.
        """
        given: Any = density
        if isinstance(given, Mapping):
            given = LayerDensities(given)
        elif callable(given):
            check_count("Sparsity: the schedule's end", getattr(given, "end", None), 0, none=True)
        else:
            given = check_density(density, "Sparsity")
        if scope not in ("layer", "global"):
            raise ValueError(f"Sparsity: scope must be 'layer' or 'global', got {scope!r}.")
        if allocation not in (None, "uniform", "erk"):
            raise ValueError(
                f"Sparsity: allocation must be 'uniform' or 'erk', got {allocation!r}."
            )
        if scope == "global" and (isinstance(given, Mapping) or allocation is not None):
            raise ValueError(
                "Sparsity: scope='global' takes one density and no allocation; these set the "
                "densities of layers, which only scope='layer' keeps."
            )
        if not isinstance(pattern, AbstractPattern | None):
            raise ValueError(f"Sparsity: pattern must be an AbstractPattern, got {pattern!r}.")
        self.density = given
        self.scope = scope
        self.allocation = allocation
        self.pattern = Unstructured() if pattern is None else pattern

    def at(self, step: Int[Array, ""] | int = 0) -> Any:
        """The density, or densities by layer, after `step` steps; an array inside `jit`.

        Raises:
            ValueError: the schedule's value is known and not in (0, 1].
        """
        if not callable(self.density):
            return self.density
        if isinstance(step, Tracer):
            asked = asked_for_values("Sparsity: the schedule asks for the value of its step")
            with asked, jax.numpy_dtype_promotion("standard"):  # as optax's own schedules need
                return jnp.asarray(self.density(step), jnp.float32)
        with at_trace_time(), jax.numpy_dtype_promotion("standard"):
            return check_density(self.density(step), f"Sparsity: the schedule at step {step}")

    @property
    def end(self) -> int | None:
        """The step at which a schedule says that it ends, as `GradualDensity` does."""
        end: Any = getattr(self.density, "end", None) if callable(self.density) else None
        return None if end is None else int(end)

    def overall(self, mask: MaskTree, step: Int[Array, ""] | int = 0) -> Any:
        """The density of the whole network after `step` steps.

        The requested density; with per-layer densities, the density of `mask`.
        """
        density = self.at(step)
        if not isinstance(density, Mapping):
            return density
        leaves = jax.tree.leaves(mask)
        return count_kept_in_all(leaves).astype(jnp.float32) / sum(m.size for m in leaves)

    def mask(self, scores: ScoreTree, step: Int[Array, ""] | int = 0) -> MaskTree:
        """The mask of the highest `scores` after `step` steps.

        Raises:
            ValueError: as `make_mask` does.
        """
        mask = self.quiet_mask(scores, step)
        if self.scope == "global" and not is_traced(mask):
            check_collapse(mask, caller="make_mask")
        return mask

    def quiet_mask(self, scores: ScoreTree, step: Int[Array, ""] | int = 0) -> MaskTree:
        """`mask` without the warning about layers that are left empty."""
        return self.mask_or_lost(scores, step)[0]

    def mask_or_lost(
        self, scores: ScoreTree, step: Int[Array, ""] | int = 0
    ) -> tuple[MaskTree, Bool[Array | np.ndarray, ""]]:
        """`quiet_mask`, and inside `jit` whether it is `lost`."""
        return build_mask(
            scores,
            self.at(step),
            scope=self.scope,
            allocation=self.allocation,
            pattern=self.pattern,
            scheduled=callable(self.density),
        )

    def pooled_layer(self, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
        """A layer of which the pattern ranks means of scores, `None` if single weights compete."""
        spared = self.pattern.spared(shapes)
        found = (n for n, s in shapes.items() if n not in spared and self.pattern.averages(s))
        return next(found, None)

    def widest(self, mask: MaskTree) -> MaskTree:
        """The mask of all weights that the pattern lets a model with this `mask` keep."""
        layers = {jtu.keystr(path): leaf for path, leaf in jtu.tree_leaves_with_path(mask)}
        marks = jax.tree.map(jnp.ones_like, self.pattern.marks_of(layers))
        found = self.pattern.masks(marks, {name: leaf.shape for name, leaf in layers.items()})
        return jax.tree.unflatten(jax.tree.structure(mask), [found[name] for name in layers])

    def check_end(self, mask: MaskTree, last: int | None = None) -> None:
        """Check that the masks which a schedule ends with can be made, without computing them.

        They are those at its `end`, without one at the `last` step, or where it comes to rest.

        Raises:
            ValueError: as `make_mask` does, for a model with this `mask`.
        """
        if not callable(self.density):
            return
        step = last if self.end is None else self.end
        density = self.resting() if step is None else self.at(step)
        if density is not None:
            final = Sparsity(density, self.scope, self.allocation, self.pattern)
            shape = lambda m: jax.ShapeDtypeStruct(m.shape, jnp.float32)
            jax.eval_shape(final.quiet_mask, jax.tree.map(shape, mask))

    def resting(self) -> float | None:
        """The density at which a schedule comes to rest, `None` where it does not, or is none."""
        try:
            density, before = self.at(_FAR), self.at(_FAR // 2)
        except Exception:  # a schedule may raise anything at a step that no run reaches
            return None
        return density if callable(self.density) and density == before else None

    def holds(self, mask: MaskTree, step: Int[Array, ""] | int = 0) -> Bool[Array, ""]:
        """Whether `mask` is one that this sparsity makes: its counts and its pattern.

        Of such a mask, taken as scores, the highest are the mask itself.
        """
        again, decided = ranked(
            _as_scores(mask),
            self.at(step),
            scope=self.scope,
            allocation=self.allocation,
            pattern=self.pattern,
            scheduled=callable(self.density),
        )
        same = jax.tree.map(lambda a, b: jnp.all(a == b), again, mask)
        return jnp.stack(jax.tree.leaves(same)).all() & decided

    def lost(self, mask: MaskTree) -> Bool[Array, ""]:
        """Whether `mask` was made inside `jit` of scores that cannot rank the weights."""
        return lost(mask, self.scope)

    def of_mask(self, mask: MaskTree) -> "Sparsity":
        """The sparsity that keeps every layer's counts under a concrete `mask`, in its pattern.

        Raises:
            ValueError: a layer is empty, or the mask does not have the pattern.
        """
        layers = {jtu.keystr(path): leaf for path, leaf in jtu.tree_leaves_with_path(mask)}
        for name, leaf in layers.items():
            if not bool(leaf.any()):
                raise ValueError(
                    f"Sparsity: the given mask keeps no weight of layer {name}; a mask of which a "
                    "layer is empty can be kept as it is (no refresh) or held to scope='global'."
                )
        shapes = {name: tuple(leaf.shape) for name, leaf in layers.items()}
        marks = self.pattern.marks_of(layers)
        again = self.pattern.masks(marks, shapes)
        for name, leaf in layers.items():
            if not bool(jnp.all(again[name] == leaf)):
                raise ValueError(
                    f"Sparsity: in layer {name} the given mask does not have the pattern "
                    f"{self.pattern}; make it with the same `pattern`, or leave that out."
                )
        rooms = {pool: kept.size for pool, kept in marks.items()}
        totals = self.pattern.totals(shapes, rooms)
        densities = {pool: int(kept.sum()) / totals[pool] for pool, kept in marks.items()}
        return Sparsity(densities, "layer", None, self.pattern)


class GradualDensity(eqx.Module):
    """The density of gradual pruning after a number of steps (Zhu & Gupta, 2017, arXiv 1710.01878).

        d_t = d_final + (d_initial - d_final) (1 - (t - begin) / (end - begin))³

    within `[begin, end]`, `initial` before and `final` after it.

    Attributes:
        final: the density in the end.
        end: the step at which it is reached.
        initial: the density at the start.
        begin: the step until which it stays.
    """

    final: float = eqx.field(static=True)
    end: int = eqx.field(static=True)
    initial: float = eqx.field(static=True, default=1.0)
    begin: int = eqx.field(static=True, default=0)

    def __check_init__(self) -> None:
        """Reject densities outside of (0, 1], and steps that are no rising integers."""
        check_density(self.final, "GradualDensity: final")
        check_density(self.initial, "GradualDensity: initial")
        check_count("GradualDensity: end", self.end)
        check_count("GradualDensity: begin", self.begin, 0)
        if not 0 <= self.begin < self.end:
            raise ValueError(
                f"GradualDensity: needs 0 <= begin < end, got begin={self.begin}, end={self.end}."
            )

    def __call__(self, step: Int[Array, ""] | int) -> Any:
        """The density after `step` steps."""
        share = (jnp.asarray(step, jnp.float32) - self.begin) / (self.end - self.begin)
        left = (1.0 - jnp.clip(share, 0.0, 1.0)) ** 3
        return self.final + (self.initial - self.final) * left


class LayerDensities(Mapping):
    """Densities by layer that cannot change, so that settings which hold them can be compared."""

    def __init__(self, densities: Mapping[str, float | int], caller: str = "Sparsity"):
        """Keep the items of `densities`.

        Raises:
            ValueError: there are none, or one is not in `(0, 1]`.
        """
        if not densities:
            raise ValueError(f"{caller}: density is an empty mapping; give one for every layer.")
        self._items = {
            str(name): check_density(share, f"{caller}: {name}")
            for name, share in densities.items()
        }

    def __getitem__(self, name: str) -> float:
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(frozenset(self._items.items()))

    def __repr__(self) -> str:
        return repr(self._items)


def looks_like(mask: MaskTree) -> str | None:
    """The pattern that a concrete mask seems to have: `"2:4"`, `"filters"`, ..., or `None`.

    All layers but those that are dense must show it, in groups enough that it is no accident.
    """
    leaves = [m for m in jax.device_get(jax.tree.leaves(mask)) if not m.all()]
    if not leaves or any(m.ndim < 2 for m in leaves):
        return None
    for axis, name in ((0, "filters"), (1, "inputs")):
        along = [m.all(axis=tuple(a for a in range(m.ndim) if a != axis)) for m in leaves]
        some = [m.any(axis=tuple(a for a in range(m.ndim) if a != axis)) for m in leaves]
        wide = all(m.size // m.shape[axis] >= 4 for m in leaves)
        if wide and all((a == s).all() and s.any() for a, s in zip(along, some, strict=True)):
            return name
    if all(map(_keeps_channels, leaves)):
        return "coupled channels"
    for size in (4, 2, 8, 16):
        if any(m.shape[1] % size for m in leaves):
            continue
        split = [m.swapaxes(1, -1).reshape(-1, size).sum(axis=1) for m in leaves]
        kept = {int(n) for counts in split for n in (counts.min(), counts.max())}
        if len(kept) == 1 and 0 < min(kept) < size and sum(map(len, split)) >= 16:
            return f"{min(kept)}:{size}"
    for size in (8, 4, 2):
        if any(m.shape[0] % size or m.shape[1] % size for m in leaves):
            continue
        tiles = [m.reshape(m.shape[0] // size, size, m.shape[1] // size, size, -1) for m in leaves]
        constant = all((t.all(axis=(1, 3, 4)) == t.any(axis=(1, 3, 4))).all() for t in tiles)
        if constant and sum(math.prod((t.shape[0], t.shape[2])) for t in tiles) >= 4:
            return f"blocks of {size}x{size}"
    return None


def _keeps_channels(mask: np.ndarray) -> bool:
    """Whether the mask keeps all that lies in some outputs and some inputs, and nothing else."""
    flat = mask.reshape(*mask.shape[:2], -1)
    some, rows, columns = flat.any(axis=2), flat.any(axis=(1, 2)), flat.any(axis=(0, 2))
    whole = bool((flat.all(axis=2) == some).all() and (some == np.outer(rows, columns)).all())
    return whole and bool(rows.any() and columns.any()) and some.size >= 16


def _as_scores(mask: PyTree) -> PyTree:
    return jax.tree.map(lambda m: m.astype(jnp.float32), mask)
