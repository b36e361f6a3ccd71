"""One update by any optax transformation, for the transfer and for training."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float

from ._checks import check_optimizer
from ._distribute import is_sharded
from ._types import GradientTransformation, PyTree


def init_optimizer(caller: str, optimizer: GradientTransformation, params: PyTree) -> PyTree:
    """The state of `optimizer` before its first step, as `optimise` keeps it.

    **Raises:**

    `ValueError` if `optimizer` is not an optax transformation.
    """
    check_optimizer(caller, optimizer)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        # One program; a sharded parameter's state is sharded like it only if it is made by itself.
        whole = not any(map(is_sharded, jax.tree.leaves(params)))
        init = eqx.filter_jit(optimizer.init) if whole else optimizer.init
        opt_state = init(params)
    # No weak types: they would become strong in the first step, which would then compile twice.
    strong = lambda leaf: jax.lax.convert_element_type(leaf, leaf.dtype)
    weak = lambda leaf: eqx.is_array(leaf) and getattr(leaf, "weak_type", True)
    return jax.tree.map(lambda leaf: strong(leaf) if weak(leaf) else leaf, opt_state)


def optimise(
    optimizer: GradientTransformation,
    gradient: PyTree,
    opt_state: PyTree,
    params: PyTree,
    *,
    value: Float[Array, ""],
    value_fn: Callable[[PyTree], Float[Array, ""]] | None = None,
    onto: PyTree = None,
) -> tuple[PyTree, PyTree]:
    """One step of `optimizer`, to be called under `jit`.

    What an optimiser may ask for beside the gradient is handed to it by optax's own names: the
    loss as `value` (`optax.contrib.reduce_on_plateau`, Polyak's step size), the gradient once more
    as `grad`, and the loss as a function of the parameters as `value_fn` (line searches).

    **Arguments:**

    - `optimizer`: any optax transformation, with extra arguments or without.
    - `gradient`: of the loss, with the structure of `params`.
    - `opt_state`: from `optimizer.init(params)` or the step before.
    - `params`: what is optimised; `None` where a leaf is not.
    - `value`: the loss at `params`.
    - `value_fn`: the loss of other parameters; `None` where it cannot be had.
    - `onto`: what the updates are added to in place of `params`, from which it differs at most
      where the result is dropped.

    **Returns:**

    The next parameters, in the dtypes of `params`, and the optimiser's next state.
    """
    import optax

    # JAX's gradient of a real loss by a complex number is the conjugate of the way up.
    gradient = jax.tree.map(lambda g: jnp.conj(g) if jnp.iscomplexobj(g) else g, gradient)
    extra: dict[str, Any] = {"value": value, "grad": gradient}
    if value_fn is not None:
        extra["value_fn"] = value_fn
    update = optax.with_extra_args_support(optimizer).update
    # optax mixes dtypes and ranks within itself
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        updates, after = update(gradient, opt_state, params, **extra)
        params = optax.apply_updates(params if onto is None else onto, updates)
    # The state keeps its dtypes, so that a step compiles once, whatever the loss computes in.
    after = jax.tree.map(
        lambda new, old: new.astype(old.dtype) if eqx.is_array(old) else new, after, opt_state
    )
    return params, after


@eqx.filter_jit
def copied(tree: PyTree) -> PyTree:
    """The tree with arrays in memory of their own, so that a step may reuse that of the others."""
    return jax.tree.map(lambda leaf: jnp.copy(leaf) if eqx.is_array(leaf) else leaf, tree)


def learning_rate(opt_state: PyTree) -> Float[Array, ""] | None:
    """The rate that `optax.inject_hyperparams` keeps in `opt_state`, float32.

    `None` if it stores none, or more than one, as `optax.partition` does.
    """
    rates = [
        leaf
        for path, leaf in jtu.tree_leaves_with_path(opt_state)
        if len(path) >= 2
        and getattr(path[-2], "name", None) == "hyperparams"
        and path[-1] == jtu.DictKey("learning_rate")
    ]
    return jnp.asarray(rates[0], jnp.float32) if len(rates) == 1 else None
