"""Neural Tangent Transfer: fit a sparse student to a dense teacher's outputs and kernel.

Liu & Zenke, "Finding trainable sparse networks through Neural Tangent Transfer", ICML 2020
(arXiv 2006.08228). On an unlabelled batch x with halves x1, x2:

    L = mean (f_s(x) - f_t(x))^2 + lambda_K mean (Theta_s(x1,x2) - Theta_t(x1,x2))^2
        + (lambda_2 / density) sum |m W|^2
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree, Shaped

from ._checks import (
    check_batch,
    check_weight,
    check_weights,
    is_count,
    sample_of,
    sample_output,
)
from ._errors import DivergenceError
from ._examples import as_inference, check_samples, next_batch
from ._masks import make_mask
from ._masks._allocation import check_density
from ._masks._collapse import is_traced
from ._ntk import mask_support, outputs_and_ntk, refresh_support, sketch_directions
from ._optimise import check_first_update, init_optimizer, learning_rate, optimise
from ._scores import LogitSnip, Magnitude
from ._sparse import SparseModel, masked_weights, sparsify
from ._types import Where, widen


@dataclasses.dataclass(frozen=True)
class NTTConfig:
    """Settings of a transfer; the defaults are the published ones for LeNet-300-100.

    Attributes:
        density: share of prunable weights that are kept, in (0, 1].
        num_steps: length of the whole transfer; the mask is left alone within its last
            `mask_every` steps. `None`: no end is known, the mask is refreshed throughout.
        scope: `"layer"` keeps this share in every layer, `"global"` in all layers together.
        initial_mask: `"magnitude"` of the teacher's weights, or `"logit_snip"`.
        mask_every: steps between two refreshes of the mask from the magnitudes of the dense student
            weights; `None` keeps the initial mask.
        kernel: `"active"` (the paper's definition) or `"ambient"` (what its published code runs).
        kernel_weight: lambda_K.
        l2_weight: lambda_2; divided by the density.
        outputs: the kernels' outputs that are compared: `"full"` (all pairs, the paper's), the
            `"diagonal"`, the `"trace"`, or a `"sketch"` by `sketch_size` random directions a side,
            drawn anew at every step, whose squared distance is right on average: for many
            outputs, where all pairs cost too much.
        sketch_size: R, at most the number of outputs.
        implementation: of the kernels; see `ntk`.
    """

    density: float
    num_steps: int | None = None
    scope: Literal["layer", "global"] = "layer"
    initial_mask: Literal["magnitude", "logit_snip"] = "magnitude"
    mask_every: int | None = 100
    kernel: Literal["active", "ambient"] = "active"
    kernel_weight: float = 1e-3
    l2_weight: float = 1e-4
    outputs: Literal["full", "diagonal", "trace", "sketch"] = "full"
    sketch_size: int = 8
    implementation: Literal["factors", "jacobian", "ntk_vector_products"] = "factors"

    def __post_init__(self) -> None:
        """Reject settings that cannot work.

        Raises:
            ValueError: a value is outside its range.
        """
        object.__setattr__(self, "density", check_density(self.density, "NTTConfig"))
        for name, allowed in (
            ("scope", ("layer", "global")),
            ("initial_mask", ("magnitude", "logit_snip")),
            ("kernel", ("active", "ambient")),
            ("outputs", ("full", "diagonal", "trace", "sketch")),
            ("implementation", ("factors", "jacobian", "ntk_vector_products")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"NTTConfig: {name} must be one of {allowed}, got {getattr(self, name)!r}."
                )
        for name in ("kernel_weight", "l2_weight"):
            check_weight(f"NTTConfig: {name}", getattr(self, name))
        if self.outputs == "sketch" and self.implementation != "factors":
            raise ValueError("NTTConfig: a sketch needs implementation='factors'.")
        for name in ("mask_every", "num_steps", "sketch_size"):
            value = getattr(self, name)
            if not (is_count(value) or value is None and name != "sketch_size"):
                raise ValueError(
                    f"NTTConfig: {name} must be an integer of at least 1"
                    f"{'' if name == 'sketch_size' else ' or None'}, got {value!r}."
                )


class NTTMetrics(eqx.Module):
    """What one batch says of the student; all are float32 scalars.

    Attributes:
        loss: the transfer loss L.
        kernel_distance: mean squared difference of the kernels' entries.
        target_distance: mean squared difference of the outputs.
        weight_norm: sum of squares of the kept weights.
        density: share of prunable weights kept.
        learning_rate: of the optimiser, where it keeps one in its state
            (`optax.inject_hyperparams`); NaN otherwise.
    """

    loss: Float[Array, ""]
    kernel_distance: Float[Array, ""]
    target_distance: Float[Array, ""]
    weight_norm: Float[Array, ""]
    density: Float[Array, ""]
    learning_rate: Float[Array, ""]


class NTTState(eqx.Module):
    """Everything that `ntt_step` needs and returns: a PyTree of arrays with static settings.

    Attributes:
        teacher: the dense model, fixed.
        student: the sparse model that is being fitted; dense weights live on under its mask.
        opt_state: the optimiser's state for the student's floating-point leaves.
        step: number of steps done, int32.
        support: flat indices of the mask's kept weights, for layers with a fixed number of them;
            only there to make the kernel faster.
        config: the settings (static).
        optimizer: the optax transformation (static).
    """

    teacher: Any
    student: SparseModel
    opt_state: Any
    step: Int[Array, ""]
    support: Any
    config: NTTConfig = eqx.field(static=True)
    optimizer: optax.GradientTransformation = eqx.field(static=True)


def ntt_init(
    teacher: PyTree,
    config: NTTConfig,
    optimizer: optax.GradientTransformation,
    *,
    where: Where | None = None,
    x: Shaped[Array, "batch ..."] | None = None,
    mask: PyTree | None = None,
) -> NTTState:
    """The state before the first step: the student is the teacher under its initial mask.

    **Arguments:**

    - `teacher`: any Equinox model that maps one sample to its outputs.
    - `config`: the settings.
    - `optimizer`: any optax transformation, such as `optax.adam(5e-4)`.
    - `where`: which leaves are prunable; see `prunable_weights`.
    - `x`: unlabelled samples `[batch, ...]`, needed for `initial_mask="logit_snip"` only.
    - `mask`: an initial mask from elsewhere, instead of `config.initial_mask`.

    **Returns:**

    An `NTTState` at step 0.

    **Raises:**

    `ValueError` if the density leaves a layer empty (`scope="layer"`), `x` is missing, or the
    teacher's weights are NaN or infinite.
    """
    check_weights("ntt_init", teacher)
    full = sparsify(teacher, where)
    if mask is None and config.initial_mask == "magnitude":
        mask = make_mask(Magnitude()(full), config.density, scope=config.scope)
    elif mask is None:
        if x is None:
            raise ValueError("ntt_init: initial_mask='logit_snip' needs samples: pass `x=`.")
        mask = make_mask(LogitSnip()(full, x), config.density, scope=config.scope)
    # The student must not share buffers with the teacher: users may donate the state.
    student = jax.tree.map(lambda l: jnp.copy(l) if eqx.is_array(l) else l, full.with_mask(mask))
    opt_state = init_optimizer("ntt_init", optimizer, eqx.filter(student, eqx.is_inexact_array))
    counted = config.kernel == "active" and _keeps_its_counts(mask, config)
    support = mask_support(mask) if counted else jax.tree.map(lambda _: None, mask)
    step = jnp.zeros((), jnp.int32)
    return NTTState(full.model, student, opt_state, step, support, config, optimizer)


def ntt_loss(
    student: SparseModel,
    teacher: PyTree,
    x: Shaped[Array, "batch ..."],
    config: NTTConfig,
    *,
    support: PyTree | None = None,
    step: Int[Array, ""] | int = 0,
) -> tuple[Float[Array, ""], NTTMetrics]:
    """The transfer loss on an unlabelled batch (the equation at the head of this module).

    **Arguments:**

    - `student`, `teacher`: models of one sample; dropout is off in both.
    - `x`: `[batch, ...]`, an even number of samples: the kernel is taken between its halves.
    - `support`: `NTTState.support`, where there is a state: the same loss, faster.
    - `step`: number of the step, from which a sketch's directions are drawn.
    - `config`: the kernel and the weights of the terms.

    **Returns:**

    The loss, and all its terms as `NTTMetrics`.

    **Raises:**

    `ValueError` for a batch of odd size or of fewer than two samples, and for models that do not
    suit it or each other.
    """
    _check_halves("ntt_loss", x)
    student, teacher = eqx.nn.inference_mode(student), eqx.nn.inference_mode(teacher)
    one, two = (sample_output("ntt_loss", m, sample_of(x)).shape for m in (student, teacher))
    if one != two:
        raise ValueError(
            f"ntt_loss: the student's outputs have the shape {one}, the teacher's {two}."
        )
    how = _how(config, math.prod(two), step)
    f_t, theta_t = jax.lax.stop_gradient(outputs_and_ntk(teacher, x, config.kernel, **how))
    f_s, theta_s = outputs_and_ntk(student, x, config.kernel, support=support, **how)
    target_distance = jnp.mean(jnp.square(widen(f_s) - widen(f_t)))
    kernel_distance = jnp.mean(jnp.square(theta_s - theta_t))
    weight_norm = sum(jnp.sum(jnp.square(widen(w))) for w in masked_weights(student))
    loss = (
        target_distance
        + config.kernel_weight * kernel_distance
        + config.l2_weight / config.density * weight_norm
    )
    values = (loss, kernel_distance, target_distance, weight_norm, student.density(), jnp.nan)
    return loss, NTTMetrics(*(jnp.asarray(v, jnp.float32) for v in values))


def ntt_step(state: NTTState, x: Shaped[Array, "batch ..."]) -> tuple[NTTState, NTTMetrics]:
    """One step of the optimiser on an unlabelled batch; use it as `eqx.filter_jit(ntt_step)`.

    After every `mask_every` steps, except within the last `mask_every` of `num_steps`, the mask is
    taken again from the magnitudes of the dense student weights; shapes never change, so
    nothing is compiled again.

    **Arguments:**

    - `state`: from `ntt_init` or the step before.
    - `x`: `[batch, ...]`, an even number of samples.

    **Returns:**

    The next state, and the metrics of the batch before the update.
    """
    config = state.config
    params, static = eqx.partition(state.student, eqx.is_inexact_array)

    def loss(params):
        student = eqx.combine(params, static)
        return ntt_loss(student, state.teacher, x, config, support=state.support, step=state.step)

    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    params, opt_state = optimise(
        state.optimizer,
        gradient,
        state.opt_state,
        params,
        value=value,
        value_fn=lambda params: loss(params)[0],
    )
    student = eqx.combine(params, static)
    step = state.step + 1
    support = state.support
    if config.mask_every is not None:
        student, support = _refresh(student, support, step, config, config.mask_every)
    metrics = eqx.tree_at(lambda m: m.learning_rate, metrics, learning_rate(opt_state))
    state = NTTState(state.teacher, student, opt_state, step, support, config, state.optimizer)
    return state, metrics


def transfer(
    state: NTTState,
    batches: Iterable[Any],
    *,
    num_steps: int | None = None,
    validation: Shaped[Array, "batch ..."] | None = None,
    log_every: int = 100,
    on_log: Callable[[NTTState, dict[str, Any]], None] | None = None,
) -> tuple[NTTState, list[dict[str, Any]]]:
    """Run `ntt_step` to the end of the transfer.

    **Arguments:**

    - `state`: from `ntt_init`, or of a run that goes on from where it stopped.
    - `batches`: yields arrays `[batch, ...]`, or tuples that begin with one (labels are ignored).
    - `num_steps`: the step to stop after, counted from the beginning of the transfer;
      `config.num_steps` by default.
    - `validation`: held-out samples on which the metrics are taken too; an even number.
    - `log_every`: steps between two rows of the history; there is a row at the first and the last
      step, too.
    - `on_log`: called with the state and each new row.

    **Returns:**

    The final state, and rows `{"step": int, "train": {...}, "validation": {...}}` with the
    fields of `NTTMetrics` as floats; `"validation"` only where samples were given.

    **Raises:**

    `ValueError` for samples that do not fit the model or cannot be halved, and batches that run
    out; `DivergenceError` when the loss is NaN or infinite in a row.
    """
    num_steps = state.config.num_steps if num_steps is None else num_steps
    if num_steps is None:
        raise ValueError("transfer: give `num_steps` here or in NTTConfig.")
    for name, value, least in (("num_steps", num_steps, 0), ("log_every", log_every, 1)):
        if not is_count(value, least):
            raise ValueError(f"transfer: {name} must be at least {least}, got {value!r}.")
    if validation is not None:
        validation = _fitting("transfer: validation", state.teacher, validation)
    history: list[dict[str, Any]] = []

    def log(state: NTTState, train: NTTMetrics | None) -> None:
        row: dict[str, Any] = {"step": int(state.step)}
        if train is not None:
            row["train"] = _floats(train)
        if validation is not None:
            row["validation"] = _floats(_evaluate(state, validation))
        history.append(row)
        for part in ("train", "validation"):
            if part in row and not math.isfinite(row[part]["loss"]):
                raise DivergenceError("transfer", row["step"], row[part]["loss"])
        if on_log is not None:
            on_log(state, row)

    if int(state.step) == 0 and validation is not None:
        log(state, None)
    source, first = iter(batches), int(state.step) + 1
    for step in range(first, num_steps + 1):
        batch = next_batch("transfer", source, step - 1, num_steps)
        x = batch[0] if isinstance(batch, tuple) else batch
        if step == first:
            x = _fitting("transfer", state.teacher, x)
        state, metrics = _step(state, jnp.asarray(x))
        if step == first and math.isfinite(float(metrics.loss)):
            check_first_update("transfer", state.student)
        if step == 1 or step % log_every == 0 or step == num_steps:
            log(state, metrics)
    return state, history


_step = eqx.filter_jit(ntt_step)


@eqx.filter_jit
def _evaluate(state: NTTState, x: Array) -> NTTMetrics:
    _, metrics = ntt_loss(state.student, state.teacher, x, state.config, support=state.support)
    return eqx.tree_at(lambda m: m.learning_rate, metrics, learning_rate(state.opt_state))


def _check_halves(caller: str, x: Any) -> None:
    if len(getattr(x, "shape", ())) < 1:
        check_batch(caller, x)
    if x.shape[0] < 2 or x.shape[0] % 2:
        raise ValueError(
            f"{caller}: the batch must hold an even number of samples, got {x.shape[0]}."
        )


def _fitting(caller: str, teacher: PyTree, x: Any) -> Array:
    """The samples as an array that can be halved and that the model takes."""
    _check_halves(caller, x)
    x = check_samples(caller, x)
    sample_output(caller, as_inference(teacher), sample_of(x))
    return x


def _keeps_its_counts(mask: PyTree, config: NTTConfig) -> bool:
    """Whether each layer will hold as many weights after every refresh as it does under `mask`."""
    if config.mask_every is None:
        return not is_traced(mask)
    if config.scope != "layer" or is_traced(mask):
        return False
    leaves = jax.tree.leaves(mask)
    return all(np.count_nonzero(m) == round(config.density * m.size) for m in leaves)


def _how(config: NTTConfig, num_outputs: int, step: Array | int) -> dict[str, Any]:
    """The kernel's arguments that `config` asks for; a sketch's directions belong to the step."""
    how: dict[str, Any] = dict(implementation=config.implementation, outputs=config.outputs)
    if config.outputs == "sketch":
        key = jax.random.fold_in(jax.random.key(0), step)
        directions = sketch_directions(key, config.sketch_size, num_outputs)
        how.update(outputs="full", directions=directions)
    return how


def _refresh(
    student: SparseModel, support: PyTree, step: Array, config: NTTConfig, every: int
) -> tuple[SparseModel, PyTree]:
    due = step % every == 0
    if config.num_steps is not None:
        due = due & (step < config.num_steps - every)
    full = student.with_mask(jax.tree.map(jnp.ones_like, student.mask))

    def again():
        mask = make_mask(Magnitude()(full), config.density, scope=config.scope)
        return mask, refresh_support(mask, support)

    mask, support = jax.lax.cond(due, again, lambda: (student.mask, support))
    return student.with_mask(mask), support


def _floats(metrics: NTTMetrics) -> dict[str, float]:
    return {f.name: float(getattr(metrics, f.name)) for f in dataclasses.fields(metrics)}
