"""Indices of every dtype into tables of any length, axes of length 0, and no NaN on the way."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.comparison import every_array, random_mask, relative_error, weighted_sum
from helpers.pieces import INSIDE, OUTSIDE
from helpers.tiers import as_users_compile

import ntt_eqx as ntt


class Table(eqx.Module):
    table: jax.Array
    idiom: str = eqx.field(static=True)

    def __call__(self, x):
        rows = (INSIDE | OUTSIDE | {"default": lambda t, v: jnp.take(t, v, axis=0)})[self.idiom](
            self.table, x
        )
        return jnp.sum(rows.reshape(-1, self.table.shape[1]), axis=0)


def test_bytes_into_a_table_of_300_rows():
    """Row 257 is not row 1."""
    table = Table(jnp.ones((300, 1)), "default")
    x = jnp.asarray([[1, 44], [1, 200], [3, 255]], jnp.uint8)
    expected = [[2, 1, 0], [1, 2, 0], [0, 0, 2]]
    np.testing.assert_array_equal(ntt.ntk(table, x)[:, :, 0, 0], expected)
    mask = ntt.sparsify(table, every_array)
    np.testing.assert_array_equal(ntt.ntk(mask, x)[:, :, 0, 0], expected)


CASES = [
    ("uint8", 257, "clipped"),
    ("int8", 129, "clipped"),
    ("int8", 300, "sliced"),
    ("int8", 300, "each sliced"),
    ("int16", 32769, "indexed"),
    ("uint16", 65537, "taken"),
    ("int8", 127, "filled"),
    ("int8", 128, "taken"),
    ("uint32", 5, "clipped"),
    ("uint32", 5, "filled"),
]


@as_users_compile
@pytest.mark.parametrize(("dtype", "rows", "idiom"), CASES)
def test_indices_of_every_dtype(dtype, rows, idiom):
    limits = np.iinfo(dtype)
    numbers = [0, 1, rows - 1, rows, 43, limits.max, limits.min, -1]
    numbers = [n for n in numbers if limits.min <= n <= min(limits.max, 2**32)]
    if idiom == "taken":
        numbers = [n for n in numbers if n < rows]
    x = jnp.asarray([[n, numbers[2 * k % len(numbers)]] for k, n in enumerate(numbers)], dtype)
    model = Table(jax.random.normal(jax.random.key(0), (rows, 2)), idiom)
    expected = ntt.ntk(model, x, implementation="jacobian")
    np.testing.assert_array_equal(ntt.ntk(model, x), expected)


def weights(*shapes):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def scanned(p, x):
    return p[1] @ jax.lax.scan(lambda h, w: (jnp.tanh(w @ h), None), x, p[0])[0]


def repeated(p, x):
    return p[1] @ jax.lax.fori_loop(0, 0, lambda _, h: jnp.tanh(p[0] @ h), x)


SIZES = {
    "no layers": (scanned, [(0, 3, 3), (2, 3)]),
    "no iterations": (repeated, [(3, 3), (2, 3)]),
    "no inputs": (lambda p, x: p[2] @ jnp.tanh(p[0] @ x[:0] + p[1]), [(4, 0), (4,), (2, 4)]),
    "no features": (lambda p, x: p[1] @ jnp.tanh(p[0] @ x) + p[2], [(0, 3), (2, 0), (2,)]),
    "no positions": (
        lambda p, x: p[2] @ (jax.vmap(lambda r: p[0] @ r + p[1])(x[None][:0]).sum(0) + p[1]),
        [(4, 3), (4,), (2, 4)],
    ),
    "no channels": (
        lambda p, x: p[1] @ (jax.lax.conv(x[None, None][:, :0], p[0], (1,), "VALID")[0, :, 0] + 1),
        [(3, 0, 2), (2, 3)],
    ),
    "no filters": (
        lambda p, x: p[1] @ x + jax.lax.conv(x[None, None], p[0], (1,), "VALID").sum(),
        [(0, 1, 2), (2, 3)],
    ),
    "no experts": (
        lambda p, x: p[1] @ x + jax.vmap(lambda w: w @ x)(p[0]).sum(0),
        [(0, 2, 3), (2, 3)],
    ),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", SIZES)
def test_axes_of_length_0(name, masked):
    function, shapes = SIZES[name]
    model = eqx.Partial(function, weights(*shapes))
    if masked:
        model = ntt.sparsify(model, every_array)
        model = model.with_mask(random_mask(model.mask, 0.6))
    (x,) = weights((3, 3))
    expected = ntt.ntk(model, x, implementation="jacobian")
    assert relative_error(ntt.ntk(model, x), expected) < 1e-5
    assert all(p.kept <= np.prod(p.shape) for p in ntt.explain(model, x).parameters)


class Small(eqx.Module):
    """Look-up, convolution, pool and dense layer."""

    table: jax.Array
    conv: eqx.nn.Conv1d
    dense: eqx.nn.Linear

    def __call__(self, x):
        y = jax.nn.relu(self.conv(self.table[x].T))
        return self.dense(jax.nn.softmax(eqx.nn.MaxPool1d(2, 2)(y).reshape(-1)))


def test_healthy_kernels_under_debug_nans(getkey):
    """Jitted and not: neither the kernel nor its gradient makes a NaN on the way."""
    model = Small(
        jax.random.normal(getkey(), (7, 3)),
        eqx.nn.Conv1d(3, 4, 3, key=getkey()),
        eqx.nn.Linear(8, 2, key=getkey()),
    )
    sparse = ntt.sparsify(model, every_array)
    sparse = sparse.with_mask(random_mask(sparse.mask, 0.5))
    x = jnp.asarray(np.random.default_rng(0).integers(0, 7, (3, 6)), jnp.uint8)
    slope = eqx.filter_value_and_grad(lambda m: weighted_sum(ntt.ntk(m, x)))
    with jax.debug_nans(True):
        for call in (slope, eqx.filter_jit(slope)):
            value, found = call(sparse)
            assert jnp.isfinite(value) and jax.tree.leaves(found)
