"""The product over a mask's gathered non-zeros, by every implementation, against the oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import oracle
from helpers.comparison import relative_error
from helpers.oracle import IMPLEMENTATIONS, KERNELS, TOLERANCE, Sizes

from ntt_eqx import kernels
from ntt_eqx_kernels import _blocks
from ntt_eqx_kernels._gather import gathered_u, row_starts

# Rows of no entry, of one, of a chunk, of one more, and full; samples over the edge of no tile.
SIZES = Sizes(n=5, m=3, k=2, l=3, i=6, j=37)
COUNTS = (0, 17, 1, 37, 16, 0)


def mask_of(sizes, counts, kind="bool"):
    rng = np.random.default_rng(7)
    mask = np.zeros((sizes.i, sizes.j), bool)
    for row, count in zip(mask, counts, strict=True):
        row[rng.permutation(sizes.j)[:count]] = True
    return mask if kind == "bool" else mask * rng.uniform(0.1, 2.0, mask.shape)


def gathered(mask, offset, fill=0, row_block=1):
    room = int(np.count_nonzero(mask[::row_block])) + fill
    places = kernels.gather_rows(mask != 0, room, row_block=row_block)
    return places.metric(jnp.asarray(mask), offset)


def check(
    sizes, counts, implementation, precision, kind="bool", fill=0, dtype=jnp.float32, row_block=1
):
    """Value and all gradients; an offset is a bias: one more input that is always 1."""
    mask = np.repeat(mask_of(sizes, counts, kind)[::row_block], row_block, axis=0)[: sizes.i]
    offset = np.linspace(0.0, 1.0, sizes.i)
    args = oracle.factors(sizes, dtype=dtype)
    c = gathered(
        mask.astype(mask.dtype if kind == "bool" else np.float32),
        jnp.asarray(offset, jnp.float32),
        fill,
        row_block,
    )
    call = functools.partial(kernels.masked_ntk, precision=precision, implementation=implementation)
    g = np.random.default_rng(2).normal(0.2, 1.0, (sizes.n, sizes.m, sizes.k, sizes.l))

    @jax.jit
    def run(args, c):
        theta, pull = jax.vjp(lambda *args: call(*args, c), *args)
        return theta, pull(jnp.asarray(g, jnp.float32))

    with kernels.record_choices() as choices:
        theta, bars = run(args, c)
    assert {choice.implementation for choice in choices} == {implementation}
    a1, d1, a2, d2 = (np.asarray(x, np.float64) for x in args)
    wide = lambda a: np.concatenate([a, np.ones((len(a), 1))], axis=1)
    whole = np.concatenate([mask.astype(np.float64), offset[:, None]], axis=1)
    assert (
        relative_error(theta, oracle.product(wide(a1), d1, wide(a2), d2, whole))
        < TOLERANCE[precision]
    )
    expected = list(oracle.gradient(wide(a1), d1, wide(a2), d2, whole, g))
    for side in (0, 2):
        expected[side] = expected[side][:, :-1]
    for name, x, y, arg in zip(("a1", "d1", "a2", "d2"), bars, expected, args, strict=True):
        assert x.dtype == arg.dtype, name
        assert relative_error(x.astype(jnp.float32), y) < TOLERANCE[precision], name


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_entries_found_under_jit_are_those_found_on_the_host(device, request):
    """Counts run by a loop on a CPU, by `cumsum` elsewhere."""
    if device == "gpu":
        request.getfixturevalue("on_a_gpu")
    mask = mask_of(SIZES, COUNTS)
    room = int(mask.sum()) + 20  # chunks that are not in use, too
    gather = lambda mask: kernels.gather_rows(mask, room)
    found = jax.jit(gather)(jnp.asarray(mask))
    expected = gather(mask)
    assert (found.rows == expected.rows).all() and (found.columns == expected.columns).all()
    assert ("cumsum" in str(jax.make_jaxpr(gather)(jnp.asarray(mask)))) == (device == "gpu")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_values_and_gradients(implementation):
    check(SIZES, COUNTS, implementation, "float32", fill=20)


@pytest.mark.parametrize("samples", [1, 2])
def test_products_of_chunks_in_blocks_of_samples(samples, monkeypatch):
    """Five samples by one, and by two, of which the last block has one that is not there."""
    chunks = len(gathered(mask_of(SIZES, COUNTS), jnp.zeros(SIZES.i), fill=20).columns)
    monkeypatch.setattr(_blocks, "BLOCK_BYTES", samples * chunks * SIZES.m * 4)
    c = gathered(mask_of(SIZES, COUNTS), jnp.zeros(SIZES.i), fill=20)
    a1, _, a2, _ = oracle.factors(SIZES, dtype=jnp.float32)
    assert "while" in jax.jit(gathered_u).lower(a1, a2, c).as_text()
    check(SIZES, COUNTS, "reference", "float32", fill=20)


@pytest.mark.slow
@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_errors_are_as_documented(implementation, precision):
    check(SIZES, COUNTS, implementation, precision, kind="float")


@pytest.mark.slow
@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize(
    ("sizes", "counts"),
    [
        pytest.param(Sizes(n=66, m=2, k=1, l=2, i=2, j=40), (40, 3), id="edges of tiles of n"),
        pytest.param(Sizes(n=2, m=130, k=1, l=1, i=2, j=40), (40, 3), id="edges of tiles of m"),
        pytest.param(Sizes(n=1, m=1, k=1, l=1, i=1, j=1), (1,), id="ones"),
        pytest.param(Sizes(n=2, m=3, k=1, l=1, i=2, j=5), (0, 0), id="no entry"),
        pytest.param(Sizes(n=5, m=3, k=2, l=3, i=2, j=250), (150, 50), id="chunks of 32"),
        pytest.param(Sizes(n=5, m=3, k=2, l=3, i=2, j=500), (384, 64), id="chunks of 64"),
        pytest.param(Sizes(n=2, m=3, k=3, l=35, i=70, j=9), (4,) * 70, id="tiles of outputs"),
    ],
)
def test_sizes(sizes, counts, implementation):
    check(sizes, counts, implementation, "float32", fill=2)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("row_block", [2, 4])
def test_rows_that_are_alike(row_block, implementation):
    check(SIZES, COUNTS, implementation, "float32", fill=2, row_block=row_block)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", KERNELS)
def test_bfloat16_factors(implementation):
    check(SIZES, COUNTS, implementation, "bfloat16", dtype=jnp.bfloat16)


@pytest.mark.parametrize("implementation", KERNELS)
def test_one_side_alone_is_not_more_than_asked_for(implementation):
    mask = mask_of(SIZES, COUNTS)
    args = oracle.factors(SIZES)
    c = gathered(mask, jnp.zeros(SIZES.i))
    call = functools.partial(kernels.masked_ntk, implementation=implementation)
    gradient = lambda a1: jax.grad(lambda a1: jnp.sum(call(a1, *args[1:], c)))(a1)
    text = str(jax.make_jaxpr(gradient)(args[0]))
    both = str(
        jax.make_jaxpr(
            jax.grad(lambda a1, a2: jnp.sum(call(a1, args[1], a2, args[3], c)), argnums=(0, 1))
        )(args[0], args[2])
    )
    assert text.count("scatter-add") == 1
    assert both.count("scatter-add") == 2


def test_where_the_chunks_of_a_row_begin():
    c = gathered(mask_of(SIZES, COUNTS), jnp.zeros(SIZES.i), fill=40)
    chunks = [-(-count // 16) for count in COUNTS]
    np.testing.assert_array_equal(row_starts(c), np.cumsum([0, *chunks]))
