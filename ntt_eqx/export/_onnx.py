"""ONNX files, compared with the model before they are written."""

import contextlib
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from .._types import PyTree
from ._errors import ExportError, require
from ._format import AbstractFormat, Exported, Run, export
from ._safetensors import Layout

Quantised = Literal["dynamic", "static"]

_LARGEST = 2**31 - 1  # bytes of a protocol buffer, and so of an ONNX file with all its weights


class Onnx(AbstractFormat):
    """`.onnx` files, run by `onnxruntime`."""

    layout: Layout = "dense"
    quantise: Quantised | None = None

    def encode(self, caller: str, model: PyTree, x: Array) -> bytes:
        """The content of a file."""
        proto = _converted(caller, model, x)
        if self.quantise is not None:
            proto = _quantised(caller, proto, np.asarray(x), self.quantise)
        if self.layout == "sparse":
            _make_sparse(caller, proto.graph)
        if proto.ByteSize() > _LARGEST:
            raise NotImplementedError(
                f"{caller}: {type(model).__name__} takes more than the 2 GB of an ONNX file."
            )
        return proto.SerializeToString()

    def load(self, caller: str, content: bytes) -> Run:
        """A session of `onnxruntime`."""
        runtime = require(caller, "onnxruntime")
        try:
            session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise ExportError(f"{caller}: onnxruntime cannot run the file ({error}).") from error
        return lambda x: session.run(None, {"x": x})[0]

    def dense(self) -> "Onnx":
        """All weights, in the dtype of the model."""
        return Onnx()


def save_onnx(
    path: str | os.PathLike[str],
    model: PyTree,
    x: Shaped[Array | np.ndarray, "batch ..."],
    *,
    layout: Layout = "dense",
    quantise: Quantised | None = None,
    compact: bool = True,
    tolerance: float | None = None,
    measure: bool = False,
) -> Exported:
    """Write a model to an ONNX file, after running it in `onnxruntime` on the samples `x`.

    The file maps `x` (`[batch, ...]`, any number of samples) to `outputs` (`[batch, ...]`), in
    inference mode, with the weights inside and zeros where the mask is `False`.

    **Arguments:**

    - `path`: the file; it is written aside and renamed when it is complete.
    - `model`: a `SparseModel` or any other Equinox model for one sample.
    - `x`: samples to compare on, such as test images as the model takes them (standardised); they
      set shape and dtype of the input.
    - `layout`: `"dense"`, which every runtime reads; or `"sparse"`, a smaller file in which weights
      that are mostly zeros are sparse initialisers; `onnxruntime` reads it, few others do.
    - `quantise`: `"dynamic"` stores weights in 8 bits and quantises activations as they come;
      `"static"` quantises them by the ranges that they have on `x`. Both are `onnxruntime`'s own,
      and change the outputs: look at the accuracy.
    - `compact`: leave out what cannot matter first (`ntt.compact`), where the model has a mask and
      its program allows it.
    - `tolerance`: the largest difference of outputs from the model's own that is accepted, as a
      share of the largest output where that is above 1; left out, 1e-5, or eight roundings of
      outputs in half precision, and any for 8 bits.
    - `measure`: also time the file and, beside it, the same network with all weights whole.

    **Returns:**

    An `Exported`.

    **Raises:**

    `ExportError` if the outputs differ by more; nothing is written then. `NotImplementedError` if
    `jax2onnx` cannot convert an operation of the model, or the file would exceed 2 GB. `ValueError`
    if the model does not take `x`. `ImportError` if a package is not installed.
    """
    caller = "save_onnx"
    if layout not in ("sparse", "dense"):
        raise ValueError(f"{caller}: layout must be 'sparse' or 'dense', got {layout!r}.")
    if quantise not in (None, "dynamic", "static"):
        raise ValueError(f"{caller}: quantise must be 'dynamic' or 'static', got {quantise!r}.")
    if tolerance is None and quantise is not None:
        tolerance = float("inf")
    options = {"compact": compact, "tolerance": tolerance, "measure": measure}
    return export(caller, Onnx(layout, quantise), path, model, x, **options)


def _converted(caller: str, plain: PyTree, x: Array) -> Any:
    with _quiet():
        jax2onnx = require(caller, "jax2onnx")
    spec = SimpleNamespace(shape=("batch", *x.shape[1:]), dtype=np.dtype(x.dtype))
    name = type(plain).__name__
    try:
        with _quiet(), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return jax2onnx.to_onnx(
                jax.vmap(plain),
                [spec],
                model_name=name,
                enable_double_precision=x.dtype == jnp.float64,
                input_names=["x"],
                output_names=["outputs"],
            )
    except Exception as error:
        reason = str(error).strip().split("\n")[0][:300]
        raise NotImplementedError(
            f"{caller}: jax2onnx cannot convert {name} ({type(error).__name__}: {reason})."
        ) from error


def _quantised(caller: str, proto: Any, x: np.ndarray, how: Quantised) -> Any:
    """The graph with weights of 8 bits, by `onnxruntime`, which reads and writes files."""
    quantization = require(caller, "onnxruntime.quantization")
    onnx = require(caller, "onnx")
    with tempfile.TemporaryDirectory() as folder, _quiet():
        source, target = (str(Path(folder) / f"{name}.onnx") for name in ("in", "out"))
        onnx.save(proto, source)
        try:
            if how == "dynamic":
                quantization.quantize_dynamic(source, target)
            else:
                quantization.quantize_static(
                    source,
                    target,
                    _Samples(x),
                    quant_format=quantization.QuantFormat.QDQ,
                    per_channel=True,
                )
        except Exception as error:
            reason = str(error).strip().split("\n")[0][:300]
            raise NotImplementedError(
                f"{caller}: onnxruntime cannot quantise the network "
                f"({type(error).__name__}: {reason})."
            ) from error
        return onnx.load(target)


class _Samples:
    """The samples that set the ranges of activations, in the form that `onnxruntime` reads."""

    def __init__(self, x: np.ndarray):
        self._rest = iter([{"x": x[n : n + 1]} for n in range(len(x))])

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next sample, `None` after the last."""
        return next(self._rest, None)


def _make_sparse(caller: str, graph: Any) -> None:
    """Store constants of `graph` as indices and values where that is smaller."""
    helper = require(caller, "onnx.helper")
    numpy_helper = require(caller, "onnx.numpy_helper")
    dense = []
    for tensor in graph.initializer:
        values = numpy_helper.to_array(tensor)
        flat = np.flatnonzero(values)
        if values.ndim < 2 or len(flat) * (8 + values.itemsize) >= values.nbytes or not len(flat):
            dense.append(tensor)
            continue
        graph.sparse_initializer.append(
            helper.make_sparse_tensor(
                numpy_helper.from_array(values.reshape(-1)[flat], tensor.name),
                numpy_helper.from_array(flat.astype(np.int64), f"{tensor.name}.indices"),
                list(values.shape),
            )
        )
    del graph.initializer[:]
    graph.initializer.extend(dense)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the converter's and the quantiser's messages about their internals."""
    logs = [logging.getLogger(name) for name in ("onnx_ir", None)]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)
