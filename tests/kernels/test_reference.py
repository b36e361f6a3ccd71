"""Gathered masks: the non-zeros of a row-wise random mask give what the whole mask gives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import oracle
from helpers.comparison import relative_error
from helpers.oracle import Sizes
from jax.test_util import check_grads

from ntt_eqx.kernels import (
    gather_rows,
    gathered_tangents,
    masked_ntk_diagonal_reference,
    masked_ntk_reference,
    masked_tangent_ntk,
)
from ntt_eqx_kernels import _blocks
from ntt_eqx_kernels._blocks import BLOCK_BYTES, block_size, map_blocks, map_rows, scan_blocks
from ntt_eqx_kernels._dispatch import Device
from ntt_eqx_kernels._gather import gathered_shape, gathered_u, gathered_u_backward

SIZES = Sizes(n=3, m=4, k=2, l=3, i=6, j=37)
WIDTH = 16  # of the chunks of rows as short as these


def unequal_mask(i, j, seed=0):
    """Rows with 0, 1, WIDTH - 1, WIDTH, WIDTH + 1 and all entries, in random order and places."""
    rng = np.random.default_rng(seed)
    counts = rng.permutation([0, 1, WIDTH - 1, WIDTH, WIDTH + 1, j])[:i]
    mask = np.zeros((i, j), bool)
    for row, count in zip(mask, np.minimum(counts, j), strict=True):
        row[rng.permutation(j)[:count]] = True
    return mask


MASKS = {
    "unequal rows": unequal_mask(6, 37),
    "few": np.random.default_rng(0).random((6, 37)) < 0.05,
    "half": np.random.default_rng(1).random((6, 37)) < 0.5,
    "no entry": np.zeros((6, 37), bool),
    "every entry": np.ones((6, 37), bool),
    "last entry alone": np.arange(6 * 37).reshape(6, 37) == 6 * 37 - 1,
    "last row alone": np.arange(6)[:, None] * np.ones((6, 37), int) == 5,
}


def metric_of(mask, dtype, seed=3):
    values = np.random.default_rng(seed).uniform(0.1, 2.0, mask.shape) * mask
    return jnp.asarray(values, dtype)


def gathered(mask, c, offset, fill=0):
    """Of a mask, with room for some entries more."""
    return gather_rows(mask, int(mask.sum()) + fill).metric(c, offset)


@pytest.mark.parametrize("fill", [0, 1, 2 * WIDTH + 3])
@pytest.mark.parametrize("name", MASKS)
def test_every_entry_is_stored_once(name, fill):
    mask = MASKS[name]
    c = metric_of(mask, jnp.float32)
    found = gathered(mask, c, jnp.zeros(6), fill)
    assert found.columns.shape == found.values.shape == (len(found.rows), WIDTH)
    assert len(found.rows) == (mask.sum() + fill) // WIDTH + 6  # of the count alone
    rows = np.asarray(found.rows)
    assert (np.diff(rows) >= 0).all() and rows.max(initial=0) <= 6
    dense = np.zeros((7, 37), np.float32)
    np.add.at(dense, (rows[:, None], np.asarray(found.columns)), np.asarray(found.values))
    np.testing.assert_array_equal(dense[:6], c)
    assert not dense[6].any()


@pytest.mark.parametrize("name", MASKS)
def test_products_of_gathered_and_whole_masks(name, x64):
    """Full and diagonal outputs, a float metric and an offset (a bias), some indices in excess."""
    mask = MASKS[name]
    c, offset = metric_of(mask, jnp.float64), jnp.linspace(0.0, 1.0, 6)
    a1, d1, a2, d2 = oracle.factors(SIZES, dtype=jnp.float64)
    # The offset is the metric of one more input feature that is always 1.
    one = lambda a: jnp.concatenate([a, jnp.ones_like(a[:, :1])], axis=1)
    whole = jnp.concatenate([c, offset[:, None]], axis=1)
    expected = oracle.product(one(a1), d1, one(a2), d2, whole)
    run = jax.jit(masked_ntk_reference)
    short = gathered(mask, c, offset, fill=5)
    assert relative_error(run(a1, d1, a2, d2, short), expected) < 1e-13
    diagonal = jax.jit(masked_ntk_diagonal_reference)(a1, d1, a2, d2[:, :2], short)
    expected = np.einsum("nmkk->nmk", expected[..., :2])
    assert relative_error(diagonal, expected) < 1e-13


@pytest.mark.parametrize("name", MASKS)
def test_tangents_at_gathered_entries(name, x64):
    """The entries' positions are those of the metric's values."""
    mask = MASKS[name]
    c = metric_of(mask, jnp.float64)
    rng = np.random.default_rng(4)
    a, d = rng.normal(size=(37, 5)), rng.normal(size=(2, 6, 5))
    short = gathered(mask, c, jnp.zeros(6), fill=WIDTH + 3)
    found = gathered_tangents(jnp.asarray(a), jnp.asarray(d), short)
    whole = np.einsum("kis,js->kij", d, a)
    expected = np.zeros((2, *short.values.shape))
    for chunk, row in enumerate(np.asarray(short.rows)):
        used = np.asarray(short.values[chunk]) != 0
        expected[:, chunk, used] = whole[:, min(row, 5), np.asarray(short.columns)[chunk, used]]
    found = np.asarray(found) * np.asarray(short.values).reshape(1, -1)
    expected *= np.asarray(short.values)
    np.testing.assert_allclose(found, expected.reshape(2, -1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["none", "bool", "float"])
def test_the_diagonal_is_that_of_all_pairs(kind):
    sizes = Sizes(n=3, m=4, k=2, l=2, i=6, j=7)
    args = oracle.factors(sizes)
    mask = None if kind == "none" else oracle.random_mask(sizes, kind=kind)
    expected = np.einsum("nmkk->nmk", oracle.product(*args, mask))
    found = masked_ntk_diagonal_reference(*args, mask)
    assert found.dtype == jnp.float32 and relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("name", ["unequal rows", "few", "no entry"])
def test_gradients_of_gathered_masks(name, x64):
    mask = MASKS[name]
    c = metric_of(mask, jnp.float64)
    args = oracle.factors(SIZES, dtype=jnp.float64)
    g = np.random.default_rng(5).normal(size=(3, 4, 2, 3))
    short = gathered(mask, c, jnp.zeros(6), fill=3)

    @jax.jit
    def gradient(*args):
        return jax.grad(lambda a: jnp.vdot(masked_ntk_reference(*a, short), jnp.asarray(g)))(args)

    for found, expected in zip(gradient(*args), oracle.gradient(*args, c, g), strict=True):
        assert relative_error(found, expected) < 1e-13


def test_gradients_are_those_of_finite_differences(x64):
    mask = MASKS["unequal rows"]
    short = gathered(mask, metric_of(mask, jnp.float64), jnp.linspace(0.0, 1.0, 6), fill=2)
    args = oracle.factors(Sizes(n=2, m=2, k=1, l=2, i=6, j=37), dtype=jnp.float64)
    product = jax.jit(lambda *a: masked_ntk_reference(*a, short))
    check_grads(product, args, order=1, modes=["rev"])
    u = jax.jit(functools.partial(gathered_u, c=short))
    check_grads(u, (args[0], args[2]), order=1, modes=["rev"])


def test_hand_derived_cotangents_of_u(x64):
    """`gathered_u_backward` is what automatic differentiation of `gathered_u` gives."""
    mask = MASKS["half"]
    short = gathered(mask, metric_of(mask, jnp.float64), jnp.ones(6), fill=4)
    a1, _, a2, _ = oracle.factors(SIZES, dtype=jnp.float64)
    _, pull = jax.vjp(lambda a1, a2: gathered_u(a1, a2, short), a1, a2)
    u_bar = jnp.asarray(np.random.default_rng(2).normal(size=(3, 4, 6)))
    for found, expected in zip(gathered_u_backward(u_bar, a1, a2, short), pull(u_bar), strict=True):
        assert relative_error(found, expected) < 1e-13


@pytest.mark.parametrize(("rows", "row_block"), [(6, 2), (6, 6), (7, 3), (5, 8)])
def test_rows_that_are_alike_are_stored_once(rows, row_block, x64):
    stored = MASKS["half"][: -(-rows // row_block)]
    mask = np.repeat(stored, row_block, axis=0)[:rows]
    places = gather_rows(mask, int(stored.sum()) + 3, row_block=row_block)
    assert places.stored == len(stored) and places.shape == mask.shape
    offset = jnp.linspace(0.0, 1.0, rows)
    c = places.metric(jnp.asarray(mask), offset)
    assert int(jnp.sum(c.values)) == stored.sum()
    sizes = Sizes(n=3, m=4, k=2, l=3, i=rows, j=37)
    a1, d1, a2, d2 = oracle.factors(sizes, dtype=jnp.float64)
    one = lambda a: np.concatenate([a, np.ones((len(a), 1))], axis=1)
    whole = np.concatenate([mask, np.asarray(offset)[:, None]], axis=1)
    g = np.random.default_rng(5).normal(size=(3, 4, 2, 3))
    theta, pull = jax.vjp(lambda *args: masked_ntk_reference(*args, c), a1, d1, a2, d2)
    assert relative_error(theta, oracle.product(one(a1), d1, one(a2), d2, whole)) < 1e-13
    expected = oracle.gradient(one(a1), d1, one(a2), d2, whole, g)
    for found, exact in zip(pull(jnp.asarray(g)), expected, strict=True):
        exact = exact[..., :-1] if found.ndim == 2 else exact
        assert relative_error(found, exact) < 1e-13


@pytest.mark.parametrize(("mean", "width"), [(95, 16), (96, 32), (191, 32), (192, 64), (400, 64)])
def test_chunks_are_as_wide_as_rows_are_long(mean, width, x64):
    """One row long, one short: u and its cotangents, and another mask in the same arrays."""
    mask = np.zeros((2, 800), bool)
    mask[0, : 2 * mean - 3] = mask[1, 797:] = True
    places = gather_rows(mask, 2 * mean)
    assert places.columns.shape == gathered_shape(2 * mean, 2) == (2 * mean // width + 2, width)
    assert 2 * mean <= places.capacity
    a1, _, a2, _ = oracle.factors(Sizes(n=3, m=3, i=2, j=800), dtype=jnp.float64)
    u_bar = np.random.default_rng(2).normal(size=(3, 3, 2))
    for rows, m in ((places, mask), (places.of(jnp.asarray(mask[::-1])), mask[::-1])):
        assert rows.columns.shape == places.columns.shape
        c = rows.metric(jnp.asarray(m), jnp.zeros(2))
        expected = np.einsum("nj,mj,ij->nmi", a1, a2, m)
        assert relative_error(gathered_u(a1, a2, c), expected) < 1e-13
        a1_bar, _ = gathered_u_backward(jnp.asarray(u_bar), a1, a2, c)
        assert relative_error(a1_bar, np.einsum("nmi,mj,ij->nj", u_bar, a2, m)) < 1e-13


def test_masks_with_as_many_entries_compile_once():
    traces, nonzeros = [], int(unequal_mask(6, 37).sum())

    @jax.jit
    def run(mask, args):
        traces.append(None)
        c = gather_rows(mask, nonzeros).metric(mask, jnp.zeros(6))
        return masked_ntk_reference(*args, c)

    args = oracle.factors(SIZES)
    for seed in range(4):
        mask = unequal_mask(6, 37, seed)
        found = run(jnp.asarray(mask), args)
        assert relative_error(found, oracle.product(*args, mask)) < 1e-5
    assert len(traces) == 1


# Blocks


@pytest.mark.parametrize(
    ("rows", "per_row", "budget", "expected"),
    [
        (10, 1, 100, 10),  # all at once
        (10, 10, 100, 10),  # just so
        (10, 11, 100, 5),  # 9 fit, and 5 + 5 are more even than 9 + 1
        (10, 30, 100, 2),  # 3 fit, and 3 + 3 + 3 + 1 would be filled up
        (32, 6, 30, 4),
        (11, 30, 100, 3),  # 11 divides into nothing: 3 + 3 + 3 + 2
        (7, 60, 100, 1),
        (7, 1000, 100, 1),  # one row is the least
        (5, 0, 100, 5),
        (1, 7, 7, 1),
    ],
)
def test_a_block_has_as_many_rows_as_fit_spread_evenly(rows, per_row, budget, expected):
    assert block_size(rows, per_row, budget) == expected


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 7, 9])
def test_work_in_blocks_gives_what_all_at_once_gives(size):
    x, y = jnp.arange(18.0).reshape(6, 3), jnp.arange(6)
    rows_of = np.asarray(x).sum(axis=1) + np.asarray(y)
    seen = []

    def rows(block):
        seen.append(len(block[1]))
        return block[0] * 2, {"sum": block[0].sum(axis=1) + block[1].astype(jnp.float32)}

    doubled, sums = map_blocks(rows, (x, y), 6, size)
    np.testing.assert_array_equal(doubled, 2 * x)
    np.testing.assert_array_equal(sums["sum"], rows_of)
    total, (doubled, sums) = scan_blocks(
        lambda carry, block: (carry + block[0].sum(axis=0), rows(block)),
        jnp.ones(3),
        (x, y),
        6,
        size,
    )
    np.testing.assert_array_equal(total, 1 + x.sum(axis=0))
    np.testing.assert_array_equal(doubled, 2 * x)
    np.testing.assert_array_equal(sums["sum"], rows_of)
    assert set(seen) == {min(size, 6)}


# One row of these takes more than a third of a block, so two of them make a block.
LONG = BLOCK_BYTES // (2 * 3 * 8) + 1  # features of three samples of float64
SOME_BLOCKS = [
    pytest.param(Sizes(n=4, m=2, k=1, l=2, i=3, j=LONG), [2, 2], id="divisible"),
    pytest.param(Sizes(n=5, m=2, k=2, l=1, i=3, j=LONG), [2, 2, 1], id="not divisible"),
    pytest.param(Sizes(n=3, m=3, k=1, l=1, i=2, j=LONG), [1, 1, 1], id="one by one"),
]


def assert_is_the_oracles(product, sizes, args, mask):
    """Values and gradients of a float64 product, all in one compiled program."""
    g = np.random.default_rng(5).normal(size=(sizes.n, sizes.m, sizes.k, sizes.l))

    @jax.jit
    def run(*args):
        theta, pull = jax.vjp(lambda *a: product(*a, mask), *args)
        return theta, pull(jnp.asarray(g))

    theta, gradient = run(*args)
    assert relative_error(theta, oracle.product(*args, mask)) < 1e-12
    ones = np.ones((sizes.i, sizes.j)) if mask is None else mask
    for found, expected in zip(gradient, oracle.gradient(*args, ones, g), strict=True):
        assert relative_error(found, expected) < 1e-12


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize(("sizes", "blocks"), SOME_BLOCKS)
def test_products_and_gradients_of_more_than_one_block(sizes, blocks, kind, x64):
    """Layers so wide that the work is cut into several blocks of samples."""
    size = block_size(sizes.n, sizes.m * sizes.j * 8)
    assert [min(size, sizes.n - start) for start in range(0, sizes.n, size)] == blocks
    args = oracle.factors(sizes, dtype=jnp.float64)
    mask = oracle.random_mask(sizes, kind=kind)
    assert_is_the_oracles(masked_ntk_reference, sizes, args, mask)
    if sizes.k == sizes.l:
        diagonal = masked_ntk_diagonal_reference(*args, mask)
        expected = np.einsum("nmkk->nmk", oracle.product(*args, mask))
        assert relative_error(diagonal, expected) < 1e-12


# How many of five samples n a block holds: each takes m j float64, and no more later on.
BATCHED = {"all at once": 5, "two at a time": 2, "one at a time": 1}


@pytest.mark.parametrize("kind", ["bool", "float", "gathered", "none"])
@pytest.mark.parametrize("blocks", BATCHED)
def test_an_accelerators_batched_products(blocks, kind, x64, monkeypatch):
    """What is computed sample by sample on a CPU is batched elsewhere, with the same results."""
    sizes = Sizes(n=5, m=3, k=2, l=2, i=6, j=37)
    monkeypatch.setattr(_blocks, "target_device", lambda: Device("gpu", "some"))
    budget = BATCHED[blocks] * sizes.m * sizes.j * 8
    monkeypatch.setattr(_blocks, "memory_of", lambda device: _blocks.MEMORY_SHARE * budget)
    args = oracle.factors(sizes, dtype=jnp.float64)
    given = mask = None
    if kind != "none":
        mask = oracle.random_mask(sizes, kind="float" if kind == "float" else "bool")
        given = mask
    if kind == "gathered":
        given = gathered(np.asarray(mask), mask.astype(jnp.float64), jnp.zeros(sizes.i))
    product = lambda a1, d1, a2, d2, mask: masked_ntk_reference(a1, d1, a2, d2, given)
    assert_is_the_oracles(product, sizes, args, mask)
    if blocks == "all at once":
        text = jax.jit(lambda *a: masked_ntk_reference(*a, given)).lower(*args).as_text()
        assert "while" not in text  # no loop over samples
    diagonal = masked_ntk_diagonal_reference(*args, given)
    expected = np.einsum("nmkk->nmk", oracle.product(*args, mask))
    assert relative_error(diagonal, expected) < 1e-12


WIDE = BLOCK_BYTES // (8 * 8) + 1  # input features of which two output features make no block
MANY = BLOCK_BYTES // (3 * 8 * 8)


@pytest.mark.parametrize("kind", ["bool", "float", "none"])
@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param(Sizes(n=2, m=2, k=2, l=2, i=3, j=WIDE, s=2), id="one by one"),
        pytest.param(Sizes(n=2, m=3, k=1, l=2, i=4, j=MANY, s=1), id="divisible"),
        pytest.param(Sizes(n=1, m=7, k=1, l=1, i=5, j=MANY, s=2), id="not divisible"),
    ],
)
def test_tangents_of_more_than_one_block(sizes, kind, x64):
    """Layers at many positions whose tangents of all output features are many megabytes."""
    args = oracle.factors(sizes, dtype=jnp.float64)
    assert (sizes.n * sizes.k + sizes.m * sizes.l) * sizes.j * sizes.i * 8 > BLOCK_BYTES
    mask = None if kind == "none" else oracle.random_mask(sizes, kind=kind)
    assert_is_the_oracles(masked_tangent_ntk, sizes, args, mask)


@pytest.mark.parametrize(("rows", "size"), [(6, 1), (6, 2), (5, 2), (6, 9), (1, 1), (1, 4), (0, 1)])
def test_a_function_of_one_row_for_every_row(rows, size):
    """Rows that are alone come as they are; in blocks they are batched."""
    x, y = jnp.arange(3.0 * rows).reshape(rows, 3), jnp.arange(rows)
    batched = []

    def one(row):
        batched.append(type(row[0]).__name__ == "BatchTracer")
        return row[0] * row[0][0], {"sum": row[0].sum() + row[1].astype(jnp.float32)}

    found, sums = map_rows(one, (x, y), rows, size)
    np.testing.assert_array_equal(found, x * x[:, :1])
    np.testing.assert_array_equal(sums["sum"], np.asarray(x).sum(axis=1) + np.asarray(y))
    assert set(batched) == {min(size, rows) > 1}
