"""A transfer under one mask on kept weights alone is the masked transfer."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.comparison import relative_error

import ntt_eqx as ntt

pytestmark = pytest.mark.usefixtures("x64")

every = lambda path, layer: True


def started(density, optimizer, pruned="free", **loss):
    model = eqx.nn.MLP(12, 3, 10, 1, key=jax.random.key(0))
    method = ntt.NeuralTangentTransfer(
        sparsity=density,
        loss=ntt.KernelMatching(kernel_weight=0.1, l2_weight=1e-3, **loss),
        refresh=ntt.NoRefresh(),
        optimizer=optimizer,
        num_steps=4,
        pruned=pruned,
    )
    return ntt.ntt_init(model, method)


def batches():
    return [jax.random.normal(jax.random.key(n), (6, 12)) for n in range(4)]


def run(state, xs, convert_at=None):
    step, found = eqx.filter_jit(ntt.ntt_step), []
    for n, x in enumerate(xs):
        if n == convert_at:
            state = state.on_kept_weights(every)
        state, metrics = step(state, x)
        found.append((metrics.loss, metrics.weight_norm, metrics.density))
    return state, found


CASES = [
    pytest.param((0.3, optax.adam(0.01), "free"), id="adam"),
    pytest.param(
        (
            {".layers[0].weight": 0.2, ".layers[1].weight": 0.5},
            optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.05, momentum=0.9)),
            "zero",
        ),
        id="by layer, momentum, decay",
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize("case", CASES)
def test_steps_are_those_of_the_masked_student(case):
    """Converted in the middle, so that moments are carried."""
    density, optimizer, pruned = case
    masked, want = run(started(density, optimizer, pruned), batches())
    kept, got = run(started(density, optimizer, pruned), batches(), convert_at=2)
    assert relative_error(got, want) < 1e-6  # the metrics are float32
    back = ntt.masked_layers(kept.student)
    dense = [eqx.filter(model.to_dense(), eqx.is_array) for model in (back, masked.student)]
    assert relative_error(*dense) < 1e-11
    assert eqx.tree_equal(back.mask, masked.student.mask)
    sizes = [a.size for a in jax.tree.leaves(kept.opt_state)]
    assert max(sizes) == max(int(np.sum(m)) for m in jax.tree.leaves(back.mask))


@pytest.mark.slow
def test_a_whole_run():
    state = started(0.3, optax.adam(0.01), probe=ntt.Sketch(2)).on_kept_weights(every)
    state, history = ntt.transfer(state, batches(), validation=batches()[0])
    assert len(history) and jnp.isfinite(history[-1]["train"]["loss"])
    assert int(state.step) == 4


def test_refreshes_need_all_weights():
    model = eqx.nn.MLP(12, 3, 10, 1, key=jax.random.key(0))
    state = ntt.ntt_init(model, ntt.NTTConfig(0.3, mask_every=1, num_steps=2), optax.sgd(0.1))
    with pytest.raises(ValueError, match="on_kept_weights: the method refreshes"):
        state.on_kept_weights()
