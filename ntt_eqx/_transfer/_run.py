"""`transfer`: steps to the end, with a history."""

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, PyTree, Shaped

from .._checks import is_count, sample_of, sample_output
from .._errors import DivergenceError
from .._examples import as_inference, check_samples, next_batch
from .._optimise import check_first_update
from ._ntt_loss import NTTMetrics, check_halves
from ._state import NTTState
from ._step import ntt_evaluate, ntt_step


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
      Of a batch of odd size, as the last one of an epoch may be, one sample is left out.
    - `num_steps`: the step to stop after, counted from the beginning of the transfer;
      that of the method by default.
    - `validation`: held-out samples on which the metrics are taken too; an even number.
    - `log_every`: steps between two rows of the history; there is a row at the first and the last
      step, too.
    - `on_log`: called with the state and each new row.

    **Returns:**

    The final state, and rows `{"step": int, "train": {...}, "validation": {...}}` with the
    fields of `NTTMetrics` and its `terms` as floats; `"validation"` only where samples were given.

    **Raises:**

    `ValueError` for samples that do not fit the model or cannot be halved, and batches that run
    out; `DivergenceError` when the loss is NaN or infinite in a row.

    **Warns:**

    Once, when a batch has an odd number of samples.
    """
    num_steps = state.method.num_steps if num_steps is None else num_steps
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
    seen = [0, 0]  # the last step that had a batch, and the last that had an odd one
    for step in range(first, num_steps + 1):
        x = _next_samples(source, step, num_steps, seen)
        if step == first:
            x = _fitting("transfer", state.teacher, x)
        state, metrics = _step(state, jnp.asarray(x))
        if step == first and math.isfinite(float(metrics.loss)):
            check_first_update("transfer", state.student)
        if step == 1 or step % log_every == 0 or step == num_steps:
            log(state, metrics)
    return state, history


_step = eqx.filter_jit(ntt_step)
_evaluate = eqx.filter_jit(ntt_evaluate)


def _next_samples(source: Iterator[Any], step: int, num_steps: int, seen: list[int]) -> Any:
    """The samples of the next batch, an even number of them.

    Of an odd number, as an epoch's last batch may have, one is left out, and said once. A single
    sample is passed over, unless the run begins with it or another one follows.
    """
    x = _inputs(next_batch("transfer", source, step - 1, num_steps))
    size = x.shape[0] if len(getattr(x, "shape", ())) else 0
    if size > 2 and size % 2 or size == 1 and seen[0] > 0:
        if seen[1] == 0:
            warnings.warn(
                f"transfer: the batch of step {step} has {size} samples, and the kernel is taken "
                "between two halves: one sample is left out, here and in other odd batches.",
                stacklevel=3,
            )
        seen[1] = step
        if size == 1:
            x = _inputs(next_batch("transfer", source, step - 1, num_steps))
        x = x[: x.shape[0] // 2 * 2] if x.shape[0] > 1 else x
    seen[0] = step
    check_halves("transfer", x)
    return x


def _inputs(batch: Any) -> Any:
    return batch[0] if isinstance(batch, tuple) else batch


def _fitting(caller: str, teacher: PyTree, x: Any) -> Array:
    """The samples as an array that can be halved and that the model takes."""
    check_halves(caller, x)
    x = check_samples(caller, x)
    sample_output(caller, as_inference(teacher), sample_of(x))
    return x


def _floats(metrics: NTTMetrics) -> dict[str, float]:
    fields = [f.name for f in dataclasses.fields(metrics) if f.name != "terms"]
    found = {name: float(getattr(metrics, name)) for name in fields}
    return found | {name: float(value) for name, value in metrics.terms.items()}
