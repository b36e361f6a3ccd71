"""`transfer`: steps to the end, with a history."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree, Shaped

from .._batch import as_arrays
from .._checks import sample_of, sample_output
from .._distribute import replicate, spread
from .._errors import DivergenceError
from .._examples import as_inference, check_samples
from .._fit import History, Progress, Row, fit, scalars
from .._masks import check_collapse
from .._optimise import check_first_update
from ._ntt_loss import NTTMetrics, check_halves
from ._state import NTTState, check_room
from ._step import ntt_evaluate, ntt_step


def transfer(
    state: NTTState,
    batches: Iterable[Any],
    *,
    num_steps: int | None = None,
    validation: Shaped[Array, "batch ..."] | None = None,
    log_every: int | None = 100,
    on_log: Callable[[NTTState, Row], None] | None = None,
    on_step: Callable[[Progress[NTTState]], None] | None = None,
    window: Mapping[str, Sequence[float]] | None = None,
) -> tuple[NTTState, History]:
    """Run `ntt_step` to the end of the transfer: `fit` with this step.

    **Arguments:**

    - `state`: from `ntt_init`, or of a run that goes on from where it stopped.
    - `batches`: yields arrays `[batch, ...]`, or tuples or lists that begin with one (labels are
      ignored); of tensors, too, as a torch `DataLoader` does.
      Of a batch of odd size, as the last one of an epoch may be, one sample is left out. See `fit`
      for their number.
    - `num_steps`: the step to stop after, counted from the beginning of the transfer;
      that of the method by default.
    - `validation`: held-out samples on which the metrics are taken too; an even number.
    - `log_every`: steps between two rows of the history; `None` for the last row only.
    - `on_log`: called with the state and each new row.
    - `on_step`, `window`: for runs that are saved and resumed; see `fit`.

    **Returns:**

    The final state, and rows `{"step": int, "train": {...}, "validation": {...}}` with the
    fields of `NTTMetrics` and its `terms` as floats: `"train"` the means over the steps since the
    row before, `"validation"` those of the state, where samples were given; then there is a row at
    step 0, too. See `fit`.

    **Raises:**

    `ValueError` for samples that do not fit the model or cannot be halved, batches that run
    out, and a refresh whose scores cannot rank the weights; `DivergenceError` when the loss is NaN
    or infinite.

    **Warns:**

    Once, when a batch has an odd number of samples; at the end, by `LayerCollapseWarning`, of empty
    layers and of outputs without a path from the input.
    """
    num_steps = state.method.num_steps if num_steps is None else num_steps
    if num_steps is None:
        raise ValueError("transfer: give `num_steps` here or in NTTConfig.")
    check_room("transfer", state)
    observe, first, newest, shape = {}, True, state, None
    if validation is not None:
        held_out = _fitting("transfer: validation", state.teacher, validation)
        observe["validation"] = lambda state: _floats(_evaluate(state, held_out))

    def step(state: NTTState, x: Any) -> tuple[NTTState, NTTMetrics]:
        nonlocal first, newest, shape
        check_halves("transfer", x)
        x = spread("transfer", x, whole=True)  # the step tiles it
        if first:
            shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
            x = _fitting("transfer", state.teacher, x)
        state, metrics = _step(state, jnp.asarray(x))
        if first and int(state.step) == 1 and bool(jnp.isfinite(metrics.loss)):
            check_first_update("transfer", state.student)
        first, newest = False, state
        return state, metrics

    try:
        state, history = fit(
            step,
            replicate(state),
            _Even(batches, int(state.step)),
            num_steps=num_steps,
            log_every=log_every,
            observe=observe,
            on_log=on_log,
            on_step=on_step,
            window=window,
            name="transfer",
        )
    except DivergenceError as error:
        _explain_lost(newest, error)
        raise
    if shape is not None:
        check_collapse(state.student, shape, caller="transfer")
    return state, history


def _explain_lost(state: NTTState, error: DivergenceError) -> None:
    """Raise what lies behind a NaN that a refresh without a mask made."""
    if not (state.method.refreshes and bool(state.method.sparsity.lost(state.student.mask))):
        return
    refresh = type(state.method.refresh).__name__
    raise ValueError(
        f"transfer: the scores of {refresh} cannot rank the weights after step {error.step} (most "
        "of a layer equal, zero, infinite or NaN), so that no mask can be taken from them; look at "
        "what they measure there, or keep the mask (NoRefresh(), mask_every=None)."
    ) from error


def _step(state: NTTState, x: Array) -> tuple[NTTState, NTTMetrics]:
    """`ntt_step`, compiled, without a copy of the teacher, which it leaves as it is."""
    (student, opt_state, step, support), metrics = _changed(state, x)
    teacher, key, method = state.teacher, state.key, state.method
    return NTTState(teacher, student, opt_state, step, key, support, method), metrics


@eqx.filter_jit
def _changed(state: NTTState, x: Array) -> tuple[Any, NTTMetrics]:
    state, metrics = ntt_step(state, x)
    return (state.student, state.opt_state, state.step, state.support), metrics


_evaluate = eqx.filter_jit(ntt_evaluate)


class _Even:
    """The samples of batches, an even number each time.

    Of an odd number, as an epoch's last batch may have, one is left out, and said once. A single
    sample is passed over, unless the run begins with it or another one follows.
    """

    def __init__(self, batches: Iterable[Any], step: int):
        self._batches, self._step = batches, step
        self._told, self._before = False, 1  # the size of the batch before

    def __iter__(self) -> Iterator[Any]:
        for batch in self._batches:
            x: Any = batch[0] if isinstance(batch, tuple | list) and batch else batch
            if hasattr(x, "__array__") and not isinstance(x, Array | np.ndarray):
                x = as_arrays("transfer", x)  # a tensor of another library
            size = x.shape[0] if len(getattr(x, "shape", ())) else 0
            before, self._before = self._before, size
            odd = size > 2 and size % 2 == 1 or size == 1 and before > 1
            if odd and not self._told:
                self._told = True
                warnings.warn(
                    f"transfer: the batch of step {self._step + 1} has {size} samples, and the "
                    "kernel is taken between two halves: one sample is left out, here and in other "
                    "odd batches.",
                    stacklevel=5,  # through the two generators, `fit` and `transfer`
                )
            if odd and size == 1:
                continue
            self._step += 1
            yield x[:-1] if odd else x


def _fitting(caller: str, teacher: PyTree, x: Any) -> Array:
    """The samples as an array that can be halved and that the model takes."""
    check_halves(caller, x)
    x = check_samples(caller, x)
    sample_output(caller, as_inference(teacher), sample_of(x))
    return x


def _floats(metrics: NTTMetrics) -> dict[str, float]:
    return {name: float(value) for name, value in scalars(metrics).items()}
