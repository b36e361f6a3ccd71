"""Networks as plain arrays and steps, which NumPy and SciPy run."""

import io
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Array, Shaped

from .._files import write_whole
from .._types import PyTree
from ._format import AbstractFormat, Exported, Run, export

if TYPE_CHECKING:
    from .numpy_runner import Network

# The runner is imported where it is used: SciPy takes 0.4 s.

# Share of entries below which a sparse product is faster than a dense one, for 64 samples
SPARSE_BELOW = 0.1


class Numpy(AbstractFormat):
    """`.npz` files, run by `numpy_runner`."""

    sparse_below: float

    def encode(self, caller: str, model: PyTree, x: Array) -> bytes:
        """The content of an archive."""
        from ._lower import lowered
        from .numpy_runner import digest

        program, arrays = lowered(caller, model, x, self.sparse_below)
        text = json.dumps(program, separators=(",", ":")).encode()
        arrays["program"] = np.frombuffer(text, np.uint8)
        arrays["sha256"] = digest(arrays)
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **arrays)  # pyright: ignore[reportArgumentType]
        return buffer.getvalue()

    def load(self, caller: str, content: bytes) -> Run:
        """The network, in this process."""
        from .numpy_runner import decode

        return decode(content)

    def dense(self) -> "Numpy":
        """Every product by BLAS."""
        return Numpy(0.0)


def save_numpy(
    path: str | os.PathLike[str],
    model: PyTree,
    x: Shaped[Array | np.ndarray, "batch ..."],
    *,
    compact: bool = True,
    sparse_below: float = SPARSE_BELOW,
    tolerance: float | None = None,
    measure: bool = False,
) -> Exported:
    """Write a model to a `.npz` file that needs NumPy and SciPy alone, after running it on `x`.

    The file holds the steps of the traced model, in inference mode, and its arrays; weights of
    which few are kept are sparse matrices by rows (`scipy.sparse.csr_array`), and a convolution
    with such weights is one sparse matrix from images to maps of features. `load_numpy` reads it
    here, and the one file that `save_runner` writes reads it without JAX and without this package.
    Nothing in a file is executed or unpickled, and a truncated or changed file is refused.

    **Arguments:**

    - `path`: the file; it is written aside and renamed when it is complete.
    - `model`: a `SparseModel` or any other Equinox model for one sample.
    - `x`: samples to compare on, such as test images as the model takes them (standardised); they
      set shape and dtype of the input.
    - `compact`: leave out what cannot matter first (`ntt.compact`), where the model has a mask and
      its program allows it.
    - `sparse_below`: the density up to which a weight is sparse; 0 for never.
    - `tolerance`: the largest difference of outputs from the model's own that is accepted, as a
      share of the largest output where that is above 1; left out, 1e-5, or eight roundings of
      outputs in half precision.
    - `measure`: also time the file and, beside it, the same network with all weights whole.

    **Returns:**

    An `Exported`.

    **Raises:**

    `NotImplementedError` with the name of an operation that has no form in NumPy. `ExportError` if
    the outputs differ by more; nothing is written then. `ValueError` if the model does not take
    `x`. `ImportError` if SciPy is not installed.
    """
    form = Numpy(float(sparse_below))
    options = {"compact": compact, "tolerance": tolerance, "measure": measure}
    return export("save_numpy", form, path, model, x, **options)


def load_numpy(path: str | os.PathLike[str]) -> "Network":
    """Read a file of `save_numpy`.

    **Arguments:**

    - `path`: the file.

    **Returns:**

    The network, to be called with samples `[batch, ...]` in a NumPy array; it returns the outputs.

    **Raises:**

    `ValueError` that names the file if it is truncated, changed or something else. `OSError` if it
    cannot be read.
    """
    from .numpy_runner import load

    return load(path)


def save_runner(path: str | os.PathLike[str]) -> None:
    """Write the Python file that runs networks of `save_numpy` with NumPy and SciPy alone.

    `import` it for its function `load`, or run it: `python FILE network.npz x.npy outputs.npy`.

    **Arguments:**

    - `path`: the file, such as `numpy_runner.py`; one that exists is replaced.
    """
    source = Path(__file__).with_name("numpy_runner.py")
    write_whole(Path(path), source.read_bytes())
