"""`StatefulModel`: a model together with its state; batches in training mode; warm-up."""

from collections.abc import Iterable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.core import Tracer
from jaxtyping import Array, Float, PRNGKeyArray

from ._batch import as_array
from ._checks import check_batch
from ._sparse import SparseModel
from ._types import PyTree

# Batch norm in Equinox's mode "batch" divides its running sums by 1 - momentum^count, and its sum
# of variances starts at 1 instead of 0. At this count the divisor is 1 for every common momentum,
# so the stored sums are the statistics themselves.
_SETTLED = 2**30


class StatefulModel(eqx.Module):
    """A model that Equinox calls as `model(x, state) -> (y, state)`, together with its state.

    As a model of one sample, `x -> y`, it always runs in inference mode: batch norm uses its
    running statistics. `forward` runs a batch in training mode and returns the model with the next
    state.

    Attributes:
        model: the stateful model.
        state: its state, from `eqx.nn.make_with_state`.
    """

    model: Any
    state: eqx.nn.State

    def __init__(self, model: PyTree, state: Any):
        """Pair `model` with `state`: `StatefulModel(*eqx.nn.make_with_state(Net)(...))`.

        Raises:
            ValueError: `state` is not an `eqx.nn.State`, or `model` is a `StatefulModel` already.
        """
        if not isinstance(state, eqx.nn.State) or isinstance(model, StatefulModel | SparseModel):
            raise ValueError(
                "StatefulModel: needs a model and its eqx.nn.State, as "
                "`eqx.nn.make_with_state(Net)(...)` returns them, got "
                f"{type(model).__name__} and {type(state).__name__}."
            )
        self.model = model
        self.state = state

    def __call__(self, x: Any, *, key: PRNGKeyArray | None = None) -> Any:
        """The output for one sample, in inference mode; the state stays as it is."""
        return _call(eqx.nn.inference_mode(self.model), self.state, x, key)[0]


def forward(
    model: PyTree, x: Array, key: PRNGKeyArray | None = None
) -> tuple[Float[Array, "batch ..."], PyTree]:
    """The outputs of a batch, and the model with the state after it.

    A `StatefulModel` runs in the mode of its layers. In training mode batch norm normalises by the
    statistics of this batch and moves its running statistics towards them. Any other model is
    applied to each sample and returned as it is.

    **Arguments:**

    - `model`: any model of one sample, a `StatefulModel`, or a `SparseModel` of either.
    - `x`: inputs `[batch, ...]`.
    - `key`: split over the samples for random layers, such as dropout; `None` for none.

    **Returns:**

    The outputs `[batch, ...]` and the model; gradients flow through the outputs alone.

    **Raises:**

    `ValueError` if the new state differs between samples, or if batch norms use more than one named
    axis.
    """
    plain = model.to_dense() if isinstance(model, SparseModel) else model
    keys = None if key is None else jax.random.split(key, x.shape[0])
    if not isinstance(plain, StatefulModel):
        one = lambda x, key: plain(x) if key is None else plain(x, key=key)
        return jax.vmap(one, in_axes=(0, None if keys is None else 0))(x, keys), model
    axis = _axis_name(plain.model)

    def sample(x: Array, key: Any) -> Any:
        return _call(plain.model, plain.state, x, key)

    mapped = jax.vmap(
        sample, in_axes=(0, None if keys is None else 0), out_axes=(0, None), axis_name=axis
    )
    try:
        outputs, state = mapped(x, keys)
    except ValueError as error:
        if "out_axes" not in str(error):
            raise
        raise ValueError(
            f"forward: the state of {type(plain.model).__name__} differs from sample to sample; a "
            "batch has one state, so layers must average over the batch (jax.lax.pmean)."
        ) from error
    return outputs, with_state(model, jax.lax.stop_gradient(state))


