"""No setting is forgotten by a kernel that was compiled before it was made."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from helpers.comparison import random_mask, relative_error

import ntt_eqx as ntt


@pytest.fixture(scope="module")
def masked():
    sparse = ntt.sparsify(eqx.nn.MLP(5, 2, 4, 1, key=jax.random.key(0)))
    return sparse.with_mask(random_mask(sparse.mask, 0.5))


X = jnp.ones((2, 5)) * jnp.arange(1.0, 3.0)[:, None]


def test_an_implementation_that_cannot_run_is_refused_although_the_kernel_is_compiled(masked):
    theta = ntt.ntk(masked, X, X)
    with ntt.kernels.use_implementation("pallas_gpu"):
        with pytest.raises(NotImplementedError, match="pallas_gpu needs a Hopper GPU"):
            ntt.ntk(masked, X, X)
    with ntt.kernels.use_implementation("pallas_tpu_interpret"):
        with ntt.kernels.record_choices() as choices:
            again = ntt.ntk(masked, X, X)
    assert {choice.implementation for choice in choices} == {"pallas_tpu_interpret"}
    assert relative_error(again, theta) < 1e-5
    with ntt.kernels.record_choices() as choices:
        ntt.ntk(masked, X, X)
    assert {choice.implementation for choice in choices} == {"reference"}


def test_the_same_holds_for_a_function_that_users_compile(masked):
    kernel = eqx.filter_jit(lambda model, x: ntt.ntk(model, x))
    kernel(masked, X)
    with ntt.kernels.use_implementation("pallas_tpu"):
        with pytest.raises(NotImplementedError, match="pallas_tpu needs a TPU"):
            kernel(masked, X)


def test_precision_and_device_are_jax_settings_in_the_key_too(masked):
    """A kernel in float64 after one in float32, and on a device that is named."""
    single = ntt.ntk(masked, X)
    with jax.enable_x64(True):
        wide = jax.tree.map(
            lambda a: a.astype(jnp.float64) if eqx.is_inexact_array(a) else a, masked
        )
        assert ntt.ntk(wide, X.astype(jnp.float64)).dtype == jnp.float64
    with jax.default_device(jax.devices("cpu")[0]):
        assert relative_error(ntt.ntk(masked, X), single) == 0


def test_costs_decide_anew(masked, monkeypatch):
    """The table of costs is part of what a compiled kernel is chosen by."""
    from ntt_eqx._ntk import _costs, _spec

    asked = []
    monkeypatch.setattr(_spec, "costs_on", lambda device: asked.append(device) or costs)
    costs = _costs.COSTS["cpu"]
    theta = ntt.ntk(masked, X)
    costs = _costs.Costs(0.9, 0, 0, 0, 1, 1, 10)  # other blocks, other forms
    assert relative_error(ntt.ntk(masked, X), theta) < 1e-6
    assert len(asked) == 2
