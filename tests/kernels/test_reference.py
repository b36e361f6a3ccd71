"""Gathered masks: the non-zeros of a row-wise random mask give what the whole mask gives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.test_util import check_grads
from oracle import Sizes, relative_error

from ntt_eqx.kernels import (
    gather_rows,
    masked_ntk_diagonal_reference,
    masked_ntk_reference,
)
from ntt_eqx.kernels._gather import WIDTH, gathered_u, gathered_u_backward

SIZES = Sizes(n=3, m=4, k=2, l=3, i=6, j=37)


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


def indices_of(mask, fill=0):
    """Flat indices of a mask, filled up by indices past the end."""
    found = np.pad(np.flatnonzero(mask), (0, fill), constant_values=mask.size)
    return jnp.asarray(found, jnp.int32)


def metric_of(mask, dtype, seed=3):
    values = np.random.default_rng(seed).uniform(0.1, 2.0, mask.shape) * mask
    return jnp.asarray(values, dtype)


def gathered(mask, c, offset, fill=0):
    return gather_rows(indices_of(mask, fill), c, offset)


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


def test_masks_with_as_many_entries_compile_once():
    traces = []

    @jax.jit
    def run(indices, mask, args):
        traces.append(None)
        return masked_ntk_reference(*args, gather_rows(indices, mask, jnp.zeros(6)))

    args = oracle.factors(SIZES)
    for seed in range(4):
        mask = unequal_mask(6, 37, seed)
        found = run(indices_of(mask), jnp.asarray(mask), args)
        assert relative_error(found, oracle.product(*args, mask)) < 1e-5
    assert len(traces) == 1
