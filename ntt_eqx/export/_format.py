"""From a model to a file that another runtime runs: compact, encode, compare, time, write."""

import abc
import dataclasses
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .._batch import as_array
from .._checks import check_batch, check_finite, sample_of, sample_output
from .._compact import Compacted, compact as compacted_model
from .._files import write_whole
from .._sparse import SparseModel
from .._types import PyTree
from ._errors import ExportError

Run = Callable[[np.ndarray], np.ndarray]

BATCHES = (1, 64)  # samples at a time that a measurement takes
_ROUNDS, _LEAST = 7, 0.01  # of a measurement; the seconds of one


@dataclasses.dataclass(frozen=True)
class Exported:
    """What an export wrote; `print` it for a sentence.

    Attributes:
        bytes: of the file.
        difference: largest absolute difference of an output, in the runtime that the file is for,
            from the model's own, with all samples together and one by one.
        compacted: what `compact` made of the model; `None` where it did not.
        reason: why the model was not compacted; `None` where it was.
        agreement: share of the samples `x` whose largest output stayed the same; `None` for
            outputs that are no vectors.
        milliseconds: measured time of 1 and of 64 samples in the runtime; empty if not measured.
        dense_bytes: of the same format with all arrays whole; `None` if not measured.
        dense_milliseconds: the same times with all arrays whole.
    """

    bytes: int
    difference: float
    compacted: Compacted | None = None
    reason: str | None = None
    agreement: float | None = None
    milliseconds: dict[int, float] = dataclasses.field(default_factory=dict)
    dense_bytes: int | None = None
    dense_milliseconds: dict[int, float] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        """Bytes, parameters, times and the difference."""
        said = [f"{self.bytes:,} bytes"]
        if self.dense_bytes is not None:
            said[0] += f" ({100 * self.bytes / self.dense_bytes:.3g} % of dense)"
        if self.compacted is not None:
            before, after = self.compacted.parameters, self.compacted.compact_parameters
            said.append(f"compacted from {before:,} to {after:,} parameters")
        if self.reason is not None:
            said.append(f"not compacted: {self.reason}")
        for size, found in self.milliseconds.items():
            dense = self.dense_milliseconds[size]
            said.append(
                f"{size} sample{'s' * (size > 1)} in {found:.3g} ms (dense {dense:.3g} ms, "
                f"{dense / found:.3g} times)"
            )
        said.append(f"outputs differ by {self.difference:.2g}")
        if self.agreement is not None and self.agreement < 1:
            said.append(f"the largest output is the same for {100 * self.agreement:.4g} %")
        return "; ".join(said)


class AbstractFormat(eqx.Module):
    """A kind of file, and the runtime that runs it."""

    @abc.abstractmethod
    def encode(self, caller: str, model: PyTree, x: Array) -> bytes:
        """The content of a file with a plain model for samples such as `x`."""

    @abc.abstractmethod
    def load(self, caller: str, content: bytes) -> Run:
        """The function from samples to outputs that a file holds."""

    @abc.abstractmethod
    def dense(self) -> "AbstractFormat":
        """The same with every array whole, to be compared with."""


def export(
    caller: str,
    format: AbstractFormat,
    path: str | os.PathLike[str],
    model: PyTree,
    x: Any,
    *,
    compact: bool,
    tolerance: float | None,
    measure: bool,
) -> Exported:
    """Write `model` in a format, after comparing what its runtime computes with the model's own."""
    x = as_array(caller, "x", x)
    check_batch(f"{caller}: x", x)
    check_finite(caller, "x", x)
    plain = _plain(model)
    sample_output(caller, plain, sample_of(x))
    small, compacted, reason = plain, None, None
    if compact and isinstance(model, SparseModel):
        try:
            compacted = compacted_model(model, x)
            small = _plain(compacted.model)
        except ValueError as error:
            reason = str(error).removeprefix("compact: ")
    content = format.encode(caller, small, x)
    run = format.load(caller, content)
    difference, agreement = _compared(caller, plain, x, run, tolerance)
    found = Exported(len(content), difference, compacted, reason, agreement)
    if measure:
        whole = format.dense().encode(caller, plain, x)
        times = timed([run, format.dense().load(caller, whole)], np.asarray(x))
        found = dataclasses.replace(
            found,
            milliseconds=times[0],
            dense_bytes=len(whole),
            dense_milliseconds=times[1],
        )
    write_whole(Path(path), content)
    return found


def timed(runs: list[Run], x: np.ndarray) -> list[dict[int, float]]:
    """Milliseconds of each function on 1 and on 64 samples: medians of rounds that take turns."""
    found: list[dict[int, float]] = [{} for _ in runs]
    for size in BATCHES:
        batch = np.resize(x, (size, *x.shape[1:]))
        repeats = [max(1, int(_LEAST / max(_seconds(run, batch, 2), 1e-9))) for run in runs]
        rounds = [
            [_seconds(run, batch, many) for run, many in zip(runs, repeats, strict=True)]
            for _ in range(_ROUNDS)
        ]
        for times, seconds in zip(found, zip(*rounds, strict=True), strict=True):
            times[size] = 1000 * statistics.median(seconds)
    return found


def _seconds(run: Run, batch: np.ndarray, repeats: int) -> float:
    """Seconds of one of some calls in a row."""
    start = time.perf_counter()
    for _ in range(repeats):
        run(batch)
    return (time.perf_counter() - start) / repeats


def _plain(model: PyTree) -> PyTree:
    return eqx.nn.inference_mode(model.to_dense() if isinstance(model, SparseModel) else model)


def _compared(
    caller: str, plain: PyTree, x: Array, run: Run, tolerance: float | None
) -> tuple[float, float | None]:
    """The largest difference of outputs, and the share of samples with the same largest one."""
    samples = np.asarray(x)
    try:
        together = run(samples)
        single = np.concatenate([run(samples[n : n + 1]) for n in range(len(samples))])
    except Exception as error:
        raise ExportError(f"{caller}: the file cannot be run ({error}).") from error
    with jax.default_matmul_precision("highest"):
        outputs = np.asarray(_outputs(plain, jnp.asarray(x)))
    found, own = (f"{a.dtype} {list(a.shape)}" for a in (together, outputs))
    if found != own:
        raise ExportError(f"{caller}: the file gives outputs {found}, the model {own}.")
    if tolerance is None:
        rounds = jnp.issubdtype(outputs.dtype, jnp.inexact)
        tolerance = max(1e-5, 8 * float(jnp.finfo(outputs.dtype).eps) if rounds else 0.0)
    difference = max(float(np.abs(f - outputs).max(initial=0)) for f in (together, single))
    allowed = tolerance * max(1.0, float(np.abs(outputs).max(initial=0)))
    if not difference <= allowed:
        raise ExportError(
            f"{caller}: the outputs of the file differ from the model's by {difference:.3g}, more "
            f"than {allowed:.3g}; nothing was written. `tolerance` accepts more."
        )
    if outputs.ndim != 2 or not outputs.size:
        return difference, None
    return difference, float(np.mean(together.argmax(axis=1) == outputs.argmax(axis=1)))


@eqx.filter_jit
def _outputs(plain: PyTree, x: Array) -> Array:
    return jax.vmap(plain)(x)