def warm_up(model: PyTree, batches: Any) -> PyTree:
    """Set the running statistics of batch norm to those of unlabelled batches.

    Kernels, scores and transfers look at a network in inference mode, where a new network's
    statistics are meaningless. After `warm_up(model, x)` they are exactly the mean and variance of
    the batch `x` at every batch norm, so that `ntk(warm_up(model, x), x)` is the kernel with the
    statistics of the batch held fixed. Several batches are averaged. Every other state, such as the
    vectors of spectral norm, advances by a step for each batch.

    **Arguments:**

    - `model`: a `StatefulModel` or a `SparseModel` of one; any other is returned as it is.
    - `batches`: inputs `[batch, ...]`, or an iterable of such; 1,000 samples are enough for most.

    **Returns:**

    The model with the new state; its weights and its modes are untouched.

    **Raises:**

    `ValueError` when there is no batch, or one does not suit the model.
    """
    if not has_state(model):
        return model
    single = hasattr(batches, "shape") or not isinstance(batches, Iterable)
    total, count = None, 0
    for batch in [batches] if single else batches:
        x = as_array("warm_up", "x", batch)
        check_batch("warm_up: x", x)
        model, count = _warmed(model, x), count + 1
        now = _statistics(model)
        total = now if total is None else [a + b for a, b in zip(total, now, strict=True)]
    if total is None:
        raise ValueError("warm_up: there is no batch.")
    return _with_statistics(model, [t / count for t in total])


def has_state(model: PyTree) -> bool:
    """Whether `model` is a `StatefulModel`, or a `SparseModel` of one."""
    return isinstance(model.model if isinstance(model, SparseModel) else model, StatefulModel)


def with_state(model: PyTree, state: eqx.nn.State) -> PyTree:
    """Replace the state of a model that has one."""
    if isinstance(model, SparseModel):
        return SparseModel(with_state(model.model, state), model.mask)
    return StatefulModel(model.model, state)


def state_of(model: PyTree) -> eqx.nn.State | None:
    """The state of a model; `None` if it has none."""
    plain = model.model if isinstance(model, SparseModel) else model
    return plain.state if isinstance(plain, StatefulModel) else None


def in_training_mode(model: PyTree, key: PRNGKeyArray | None) -> PyTree:
    """A plain model in the mode in which training runs it.

    With a key all layers keep their mode. Without one dropout is off, because it needs a key; only
    layers with a state, such as batch norm, keep their mode.
    """
    if key is not None:
        return model
    if not isinstance(model, StatefulModel):
        return eqx.nn.inference_mode(model)
    if not _flags_without_state(model.model):
        return model
    net = eqx.tree_at(_flags_without_state, model.model, replace_fn=lambda _: True)
    return StatefulModel(net, model.state)


def advanced(model: PyTree, x: Array) -> PyTree:
    """`model` with the state after a batch in training mode; a model without a state as it is."""
    if not has_state(model):
        return model
    plain = model.to_dense() if isinstance(model, SparseModel) else model
    _, after = forward(in_training_mode(plain, None), x)
    return with_state(model, after.state)


def check_warm(caller: str, model: PyTree) -> None:
    """Raise `ValueError` when a batch norm of `model` is known to have seen no batch."""
    cold = _cold(model)
    if cold:
        raise ValueError(
            f"{caller}: the running statistics of {', '.join(cold[:3])}"
            f"{' and others' if len(cold) > 3 else ''} have seen no batch; set them by "
            "`model = ntt.warm_up(model, x)` with unlabelled inputs `x`."
        )


def check_state_on_top(caller: str, model: PyTree) -> None:
    """Raise `ValueError` when a `StatefulModel` is hidden inside a larger model.

    Its statistics would stay fixed in training, for only the whole model is run on batches.
    """
    plain = model.model if isinstance(model, SparseModel) else model
    inside = plain.model if isinstance(plain, StatefulModel) else plain
    found = lambda node: isinstance(node, StatefulModel)
    if any(map(found, jax.tree.leaves(inside, is_leaf=found))):
        raise ValueError(
            f"{caller}: {type(inside).__name__} holds a StatefulModel, whose state training cannot "
            "advance; make one model `(x, state) -> (y, state)` of both and pair it with its state."
        )


def is_cold(model: PyTree) -> bool:
    """Whether a batch norm of `model` is known to have seen no batch."""
    return bool(_cold(model))


def _call(model: PyTree, state: eqx.nn.State, x: Any, key: Any) -> Any:
    # `State.set` makes the old object unusable, so that each call gets an object of its own.
    state = jax.tree.map(lambda leaf: leaf, state)
    # Equinox's batch norm raises a float to the power of an integer array.
    with jax.numpy_dtype_promotion("standard"):
        out = model(x, state) if key is None else model(x, state, key=key)
    if not (isinstance(out, tuple) and len(out) == 2 and isinstance(out[1], eqx.nn.State)):
        raise ValueError(
            f"StatefulModel: {type(model).__name__} must return (outputs, state), got "
            f"{type(out).__name__}."
        )
    return out


