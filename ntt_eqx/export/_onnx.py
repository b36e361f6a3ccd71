"""ONNX files, compared with the model before they are written."""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree, Shaped

from .._checks import check_batch, check_finite, sample_of, sample_output
from .._files import write_whole
from .._sparse import SparseModel
from ._errors import ExportError, require
from ._safetensors import Layout

_LARGEST = 2**31 - 1  # bytes of a protocol buffer, and so of an ONNX file with all its weights


def save_onnx(
    path: str | os.PathLike[str],
    model: PyTree,
    x: Shaped[Array | np.ndarray, "batch ..."],
    *,
    layout: Layout = "dense",
    tolerance: float = 1e-5,
) -> float:
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
    - `tolerance`: the largest difference of outputs from the model's own that is accepted, as a
      share of the largest output where that is above 1.

    **Returns:**

    The largest absolute difference of the outputs on `x`, taken together and one by one.

    **Raises:**

    `ExportError` if the outputs differ by more; nothing is written then. `NotImplementedError` if
    `jax2onnx` cannot convert an operation of the model, or the file would exceed 2 GB. `ValueError`
    if the model does not take `x`. `ImportError` if a package is not installed.
    """
    caller = "save_onnx"
    if layout not in ("sparse", "dense"):
        raise ValueError(f"{caller}: layout must be 'sparse' or 'dense', got {layout!r}.")
    check_batch(f"{caller}: x", x)
    check_finite(caller, "x", x)
    plain = model.to_dense() if isinstance(model, SparseModel) else model
    plain = eqx.nn.inference_mode(plain)
    sample_output(caller, plain, sample_of(x))
    samples = jnp.asarray(x)
    content = _converted(caller, plain, samples, layout)
    difference = _compare(caller, plain, np.asarray(samples), content, tolerance)
    write_whole(Path(path), content)
    return difference


def _converted(caller: str, plain: PyTree, x: Array, layout: Layout) -> bytes:
    with _quiet():
        jax2onnx = require(caller, "jax2onnx")
    spec = SimpleNamespace(shape=("batch", *x.shape[1:]), dtype=np.dtype(x.dtype))
    name = type(plain).__name__
    try:
        with _quiet(), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            proto = jax2onnx.to_onnx(
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
    if layout == "sparse":
        _make_sparse(caller, proto.graph)
    if proto.ByteSize() > _LARGEST:
        raise NotImplementedError(f"{caller}: {name} takes more than the 2 GB of an ONNX file.")
    return proto.SerializeToString()


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


def _compare(caller: str, plain: PyTree, x: np.ndarray, content: bytes, tolerance: float) -> float:
    runtime = require(caller, "onnxruntime")
    try:
        session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])
        together = session.run(None, {"x": x})[0]
        single = np.concatenate([session.run(None, {"x": x[i : i + 1]})[0] for i in range(len(x))])
    except Exception as error:
        raise ExportError(f"{caller}: onnxruntime cannot run the file ({error}).") from error
    with jax.default_matmul_precision("highest"):
        outputs = np.asarray(eqx.filter_jit(lambda f, x: jax.vmap(f)(x))(plain, jnp.asarray(x)))
    if together.shape != outputs.shape:
        raise ExportError(
            f"{caller}: the file gives outputs {together.shape}, the model {outputs.shape}."
        )
    difference = max(float(np.abs(found - outputs).max()) for found in (together, single))
    allowed = tolerance * max(1.0, float(np.abs(outputs).max()))
    if not difference <= allowed:
        raise ExportError(
            f"{caller}: the outputs of the file differ from the model's by {difference:.3g}, more "
            f"than {allowed:.3g}; nothing was written."
        )
    return difference


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the converter's messages about its internals."""
    log = logging.getLogger("onnx_ir")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
