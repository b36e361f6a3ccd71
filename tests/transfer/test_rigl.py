"""RigL by the transfer loss: what is dropped, what grows, and where it starts."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.students import batches, same, step
from helpers.tiers import default_only

import ntt_eqx as ntt

MODEL = eqx.nn.MLP(8, 4, 12, 1, jnp.tanh, key=jax.random.key(0))
ALLOCATIONS = {
    "erk": ntt.Sparsity(0.4, allocation="erk"),
    "2:4": ntt.Sparsity(0.5, pattern=ntt.NM(2, 4)),
}


@pytest.mark.parametrize("name", default_only(ALLOCATIONS, "2:4"))
def test_small_weights_go_and_steep_ones_come_in_at_zero(name):
    sparsity = ALLOCATIONS[name]
    method = ntt.NeuralTangentTransfer(
        sparsity=sparsity,
        refresh=ntt.RigLRefresh(every=2, until=4, fraction=0.4),
        optimizer=optax.sgd(0.1),
        pruned="zero",
    )
    state, data = ntt.ntt_init(MODEL, method), batches((4, 8))
    state, _ = step(state, next(data))
    x = next(data)
    # the same step, without its refresh
    still = ntt.NeuralTangentTransfer(
        sparsity=sparsity, refresh=ntt.NoRefresh(), optimizer=optax.sgd(0.1), pruned="zero"
    )
    plain = ntt.ntt_init(MODEL, still)
    plain = eqx.tree_at(lambda s: (s.student, s.step), plain, (state.student, state.step))
    before, _ = step(plain, x)
    after, _ = step(state, x)
    assert same(before.student.model, after.student.model)
    assert bool(sparsity.holds(after.student.mask))
    if name == "2:4":
        return  # groups of four decide for themselves
    info = ntt.StepInfo(jnp.int32(2), jax.random.key(0), 0.4)
    view = ntt.RefreshView(before.student, MODEL, x, info, method.loss)
    slopes = jax.tree.leaves(view.dense_gradient())
    weights = jax.tree.leaves(view.weights())
    masks = zip(*map(jax.tree.leaves, (before.student.mask, after.student.mask)), strict=True)
    for (old, new), w, g in zip(masks, weights, slopes, strict=True):
        old, new, w, g = (np.asarray(a).ravel() for a in (old, new, np.abs(w), np.abs(g)))
        dropped = round(0.2 * (1 + np.cos(np.pi * 2 / 4)) * old.sum())
        stays = np.zeros(old.size, bool)
        stays[np.argsort(np.where(old, -w, np.inf), kind="stable")[: old.sum() - dropped]] = True
        assert dropped > 0 and new[stays].all() and new.sum() == old.sum()
        rest = np.flatnonzero(~stays)
        best = rest[np.argsort(-g[rest], kind="stable")[:dropped]]
        np.testing.assert_array_equal(np.flatnonzero(new & ~stays), np.sort(best))
        assert (w[new & ~old] == 0).all()
    assert not same(before.student.mask, after.student.mask)


GROUPS = {
    "block": ntt.Block((2, 2)),
    "channels": ntt.Channels(0, spare=()),
    "fan-in": ntt.ConstantFanIn(4),
    "in layout": ntt.InLayout(
        ntt.Channels(0, spare=()), {".layers[0].weight": "oi", ".layers[1].weight": "oi"}
    ),
    "coupled": ntt.coupled_channels(MODEL, jnp.ones((1, 8))),
}
SINGLE = {"2:4": ntt.NM(2, 4), "fan-in": ntt.ConstantFanIn(), "1x1": ntt.Block((1, 1))}
REFRESHES = {"rigl": ntt.RigLRefresh(every=2), "set": ntt.SETRefresh(every=2)}


@pytest.mark.parametrize("refresh", REFRESHES)
@pytest.mark.parametrize("name", GROUPS)
def test_groups_that_would_never_change_are_refused(name, refresh):
    sparsity = ntt.Sparsity(0.5, pattern=GROUPS[name])
    method = ntt.NeuralTangentTransfer(
        sparsity=sparsity, refresh=REFRESHES[refresh], optimizer=optax.sgd(0.1)
    )
    with pytest.raises(ValueError, match="drops and grows single weights"):
        ntt.ntt_init(MODEL, method)
    config = ntt.TrainConfig(dynamic=ntt.DynamicSparsity(sparsity, REFRESHES[refresh]))
    with pytest.raises(ValueError, match="drops and grows single weights"):
        ntt.train_init(ntt.sparsify(MODEL), config, optax.sgd(0.1))


@pytest.mark.parametrize("name", SINGLE)
def test_patterns_of_single_weights_change(name):
    sparsity = ntt.Sparsity(0.5, pattern=SINGLE[name])
    method = ntt.NeuralTangentTransfer(
        sparsity=sparsity, refresh=ntt.SETRefresh(every=1), optimizer=optax.sgd(0.1)
    )
    state, data = ntt.ntt_init(MODEL, method), batches((4, 8))
    after, _ = step(state, next(data))
    assert bool(sparsity.holds(after.student.mask))
    assert not same(after.student.mask, state.student.mask)
