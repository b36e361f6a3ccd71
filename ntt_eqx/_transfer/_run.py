"""`transfer`: run all steps, with a history."""

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .._batch import as_array, as_stream, inputs_of, is_batch
from .._checks import sample_of, sample_output
from .._diagnosis import Diagnosis, Evidence, check_first_update, recording, weight_norms
from .._distribute import replicate, spread
from .._examples import as_inference, check_samples
from .._fit import History, Progress, Row, drive, scalars
from .._masks import check_collapse
from .._refreshes import cannot_rank
from .._sparse_layers import masked_layers
from .._types import PyTree
from ._given import with_optimizer
from ._method import check_last_step
from ._ntt_loss import NTTMetrics, check_halves
from ._state import NTTState, check_room, check_state
from ._step import ntt_evaluate, ntt_step


def transfer(
    state: NTTState,
    batches: Iterable[Any],
    *,
    num_steps: int | None = None,
    validation: Any = None,
    log_every: int | None = 100,
    on_log: Callable[[NTTState, Row], None] | None = None,
    on_step: Callable[[Progress[NTTState]], None] | None = None,
    window: Mapping[str, Sequence[float]] | None = None,
) -> tuple[NTTState, History]:
    """Run `ntt_step` to the end of the transfer: `fit` with this step.

    **Arguments:**

    - `state`: from `ntt_init`, or the stored state of a run to continue.
    - `batches`: yields arrays `[batch, ...]`, or tuples, lists, dicts or others that hold one (see
      `train`; labels are ignored); of tensors, too, as a torch `DataLoader` does.
      Of a batch of odd size, as the last one of an epoch may be, one sample is left out. See `fit`
      for their number. Or one batch, for all steps; of a list or a tuple, arrays of one dtype whose
      samples have one shape are batches, and any others are one batch, inputs first.
    - `num_steps`: the step to stop after, counted from the beginning of the transfer;
      that of the method by default.
    - `validation`: held-out samples on which the metrics are taken too: one batch, of an even
      number, or several in any form of `batches` but that of an iterator. Then the metrics are
      means over them, by their sizes, each without its last sample where it has an odd number.
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
    out, and a refresh whose scores cannot rank the weights; `DivergenceError`, which says what is
    wrong, when the loss is NaN or infinite, unless the optimiser skips such steps; see `fit`.

    **Warns:**

    Once, when a batch has an odd number of samples; at the end, by `LayerCollapseWarning`, of empty
    layers and of outputs without a path from the input.
    """
    check_state("transfer", state)
    num_steps = state.method.num_steps if num_steps is None else num_steps
    if num_steps is None:
        raise ValueError("transfer: give `num_steps` here or in NTTConfig.")
    check_room("transfer", state)
    check_last_step("transfer", state.method, num_steps)
    begin, observe, first, known = state, {}, True, None
    if validation is not None:
        held_out = list(_held_out(state.teacher, validation))
        if not held_out:
            raise ValueError("transfer: validation: there is no batch in it.")
        observe["validation"] = lambda state: _validated(state, held_out)

    def step(state: NTTState, x: Any) -> tuple[NTTState, NTTMetrics, Evidence]:
        nonlocal first, known
        check_halves("transfer", x)
        x = spread("transfer", as_array("transfer", "x", x), whole=True)  # the step tiles it
        if known is None or known.shape[1:] != x.shape[1:] or known.dtype != x.dtype:
            known = jax.ShapeDtypeStruct(x.shape, x.dtype)
            x = _fitting("transfer", state.teacher, x)
        state, metrics, norms = _step(state, x)
        if first and bool(jnp.isfinite(metrics.loss)):
            check_first_update("transfer", state.student, lambda: _gradient(begin, x))
        first = False
        return state, metrics, Evidence(x, norms)

    state, history = drive(
        step,
        replicate(state),
        _Even(as_stream("transfer: batches", batches, labels=False), int(state.step)),
        num_steps=num_steps,
        log_every=log_every,
        observe=observe,
        on_log=on_log,
        on_step=on_step,
        window=window,
        name="transfer",
        diagnosis=Diagnosis(
            lambda state: state.student,
            lambda state, x: None,  # its shape could be wrong, which a step's tracing tells
            _outputs,
            begin,
            _behind,
        ),
    )
    if known is not None:
        check_collapse(masked_layers(state.student), known, caller="transfer")
    return state, history


def _behind(state: NTTState, step: int) -> None:
    method = state.method
    due = method.refreshes and bool(method.due(jnp.int32(step)))
    if due and bool(method.sparsity.lost(state.student.mask)):
        raise cannot_rank("transfer", method.refresh, step, "NoRefresh(), mask_every=None")


def _step(state: NTTState, x: Array) -> tuple[NTTState, NTTMetrics, Array]:
    """`ntt_step`, compiled, without a copy of the teacher, which it leaves as it is."""
    changed, metrics, norms = _changed(state, x)
    return dataclasses.replace(state, **changed), metrics, norms


@eqx.filter_jit
def _changed(state: NTTState, x: Array) -> tuple[Any, NTTMetrics, Array]:
    norms = weight_norms(state.student)
    state, metrics = ntt_step(state, x)
    names = ("student", "opt_state", "step", "support", "entries")
    return {name: getattr(state, name) for name in names}, metrics, norms


@eqx.filter_jit
def _gradient(state: NTTState, x: Array) -> PyTree:
    """The gradient of the loss at a state, by a step that records it."""
    optimizer = recording()
    gradient = optimizer.init(eqx.filter(state.student, eqx.is_inexact_array))
    method = with_optimizer(state.method, optimizer)
    before = dataclasses.replace(state, opt_state=gradient, method=method)
    return ntt_step(before, x)[0].opt_state


@eqx.filter_jit
def _outputs(state: NTTState, x: Array) -> PyTree:
    return [jax.vmap(as_inference(model))(x) for model in (state.student, state.teacher)]


_evaluate = eqx.filter_jit(ntt_evaluate)


def _held_out(teacher: PyTree, validation: Any) -> Iterator[Array]:
    """The batches of held-out samples."""
    caller = "transfer: validation"
    alone, before = is_batch(validation, labels=False), 1
    for batch in as_stream(caller, validation, labels=False, again=True):
        x = _given(caller, batch)
        if not alone and len(getattr(x, "shape", ())):
            size, before = before, len(x)
            if len(x) == 1 < size:  # the last of an epoch
                continue
            x = x[: max(len(x) // 2 * 2, 1)]
        yield _fitting(caller, teacher, x)


def _validated(state: NTTState, held_out: list[Array]) -> dict[str, float]:
    """The metrics of held-out batches, each counted by its size."""
    found = [scalars(_evaluate(state, x)) for x in held_out]
    sizes = [len(x) for x in held_out]
    mean = lambda name: sum(n * float(m[name]) for n, m in zip(sizes, found, strict=True))
    return {name: mean(name) / sum(sizes) for name in found[0]}


def _given(caller: str, batch: Any) -> Any:
    """The inputs of a batch; those that no check can look at yet, of other libraries, as arrays."""
    x = inputs_of(caller, batch)
    foreign = hasattr(x, "__array__") and not isinstance(x, Array | np.ndarray)
    return as_array(caller, "x", x) if foreign else x


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
            x = _given("transfer", batch)
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
