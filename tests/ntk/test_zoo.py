"""Architectures of others: exact kernels and gradients."""

import equinox as eqx
import jax
import pytest
from comparison import every_array, random_mask, relative_error, weighted_sum
from interpreter import interpreted
from zoo_today import ZOO

import ntt_eqx as ntt

EXACT = 1e-10  # float64

every_model = pytest.mark.parametrize(
    "name", ["tied autoencoder", "gru", "lstm", "transformer, rope, tied tokens"]
)


def errors(name):
    """Of the kernel and of its gradient by all parameters, as shares of the largest entry."""
    case = ZOO[name]
    sparse = ntt.sparsify(case.build(jax.random.key(1)), every_array)
    mask = random_mask(sparse.mask, 0.6)
    x1, x2 = case.samples(3, seed=1), case.samples(2, seed=2)
    params, static = eqx.partition(sparse, eqx.is_inexact_array)

    def loss(params, mask, x1, x2, implementation):
        model = eqx.combine(params, static).with_mask(mask)
        theta = ntt.ntk(model, x1, x2, implementation=implementation)
        return weighted_sum(theta), theta

    both = jax.value_and_grad(loss, has_aux=True)

    @interpreted
    def run(*given):
        _, other = loss(*given, "ntk_vector_products")
        return both(*given, None), both(*given, "jacobian"), other

    ((_, theta), slope), ((_, exact), exact_slope), other = run(params, mask, x1, x2)
    kernel = max(relative_error(theta, exact), relative_error(theta, other))
    return kernel, relative_error(slope, exact_slope)


@every_model
def test_kernel_and_gradient(name, x64):
    kernel, gradient = errors(name)
    assert kernel < EXACT and gradient < EXACT
