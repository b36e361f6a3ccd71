"""Why a loss is not finite: the batch, the weights before the step, the model, or the optimiser."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float

from ._batch import pair
from ._checks import are_finite, is_finite
from ._distribute import left_to_xla
from ._kept import kept_layers
from ._parameters import parameters
from ._prunable import marks_of
from ._sparse import SparseModel
from ._types import GradientTransformation, PyTree, squared_norm

_LARGE = 1e6  # an entry of a standardised batch is nowhere near
_GROWN = 10.0  # times the norm at the start of the run: steps that are too long


@dataclasses.dataclass(frozen=True)
class Evidence:
    """A step's batch and weight norms, kept for diagnosis up to 1,000 steps later.

    Attributes:
        batch: the step's batch.
        weights: `weight_norms` before the step, if the step computes them.
    """

    batch: Any
    weights: Float[Array, " leaves"] | None = None


def weight_norms(model: PyTree, *, masked: bool = False) -> Float[Array, " leaves"]:
    """`|w|^2` of each prunable weight as the model sees it, and of all other parameters together.

    To be called in a jitted step, whose L2 term has the sums over prunable weights anyway; the
    others are few numbers, and one sum of them costs what a single bias costs.

    **Arguments:**

    - `masked`: the model has zeros under its mask already.
    """
    return left_to_xla(functools.partial(_sums_of_squares, masked), model)


def _sums_of_squares(masked: bool, model: PyTree) -> Float[Array, " leaves"]:
    weights, others = _told_apart(model, masked)
    norms = [squared_norm(leaf).astype(jnp.float32) for _, leaf in weights]
    if others:
        flat = [jnp.abs(leaf).astype(jnp.float32).reshape(-1) for _, leaf in others]
        norms.append(jnp.sum(jnp.square(jnp.concatenate(flat))))
    return jnp.stack(norms) if norms else jnp.zeros(0, jnp.float32)


def _told_apart(
    model: PyTree, masked: bool = False
) -> tuple[list[tuple[str, Array]], list[tuple[str, Array]]]:
    """The (possibly) prunable weights and all other parameters, by name."""
    seen, marks = model, None
    if isinstance(model, SparseModel):
        seen = model.model if masked else model.to_dense()
        marked = {jtu.keystr(path) for path, _ in jtu.tree_leaves_with_path(model.mask)}
        marked |= {f"{name}.values" for name in kept_layers(seen)}
    else:
        marks = jax.tree.leaves(marks_of(model, None))
        paths = jtu.tree_leaves_with_path(model)
        marked = {jtu.keystr(path) for (path, _), mark in zip(paths, marks, strict=True) if mark}
    weights: list[tuple[str, Array]] = []
    others: list[tuple[str, Array]] = []
    for path, leaf in jtu.tree_leaves_with_path(parameters(seen)):
        name = jtu.keystr(path)
        (weights if name in marked else others).append((name.lstrip("."), leaf))
    return weights, others


def faults_of_batch(batch: Any, step: int) -> str | None:
    """A sentence on the first leaf of a batch that is NaN, infinite or very large."""
    for path, leaf in jtu.tree_leaves_with_path(batch):
        if not _is_real(leaf):
            continue
        name = _leaf_name(batch, path)
        bad = ~np.isfinite(_host(leaf))
        if bad.any():
            rows = int(bad.reshape(len(bad), -1).any(1).sum()) if bad.ndim else 1
            of = f" in {rows} of its {len(bad)} samples" if bad.ndim else ""
            return f"The batch of step {step} has NaN or infinity in {name}{of}: mend the data."
    for path, leaf in jtu.tree_leaves_with_path(batch):
        if not _is_real(leaf):
            continue
        if (most := float(np.abs(_host(leaf)).max(initial=0.0))) > _LARGE:
            return (
                f"The batch of step {step} has entries up to {most:.2g} in "
                f"{_leaf_name(batch, path)}: standardise it, or take such samples out."
            )
    return None


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """Functions by which `train` and `transfer` explain a loss that is not finite.

    Attributes:
        model: the model of a state.
        check: raises `ValueError` for a batch that does not suit the model of a state.
        outputs: the outputs of a state's model for a batch, as one array or several.
        begin: the state that the run starts from; the steps leave it as it is.
        behind: asked with a later state and the number of the step where neither the batch nor the
            weights before the step are to blame; it raises what it finds.
    """

    model: Callable[[Any], PyTree]
    check: Callable[[Any, Any], None]
    outputs: Callable[[Any, Any], PyTree]
    begin: Any
    behind: Callable[[Any, int], None] = lambda state, step: None

    def __call__(
        self, state: Any, step: int, seen: Evidence, before: Evidence | None, first: Evidence | None
    ) -> str | None:
        """A sentence, or `None` where the optimiser's steps seem to be too long.

        **Arguments:**

        - `state`: a later one, of which only structure and masks are used.
        - `step`: the number of the step whose loss is not finite.
        - `seen`: what that step left.
        - `before`, `first`: what the step before it and the run's first one left; `None` where
            it is the first.
        """
        if said := faults_of_batch(seen.batch, step):
            return said
        try:
            self.check(state, seen.batch)
        except ValueError as error:
            return f"The batch of step {step} cannot be used: {str(error).split(': ', 1)[-1]}"
        except Exception:  # the check of an objective of one's own, which found no fault before
            pass
        if seen.weights is None:
            return None
        model = self.model(state)
        norms, lost = _norms(seen), _lost(model, seen)
        if before is None or first is None:
            if lost:
                return f"The run starts from weights that are not finite: {lost}."
            self.behind(state, step)
            return self._at_the_start(seen.batch)
        usual = _GROWN * max(_norms(first).max(initial=0.0), 1.0)
        if not _norms(before).max(initial=0.0) <= usual:
            return None
        if lost:
            return (
                f"The update of step {step - 1} made {lost} NaN or infinite, though the loss of "
                "that step was finite: either its gradient was not, or what the optimizer made of "
                f"it.{_hints(model)}"
            )
        if not (grown := norms.max(initial=0.0)) <= usual:
            return None
        self.behind(state, step)
        return (
            "The batch is finite, and so are the weights before the step, of a norm of at most "
            f"{grown:.3g}: the model or the loss makes NaN or infinity of them."
            f"{_hints(model)}{_SEARCH}"
        )

    def _at_the_start(self, batch: Any) -> str:
        model = self.model(self.begin)
        try:
            finite = all(map(is_finite, jax.tree.leaves(self.outputs(self.begin, batch))))
        except Exception:  # an objective of one's own may call the model in another way
            finite = True
        what = "the loss is not finite, though the model's outputs are"
        if not finite:
            what = "the model's outputs are not finite"
        return (
            f"The batch and the weights that the run starts from are finite, but {what}: no "
            f"learning rate mends this.{_hints(model)}{_SEARCH}"
        )


def _norms(seen: Evidence) -> np.ndarray:
    return np.sqrt(np.asarray(seen.weights, np.float64))


def _lost(model: PyTree, seen: Evidence) -> str:
    """The names of the weights that were not finite before a step.

    An infinite sum of squares tells that of float16 alone, for float32 holds those of all its
    finite numbers; that of any other weight may be infinite where the weight is merely large.
    """
    weights, others = _told_apart(model)
    named = [(name, [leaf]) for name, leaf in weights]
    if others:
        few = ", ".join(name for name, _ in others[:3])
        named.append((f"one of {few}{', ...' if len(others) > 3 else ''}", [w for _, w in others]))
    lost = [
        name
        for (name, leaves), norm in zip(named, _norms(seen), strict=True)
        if math.isnan(norm) or math.isinf(norm) and all(w.dtype == jnp.float16 for w in leaves)
    ]
    return ", ".join(lost[:3])


_SEARCH = (
    " jax.config.update('jax_debug_nans', True) stops at the operation that makes the first NaN."
)


def _hints(model: PyTree) -> str:
    """Advice on the parts of a model that are known to turn finite numbers into NaN."""
    said = ""
    if isinstance(model, SparseModel):
        for path, mask in jtu.tree_leaves_with_path(model.mask):
            rows = ~np.asarray(mask).reshape(len(mask), -1).any(1) if mask.ndim > 1 else ()
            if np.any(rows) and not np.all(rows):  # else a refresh of NaN weights left none
                name = jtu.keystr(path).lstrip(".")
                said += (
                    f" {name} keeps no weight in {int(np.sum(rows))} of its {len(mask)} rows: a "
                    "weight normalisation divides 0 by 0 there, and the gradient of the norm is "
                    "NaN. Add a small number under the root, or keep a weight in each row."
                )
                break
    params = eqx.filter(model, eqx.is_inexact_array)
    if any(leaf.dtype == jnp.float16 for leaf in jax.tree.leaves(params)):
        said += (
            " The model has float16 weights: numbers below 6e-8 are 0 there, Adam's eps of 1e-8 "
            "and squares of small gradients among them, and numbers above 65504 are infinite. Give "
            "the optimizer a larger eps (1e-4), or use float32 or bfloat16."
        )
    return said


def check_first_update(caller: str, params: PyTree, gradient: Callable[[], PyTree]) -> None:
    """Raise `ValueError` when a first step, whose loss was finite, left `params` NaN or infinite.

    It looks at values: to be called once a run, outside of `jit`.

    **Arguments:**

    - `caller`: begins the message.
    - `params`: the model after the step.
    - `gradient`: computes the gradient of that step's loss; called only where something is wrong.
    """
    named = jtu.tree_leaves_with_path(eqx.filter(params, eqx.is_inexact_array))
    for (path, _), finite in zip(named, are_finite([leaf for _, leaf in named]), strict=True):
        if finite:
            continue
        name = jtu.keystr(path).lstrip(".")
        what = f"{caller}: the optimizer's first step made {name} NaN or infinite, though the loss"
        for where, slope in jtu.tree_leaves_with_path(gradient()):
            if eqx.is_inexact_array(slope) and not is_finite(slope):
                raise ValueError(
                    f"{what} was finite: the gradient of the loss by "
                    f"{jtu.keystr(where).lstrip('.')} is not finite. No learning rate mends this."
                    f"{_hints(params)}{_SEARCH}"
                )
        raise ValueError(
            f"{what} and its gradient were finite; the optimizer's learning rate and its other "
            f"settings must be finite and suit the dtype of the weights.{_hints(params)}"
        )


def recording() -> GradientTransformation:
    """An optimiser that changes no weight and stores the gradient as its state."""
    import optax

    def zeros(params: PyTree) -> PyTree:
        return jax.tree.map(jnp.zeros_like, params)

    def update(updates: PyTree, state: PyTree, params: PyTree | None = None) -> Any:
        return zeros(updates), updates

    return optax.GradientTransformation(zeros, update)


def tolerates(state: Any) -> bool:
    """Whether an optimiser in `state` skips updates that are not finite.

    These are `optax.apply_if_finite`, and `optax.MultiSteps` with `optax.skip_not_finite`.
    """
    import optax

    def skips(node: Any) -> bool:
        rest = getattr(node, "skip_state", None)
        counts = isinstance(rest, dict) and "num_not_finite" in rest
        return isinstance(node, optax.ApplyIfFiniteState) or counts

    return any(map(skips, jax.tree.leaves(state, is_leaf=skips)))


def all_finite(state: Any) -> bool:
    """Whether no floating-point array of `state` holds NaN or infinity."""
    return all(map(is_finite, jax.tree.leaves(eqx.filter(state, eqx.is_inexact_array))))


def _is_real(leaf: Any) -> bool:
    """Whether a leaf holds real or complex numbers that this process can look at."""
    here = hasattr(leaf, "dtype") and getattr(leaf, "is_fully_addressable", True)
    return here and jnp.issubdtype(leaf.dtype, jnp.inexact)


def _host(leaf: Any) -> np.ndarray:
    array = np.asarray(leaf)
    return array if array.dtype.kind in "fc" else array.astype(np.float32)  # bfloat16 and others


def _leaf_name(batch: Any, path: Any) -> str:
    leaf = next(leaf for at, leaf in jtu.tree_leaves_with_path(batch) if at == path)
    try:
        x, y = pair("", batch)
    except ValueError:
        return f"batch{jtu.keystr(path)}" if path else "x"
    return "x" if leaf is x else "y" if leaf is y else f"batch{jtu.keystr(path)}"
