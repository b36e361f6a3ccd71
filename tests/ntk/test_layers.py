"""What looks like a bias, or like a convolution's weight, and is none: exact all the same."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.comparison import relative_error

import ntt_eqx as ntt


class Two(eqx.Module):
    """A matrix `[4, 4]`, another parameter, and what is done with them."""

    w: jax.Array
    b: jax.Array
    use: object = eqx.field(static=True)

    def __call__(self, x):
        return self.use(self.w, self.b, x)


def grouped_batch(w, b, x):
    """A convolution whose groups are along the batch."""
    x = (x[:, None] * jnp.arange(1.0, 5.0)[None]).reshape(4, 4, 1)
    y = jax.lax.conv_general_dilated(x, w[:, :, None], (1,), "SAME", batch_group_count=2)
    return jnp.tanh(y).reshape(-1)[:3] * b[0]


USES = {
    # name: (shape of b, use, whether b is folded into the layer)
    "a bias": ((4,), lambda w, b, x: jnp.tanh(w @ x + b), True),
    "a bias on the left": ((4,), lambda w, b, x: jnp.tanh(b + w @ x), True),
    "a row for a bias": ((2, 2), lambda w, b, x: jnp.tanh((w @ x).reshape(2, 2) + b)[0], True),
    "subtracted": ((4,), lambda w, b, x: jnp.tanh(w @ x - b), False),
    "multiplied": ((4,), lambda w, b, x: jnp.tanh((w @ x) * b), False),
    "after a sum of both": ((4,), lambda w, b, x: jnp.tanh((w @ x + x) + b), False),
    "used twice": ((4,), lambda w, b, x: jnp.tanh(w @ x + b) + b, False),
    "also read without it": ((4,), lambda w, b, x: (y := w @ x) * jnp.tanh(y + b), False),
    "left out of the output": ((4,), lambda w, b, x: ((y := w @ x), jnp.sin(y + b))[0], False),
    "one for all features": ((1,), lambda w, b, x: jnp.tanh(w @ x + b), False),
    "each for each": ((4, 1), lambda w, b, x: jnp.tanh((w @ x)[None] + b).sum(axis=0), False),
    "along positions": (
        (4,),
        lambda w, b, x: jnp.tanh(w @ (x[:, None] * jnp.arange(1.0, 5.0)[None]) + b[None])[:, 1],
        False,
    ),
    "at every position": (
        (4,),
        lambda w, b, x: jnp.tanh(w @ (x[:, None] * jnp.arange(1.0, 5.0)[None]) + b[:, None])[:, 1],
        True,
    ),
}


@pytest.mark.parametrize("name", USES)
def test_what_is_added_to_a_layer(name, getkey):
    shape, use, folded = USES[name]
    model = Two(jax.random.normal(getkey(), (4, 4)), jax.random.normal(getkey(), shape), use)
    x1, x2 = jax.random.normal(getkey(), (2, 4)), jax.random.normal(getkey(), (3, 4))
    names = [p.name for p in ntt.explain(model, x1, x2).parameters]
    assert names == ([".w + .b"] if folded else [".w", ".b"])
    expected = ntt.ntk(model, x1, x2, implementation="jacobian")
    assert relative_error(ntt.ntk(model, x1, x2), expected) < 1e-5


def test_a_convolution_in_groups_of_samples_is_no_layer(getkey):
    model = Two(jax.random.normal(getkey(), (4, 4)), jnp.ones(1), grouped_batch)
    x = jax.random.normal(getkey(), (3, 4))
    assert [p.path for p in ntt.explain(model, x).parameters] == ["jacobian", "jacobian"]
    expected = ntt.ntk(model, x, implementation="jacobian")
    assert relative_error(ntt.ntk(model, x), expected) < 1e-5


class Turned(eqx.Module):
    """A matrix read column by column: a reshape that transposes first."""

    weight: jax.Array

    def __call__(self, x):
        return jnp.tanh(jax.lax.reshape(self.weight, (4, 6), (1, 0)) @ x)


@pytest.mark.usefixtures("gathers")
def test_a_weight_in_columns_is_gathered_in_no_wrong_order(getkey):
    sparse = ntt.sparsify(Turned(jax.random.normal(getkey(), (8, 3))))
    kept = np.zeros((8, 3), bool)
    kept[1, 2] = kept[6, 0] = True
    sparse = sparse.with_mask(jax.tree.map(lambda m: jnp.asarray(kept), sparse.mask))
    x = jax.random.normal(getkey(), (3, 6))
    expected = ntt.ntk(sparse, x, implementation="jacobian")
    assert relative_error(ntt.ntk(sparse, x), expected) < 1e-5
