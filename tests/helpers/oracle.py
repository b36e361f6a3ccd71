"""The masked NTK products and their gradients in NumPy, float64, by plain loops of `einsum`.

Written from the formulas alone; nothing here is shared with the library.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

TOLERANCE = {"float32": 1e-5, "tf32": 1e-3, "bfloat16": 1e-2}
# The kernels run on the chip they are for where the tests have one, and are interpreted on a CPU.
KERNELS = {
    "gpu": ("pallas_gpu",),
    "tpu": ("pallas_tpu",),
    "cpu": ("pallas_gpu_interpret", "pallas_tpu_interpret"),
}[jax.default_backend()]
IMPLEMENTATIONS = ("reference", *KERNELS)


@dataclasses.dataclass(frozen=True)
class Sizes:
    n: int = 2
    m: int = 3
    k: int = 2
    l: int = 2  # noqa: E741
    i: int = 5
    j: int = 7
    s: int | None = None

    @property
    def shapes(self):
        s = () if self.s is None else (self.s,)
        return (
            (self.n, self.j, *s),
            (self.n, self.k, self.i, *s),
            (self.m, self.j, *s),
            (self.m, self.l, self.i, *s),
        )


def factors(sizes, *, seed=0, dtype=jnp.float32):
    """Four random factors, of mean other than zero, as arrays of `dtype`."""
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(0.3, 1.0, shape), dtype) for shape in sizes.shapes)


def random_mask(sizes, *, density=0.3, seed=0, kind="bool"):
    rng = np.random.default_rng(seed + 1)
    kept = rng.random((sizes.i, sizes.j)) < density
    if kind == "bool":
        return jnp.asarray(kept)
    return jnp.asarray(kept * rng.uniform(0.1, 2.0, kept.shape), jnp.float32)


def tangents(a, d):
    """T[n, k, i, j], for one position or many."""
    a, d = np.asarray(a, np.float64), np.asarray(d, np.float64)
    if a.ndim == 2:
        return np.einsum("nki,nj->nkij", d, a)
    return np.einsum("nkis,njs->nkij", d, a)


def product(a1, d1, a2, d2, mask):
    c = np.ones((d1.shape[2], a1.shape[1])) if mask is None else np.asarray(mask, np.float64)
    return np.einsum("ij,nkij,mlij->nmkl", c, tangents(a1, d1), tangents(a2, d2), optimize=True)


def gradient(a1, d1, a2, d2, mask, g):
    """The gradients of sum(g * product) in the four factors, through the tangents."""
    c, g = np.asarray(mask, np.float64), np.asarray(g, np.float64)
    t1_bar = np.einsum("nmkl,ij,mlij->nkij", g, c, tangents(a2, d2), optimize=True)
    t2_bar = np.einsum("nmkl,ij,nkij->mlij", g, c, tangents(a1, d1), optimize=True)
    return (*_of_factors(a1, d1, t1_bar), *_of_factors(a2, d2, t2_bar))


def _of_factors(a, d, t_bar):
    a, d = np.asarray(a, np.float64), np.asarray(d, np.float64)
    if a.ndim == 2:
        return np.einsum("nkij,nki->nj", t_bar, d), np.einsum("nkij,nj->nki", t_bar, a)
    return np.einsum("nkij,nkis->njs", t_bar, d), np.einsum("nkij,njs->nkis", t_bar, a)