def _axis_name(model: PyTree) -> Any:
    """The axis over which the batch norms of `model` average; `None` where there are none."""
    named = lambda node: hasattr(node, "axis_name")
    nodes = [node for node in jax.tree.leaves(model, is_leaf=named) if named(node)]
    several = lambda name: name if isinstance(name, tuple | list) else [name]
    names = list(dict.fromkeys(name for node in nodes for name in several(node.axis_name)))
    if len(names) > 1:
        raise ValueError(
            f"forward: the layers of {type(model).__name__} average over the axes {names}; a batch "
            "has one axis, so that they must all name the same one."
        )
    return names[0] if names else None


def _flags_without_state(tree: PyTree) -> list[Any]:
    """The `inference` flags of all nodes that hold no state themselves."""
    flagged = lambda node: hasattr(node, "inference") and node is not tree
    parts = getattr(tree, "__dict__", {}).values()
    holds = any(isinstance(part, eqx.nn.StateIndex) for part in parts)
    found = [tree.inference] if hasattr(tree, "inference") and not holds else []
    for node in jax.tree.leaves(tree, is_leaf=flagged):
        found += _flags_without_state(node) if flagged(node) else []
    return found


@eqx.filter_jit
def _warmed(model: PyTree, x: Array) -> PyTree:
    """`model` with the statistics of one batch: a pass in training mode that keeps nothing old."""
    plain = model.to_dense() if isinstance(model, SparseModel) else model
    forgetting = jax.tree.map(
        lambda node: _forgetting(node) if _is_batch_norm(node) else node,
        eqx.nn.inference_mode(plain.model, value=False),
        is_leaf=_is_batch_norm,
    )
    training = in_training_mode(StatefulModel(forgetting, plain.state), None)
    _, after = forward(training, x)
    state = after.state
    for norm in _batch_norms(plain.model):
        if norm.batch_counter is not None:
            counter = state.get(norm.batch_counter)
            state = state.set(norm.batch_counter, jnp.full_like(counter, _SETTLED))
    return with_state(model, state)


def _is_batch_norm(node: Any) -> bool:
    return isinstance(node, eqx.nn.BatchNorm)


def _batch_norms(model: PyTree) -> list[Any]:
    return [n for n in jax.tree.leaves(model, is_leaf=_is_batch_norm) if _is_batch_norm(n)]


def _forgetting(norm: Any) -> Any:
    """A batch norm whose running statistics become those of each batch."""
    copy = jax.tree.map(lambda leaf: leaf, norm)
    object.__setattr__(copy, "momentum", 0.0)  # static, so out of the reach of `eqx.tree_at`
    return copy


def _entries(norm: Any) -> Any:
    return norm.ema_state_index if norm.mode == "ema" else norm.batch_state_index


def _statistics(model: PyTree) -> list[Array]:
    """The running means and variances of all batch norms."""
    state = state_of(model)
    assert state is not None
    plain = model.model if isinstance(model, SparseModel) else model
    return [part for norm in _batch_norms(plain.model) for part in state.get(_entries(norm))]


def _with_statistics(model: PyTree, statistics: list[Array]) -> PyTree:
    plain = model.model if isinstance(model, SparseModel) else model
    state, left = jax.tree.map(lambda leaf: leaf, plain.state), iter(statistics)
    for norm in _batch_norms(plain.model):
        state = state.set(_entries(norm), (next(left), next(left)))
    return with_state(model, state)


def _cold(model: PyTree) -> list[str]:
    state = state_of(model)
    if state is None:
        return []
    plain = model.model if isinstance(model, SparseModel) else model
    named = jtu.tree_leaves_with_path(plain.model, is_leaf=_is_batch_norm)
    cold = []
    for path, norm in named:
        if not _is_batch_norm(norm):
            continue
        if norm.mode == "ema":
            fresh: Any = state.get(norm.ema_first_time_index)
        else:
            fresh = state.get(norm.batch_counter) == 0
        if not isinstance(fresh, Tracer) and bool(fresh):
            cold.append(jtu.keystr(path).lstrip(".") or "batch norm")
    return cold
