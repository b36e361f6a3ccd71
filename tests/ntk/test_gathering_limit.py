"""From how many samples and up to how many entries a dense layer's mask is gathered on a CPU."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.comparison import relative_error

import ntt_eqx as ntt
from ntt_eqx._ntk._costs import COSTS

CPU = COSTS["cpu"]
LAYER, HEAD = (24, 300), (3, 24)


def network(dtype=jnp.float64):
    """A layer with 288 entries of 7,200, which take 0.078 with empty places, and a head."""
    rng = np.random.default_rng(0)
    model = eqx.nn.MLP(LAYER[1], HEAD[0], LAYER[0], 1, dtype=dtype, key=jax.random.key(0))
    few = np.zeros(LAYER, bool)
    for row in few:
        row[rng.permutation(LAYER[1])[:12]] = True
    sparse = ntt.sparsify(model)
    place = lambda tree: tree.layers[0].weight
    return sparse.with_mask(eqx.tree_at(place, sparse.mask, jnp.asarray(few)))


@pytest.mark.parametrize(("n", "m", "gathered"), [(8, 8, False), (30, 32, True), (64, 12, False)])
def test_both_sides_of_the_limit_are_the_explicit_kernel(n, m, gathered, x64):
    rng = np.random.default_rng(1)
    x1, x2 = (jnp.asarray(rng.normal(size=(count, LAYER[1]))) for count in (n, m))
    model = network()
    path = ntt.explain(model, x1, x2).parameters[0].path
    assert path == ("gathered factors" if gathered else "factors")
    expected = ntt.ntk(model, x1, x2, implementation="jacobian")
    assert relative_error(ntt.ntk(model, x1, x2), expected) < 1e-12


@pytest.mark.parametrize("rows", [100, 300, 1024])
def test_more_samples_gather_more_until_the_rows_limit_it(rows):
    inputs = 784

    def most(n, m):
        """The largest share of entries that is gathered."""
        entries = range(0, rows * inputs, 64)
        return max(count for count in entries if CPU.gather(count, rows, inputs, n, m)) / (
            rows * inputs
        )

    shares = [most(n, n) for n in (4, 8, 16, 32, 64)]
    assert shares == sorted(shares) and shares[0] < shares[1]
    assert shares[-1] == pytest.approx(min(64 / 256, 40 / rows), abs=2e-3)
    assert shares[0] < most(4, 16) == most(16, 4) < most(16, 16)
