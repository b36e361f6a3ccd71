"""The masked NTK product from kernels: u, the sums over outputs, and the way back to activations.

    u[n,m,i]       = sum_j c[i,j] a1[n,j] a2[m,j]
    Theta[n,m,k,l] = sum_i d1[n,k,i] u[n,m,i] d2[m,l,i]
    a1_bar[n,j]    = sum_m a2[m,j] sum_i u_bar[n,m,i] c[i,j]

u has N M I entries, `1 / K` of what lies between it and Theta: it may as well be written, and its
cotangent is made once for both sides. The gradient takes u from the product where there is memory
to keep it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from .._blocks import block_bytes
from .._precision import Precision


@dataclasses.dataclass(frozen=True)
class Kernels:
    """What the product is made of; each takes `precision` and `interpret`, too.

    Attributes:
        u: `(a1, a2, c) -> u[n, m, i]`.
        theta: `(u, d1, d2) -> Theta[n, m, k, l]`.
        cotangents: `(g, u, d1, d2, sides=) -> (d1_bar, d2_bar, u_bar)`, `None` for a side that is
            not asked for.
        pulled: `(u_bar, a2, c) -> a1_bar`; that of `a2` is the same with the sides exchanged.
    """

    u: Callable[..., jax.Array]
    theta: Callable[..., jax.Array]
    cotangents: Callable[..., tuple[jax.Array | None, jax.Array | None, jax.Array]]
    pulled: Callable[..., jax.Array]

    def forward(
        self, a1, d1, a2, d2, c, *, precision: Precision, interpret: Any
    ) -> tuple[jax.Array, jax.Array | None]:
        """`Theta[n, m, k, l]` in float32, and u where it is kept for the gradient."""
        options = dict(precision=precision, interpret=interpret)
        u = self.u(a1, a2, c, **options)
        kept = u if u.size * u.dtype.itemsize <= block_bytes() else None
        return self.theta(u, d1, d2, **options), kept

    def backward(
        self,
        a1,
        d1,
        a2,
        d2,
        c,
        g,
        u,
        sides: tuple[bool, bool],
        *,
        precision: Precision,
        interpret: Any,
    ) -> list[jax.Array | None]:
        """Cotangents of `a1`, `d1`, `a2` and `d2`; `None` of a side that is not asked for."""
        options = dict(precision=precision, interpret=interpret)
        if u is None:
            u = self.u(a1, a2, c, **options)
        d1_bar, d2_bar, u_bar = self.cotangents(g, u, d1, d2, sides=sides, **options)
        a1_bar = self.pulled(u_bar, a2, c, **options) if sides[0] else None
        a2_bar = self.pulled(u_bar.swapaxes(0, 1), a1, c, **options) if sides[1] else None
        return [a1_bar, d1_bar, a2_bar, d2_bar]
