"""The kernel over training: an observer for `train`, `transfer` and `fit`."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from .._batch import as_array
from .._checks import check_count, check_finite
from .._ntk import ntk
from .._types import KernelKind
from ._diagnostics import effective_rank
from ._regression import kernel_matrix


class KernelObserver(eqx.Module):
    """Records the kernel of fixed samples in each row of a history.

        history = ntt.train(..., log_every=50, observe={"kernel": ntt.KernelObserver(x, y)})

    The kernel `[N K, N K]` is formed, so a few hundred samples are enough. For a transfer it is the
    student's.

    Attributes:
        x: the N samples.
        targets: `[N, K]`, such as one-hot labels; `None` for no alignment.
        num_eigenvalues: how many of the largest eigenvalues to record.
        kernel: `"active"` or `"ambient"`.
    """

    x: Shaped[Array | np.ndarray, "n ..."]
    targets: Float[Array | np.ndarray, "samples k"] | None = None
    num_eigenvalues: int = eqx.field(static=True, default=5)
    kernel: KernelKind = eqx.field(static=True, default="active")

    def __check_init__(self) -> None:
        """Reject counts below 1 and targets that are not finite."""
        check_count("KernelObserver: num_eigenvalues", self.num_eigenvalues)
        if self.targets is not None:
            targets = as_array("KernelObserver", "targets", self.targets)
            check_finite("KernelObserver", "targets", targets)

    def __call__(self, state: Any) -> dict[str, float]:
        """Numbers of the kernel at a state.

        `trace`, `effective_rank` (the exponential of the spectrum's entropy), `eigenvalue_1` and so
        on, and with targets `alignment`, centred, as `kernel_alignment` defines it.

        Args:
            state: of `train`, `transfer`, or anything with a `model` or a `student`.
        """
        model = state.student if hasattr(state, "student") else state.model
        theta = ntk(eqx.nn.inference_mode(model), jnp.asarray(self.x), kernel=self.kernel)
        check_finite("KernelObserver", "the kernel", theta)
        matrix = np.asarray(kernel_matrix(theta), np.float64)
        spectrum = np.maximum(np.linalg.eigvalsh((matrix + matrix.T) / 2)[::-1], 0.0)
        row = {"trace": float(spectrum.sum()), "effective_rank": effective_rank(spectrum)}
        if self.targets is not None:
            targets = np.asarray(self.targets, np.float64)
            if targets.shape != (theta.shape[0], theta.shape[2]):
                raise ValueError(
                    f"KernelObserver: targets must be [{theta.shape[0]}, {theta.shape[2]}], got "
                    f"{list(targets.shape)}."
                )
            row["alignment"] = _with_targets(matrix, targets)
        for n, value in enumerate(spectrum[: self.num_eigenvalues], 1):
            row[f"eigenvalue_{n}"] = float(value)
        return row


def _with_targets(matrix: np.ndarray, y: np.ndarray) -> float:
    """The centred alignment of the kernel's matrix with `y y^T`, over all pairs of outputs."""
    n, k = y.shape
    theta = matrix.reshape(n, k, n, k)
    theta = theta - theta.mean(axis=0, keepdims=True)
    theta = (theta - theta.mean(axis=2, keepdims=True)).reshape(n * k, n * k)
    y = (y - y.mean(axis=0)).reshape(-1)
    size = np.linalg.norm(theta) * float(y @ y)
    return float(y @ theta @ y / size) if size > 0 else 0.0
