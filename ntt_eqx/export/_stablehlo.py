"""Networks as StableHLO, the portable programs of XLA, by `jax.export`."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from .._types import PyTree
from ._errors import require
from ._format import AbstractFormat, Exported, Run, export

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
_END = b"ntt-eqx stablehlo 1\n"  # behind what jax.export wrote, which its own reader does not mind
_DIGEST = 32  # bytes of a SHA-256


class StableHLO(AbstractFormat):
    """Files of `jax.export`, run by XLA."""

    platforms: tuple[str, ...]

    def encode(self, caller: str, model: PyTree, x: Array) -> bytes:
        """The content of a file."""
        require(caller, "flatbuffers")
        (batch,) = jax.export.symbolic_shape("batch")
        spec = jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype)
        try:
            with jax.default_matmul_precision("highest"):
                function = jax.jit(jax.vmap(model))
                content = jax.export.export(function, platforms=self.platforms)(spec).serialize()
        except Exception as error:  # rules that need a number of samples, or another platform's
            reason = str(error).strip().split("\n")[0][:300]
            raise NotImplementedError(
                f"{caller}: {type(model).__name__} cannot be exported for any number of samples on "
                f"{', '.join(self.platforms)} ({type(error).__name__}: {reason})."
            ) from error
        return bytes(content) + hashlib.sha256(content).digest() + _END

    def load(self, caller: str, content: bytes) -> Run:
        """The function, compiled by JAX."""
        call = jax.jit(_decoded(content).call)
        return lambda x: np.asarray(call(jnp.asarray(x)))

    def dense(self) -> "StableHLO":
        """The same: XLA knows no sparse weights."""
        return self


def save_stablehlo(
    path: str | os.PathLike[str],
    model: PyTree,
    x: Shaped[Array | np.ndarray, "batch ..."],
    *,
    platforms: Sequence[str] = PLATFORMS,
    compact: bool = True,
    tolerance: float | None = None,
    measure: bool = False,
) -> Exported:
    """Write a model to a StableHLO file for any number of samples, after running it on `x`.

    `load_stablehlo` reads it without the model's classes, and so does JAX itself:
    `jax.export.deserialize(bytearray(content)).call(x)`. JAX reads its files for six months, and
    longer in most cases.

    **Arguments:**

    - `path`: the file; it is written aside and renamed when it is complete.
    - `model`: a `SparseModel` or any other Equinox model for one sample, in inference mode in the
      file, with zeros where the mask is `False`.
    - `x`: samples to compare on; they set shape and dtype of the input.
    - `platforms`: where the file can run.
    - `compact`: leave out what cannot matter first (`ntt.compact`), where the model has a mask and
      its program allows it.
    - `tolerance`: the largest difference of outputs from the model's own that is accepted, as a
      share of the largest output where that is above 1; left out, 1e-5, or eight roundings of
      outputs in half precision.
    - `measure`: also time the file and, beside it, the same network without `compact`.

    **Returns:**

    An `Exported`.

    **Raises:**

    `NotImplementedError` if `jax.export` cannot write the model. `ExportError` if the outputs
    differ by more; nothing is written then. `ValueError` if the model does not take `x`.
    `ImportError` if `flatbuffers` is not installed.
    """
    form = StableHLO(tuple(platforms))
    options = {"compact": compact, "tolerance": tolerance, "measure": measure}
    return export("save_stablehlo", form, path, model, x, **options)


def load_stablehlo(path: str | os.PathLike[str]) -> jax.export.Exported:
    """Read a file of `save_stablehlo`.

    JAX may execute what a file of an evil author asks for: read files that you trust.

    **Arguments:**

    - `path`: the file.

    **Returns:**

    A `jax.export.Exported`; its `call(x)` takes samples `[batch, ...]` and returns the outputs.

    **Raises:**

    `ValueError` that names the file if it is truncated, changed or something else. `OSError` if it
    cannot be read.
    """
    require("load_stablehlo", "flatbuffers")
    content = Path(path).read_bytes()
    try:
        return _decoded(content)
    except Exception as error:
        raise ValueError(
            f"load_stablehlo: {path} is damaged, or no file of save_stablehlo ({error})."
        ) from error


def _decoded(content: bytes) -> Any:
    inner, found = content[: -_DIGEST - len(_END)], content[-_DIGEST - len(_END) : -len(_END)]
    if not content.endswith(_END) or hashlib.sha256(inner).digest() != found:
        raise ValueError("its content does not match its checksum")
    return jax.export.deserialize(bytearray(inner))
