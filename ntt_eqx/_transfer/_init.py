"""`ntt_init`: the state before the first step."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, Shaped

from .._checks import check_key, check_optimizer, check_weights
from .._distribute import replicate
from .._kept import check_masked_form
from .._optimise import copied, init_optimizer
from .._parameters import parameters
from .._scores._base import scored
from .._sparse import SparseModel, sparsify
from .._stateful import check_warm, is_cold, warm_up
from .._step_info import key_words
from .._types import GradientTransformation, MaskTree, PyTree, ScoreTree, Where
from ._config import NTTConfig
from ._given import hold_mask
from ._method import NeuralTangentTransfer
from ._state import NTTState, entries_for, support_for


def ntt_init(
    teacher: PyTree,
    config: NTTConfig | NeuralTangentTransfer,
    optimizer: GradientTransformation | None = None,
    *,
    where: Where | None = None,
    x: Shaped[Array, "batch ..."] | None = None,
    mask: PyTree | None = None,
    student: PyTree | None = None,
    key: PRNGKeyArray | None = None,
) -> NTTState:
    """The state before the first step: the student is the teacher under its initial mask.

    **Arguments:**

    - `teacher`: any Equinox model that maps one sample to its outputs.
    - `config`: the settings, or a method with your own parts.
    - `optimizer`: any optax transformation, such as `optax.adam(5e-4)`; a `NeuralTangentTransfer`
      brings its own.
    - `where`: which leaves are prunable; see `prunable_weights`.
    - `x`: unlabelled samples `[batch, ...]`, needed where the first mask's score looks at them
      (`initial_mask="logit_snip"`), and where the teacher's batch norms have seen no batch: their
      running statistics become those of `x`, see `warm_up`.
    - `mask`: an initial mask from elsewhere, instead of the initial score's. Refreshes keep what it
      is: it goes on as any mask where it has the counts and the pattern of the method's sparsity,
      and with the number of weights that it keeps in each layer where it has not.
    - `student`: the network to fit, where it is not the teacher itself: any model with as many
      outputs, such as a part of the teacher (`Compacted.take`), whose steps cost less. `where`,
      the method's sparsity and `mask` are those of its weights; the mask of a `SparseModel` is the
      initial one, unless `mask` is given.
    - `key`: what the steps' draws come from, such as a sketch's directions; `jax.random.key(0)`
      without.

    **Returns:**

    An `NTTState` at step 0.

    **Raises:**

    `ValueError` if the density leaves a layer empty (`scope="layer"`), `x` is missing, weights of
    the teacher or the student are NaN or infinite, the initial score cannot rank the weights, the
    refreshes cannot keep the given mask or rank the groups of the pattern, or `key` is not one
    random key.

    **Warns:**

    When a given mask seems to have a pattern that the refreshes do not keep.
    """
    check_weights("ntt_init", teacher)
    if key is not None:
        check_key("ntt_init", key)
    method = _method(config, optimizer)
    if x is not None and is_cold(teacher):
        teacher = warm_up(teacher, x)
    check_warm("ntt_init", teacher)
    if isinstance(student, SparseModel) and mask is None:
        mask = student.mask
    check_masked_form("ntt_init", teacher)
    if isinstance(teacher, SparseModel):  # what it computes, without the weights under its mask
        teacher = SparseModel(teacher.to_dense(), teacher.mask)
    full = sparsify(teacher if student is None else _usable(student, x), where)
    _check_schedule(method, full.mask)
    method.sparsity.check_end(full.mask, method.num_steps)
    method.refresh.check_pattern(method.sparsity, full.mask)
    if mask is None:
        mask = method.sparsity.mask(_initial_scores(method, full, x))
    else:
        full.with_mask(mask)
        method, mask = hold_mask("ntt_init", method, mask, 0)
    # The student must not share buffers with the teacher: users may donate the state.
    first = copied(full.with_mask(mask))
    entries = entries_for(method, first.model, mask)
    state = NTTState(
        teacher=teacher.model if isinstance(teacher, SparseModel) else teacher,
        student=first,
        opt_state=init_optimizer("ntt_init", method.optimizer, parameters(first)),
        step=jnp.zeros((), jnp.int32),
        key=key_words(key),
        support=support_for(method, mask, entries),
        method=method,
        entries=entries,
    )
    return replicate(state)


def _usable(student: PyTree, x: Array | None) -> PyTree:
    """A student of its own, once it was checked as the teacher is."""
    check_weights("ntt_init: student", student)
    if x is not None and is_cold(student):
        student = warm_up(student, x)
    check_warm("ntt_init: student", student)
    return student


def _method(
    config: NTTConfig | NeuralTangentTransfer, optimizer: GradientTransformation | None
) -> NeuralTangentTransfer:
    if not isinstance(config, NTTConfig | NeuralTangentTransfer):
        raise ValueError(
            "ntt_init: the second argument must be an NTTConfig or a NeuralTangentTransfer, got "
            f"{type(config).__name__}; write NTTConfig(density=...)."
        )
    if isinstance(config, NeuralTangentTransfer):
        if optimizer is not None:
            raise ValueError("ntt_init: the method has an optimizer; leave `optimizer` out.")
        return config
    if optimizer is None:
        raise ValueError(
            "ntt_init: give an optimizer, an optax transformation such as optax.adam(5e-4)."
        )
    check_optimizer("ntt_init", optimizer)
    return config.method(optimizer)


def _initial_scores(method: NeuralTangentTransfer, full: SparseModel, x: Array | None) -> ScoreTree:
    try:
        return scored(method.initial, full, x)
    except ValueError as error:
        if x is not None:
            raise
        name = type(method.initial).__name__
        raise ValueError(
            f"ntt_init: the initial mask's score {name} needs samples: pass `x=`."
        ) from error


def _check_schedule(method: NeuralTangentTransfer, mask: MaskTree) -> None:
    """Raise what a refresh under a schedule would raise, before the first step."""
    if not (method.refreshes and callable(method.sparsity.density)):
        return
    scores = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, jnp.float32), mask)
    step = jax.ShapeDtypeStruct((), jnp.int32)
    jax.eval_shape(method.sparsity.quiet_mask, scores, step)
    if method.num_steps is not None:
        for share in range(5):
            method.sparsity.at(method.num_steps * share // 4)
