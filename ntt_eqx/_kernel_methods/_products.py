"""Products of a kernel with vectors of NumPy, for what iterates on the host."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from .._ntk import AbstractNTKOperator

_BLOCK = 32  # vectors that share a product


class HostProduct:
    """Products of a kernel with matrices `[N K, R]` of NumPy, in float64."""

    def __init__(self, caller: str, operator: AbstractNTKOperator):
        self._caller, self._operator = caller, operator
        self.rows, self.dtype = operator.shape[0], operator.in_structure().dtype
        self.eps = float(jnp.finfo(operator.in_structure().dtype).eps)
        self.count = 0  # vectors multiplied so far

    def __call__(self, vectors: np.ndarray) -> np.ndarray:
        """The product with one vector, or with the columns of a matrix."""
        like = self._operator.in_structure()
        if vectors.ndim == 1:
            return self(vectors[:, None])[:, 0]
        found = []
        for start in range(0, vectors.shape[1], _BLOCK):
            part = vectors[:, start : start + _BLOCK]
            v = jnp.asarray(part.reshape(*like.shape, -1), like.dtype)
            one = part.shape[1] == 1
            product = self._operator.mv(v[..., 0])[..., None] if one else self._operator.mv(v)
            found.append(np.asarray(product, np.float64).reshape(-1, part.shape[1]))
        self.count += vectors.shape[1]
        result = np.concatenate(found, axis=1)
        if not np.isfinite(result).all():
            raise ValueError(
                f"{self._caller}: a product of the kernel has NaN or infinite entries."
            )
        return result


def scipy_operator(rows: int, product: Callable[[np.ndarray], np.ndarray]) -> Any:
    """A square operator of float64 for SciPy's solvers."""
    from scipy.sparse.linalg import LinearOperator  # 0.2 seconds, which `import ntt_eqx` saves

    make: Any = LinearOperator  # its constructor is annotated wrongly
    return make((rows, rows), matvec=product, dtype=np.float64)


def check_symmetric(caller: str, operator: Any) -> None:
    """Raise `ValueError` unless `operator` is one, and the kernel of a batch with itself."""
    if not isinstance(operator, AbstractNTKOperator):
        raise ValueError(
            f"{caller}: needs a kernel as an operator, ntk_operator(model, x), got "
            f"{type(operator).__name__}."
        )
    if not operator.is_symmetric:
        raise ValueError(
            f"{caller}: the operator must be that of a batch with itself, ntk_operator(model, x)."
        )
