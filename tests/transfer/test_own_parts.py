"""What users bring of their own, as the guide writes it, does what it says in every call."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.comparison import counts
from helpers.pages import ROOT, definitions
from helpers.students import batches, same, step

import ntt_eqx as ntt

MODEL = eqx.nn.MLP(8, 4, 12, 1, jnp.tanh, key=jax.random.key(0))
ADAM = optax.adam(3e-2)


GUIDE = definitions(ROOT / "docs" / "guides" / "your-own-method.md")
OwnScore, OwnRefresh, own_schedule = (GUIDE[n] for n in ("OwnScore", "OwnRefresh", "own_schedule"))
OwnLoss, OwnPattern, OwnProbe = (GUIDE[n] for n in ("OwnLoss", "OwnPattern", "OwnProbe"))
PER_LAYER = {".layers[0].weight": 0.25, ".layers[1].weight": 0.5}
RATE = optax.inject_hyperparams(optax.adam)(optax.linear_schedule(1e-1, 0.0, 10))


def ran(steps=4, x=None, **parts):
    """A transfer of a few steps, and the masks along it."""
    method = ntt.NeuralTangentTransfer(**{"sparsity": 0.3, "optimizer": ADAM, **parts})
    state = ntt.ntt_init(MODEL, method, x=x)
    masks, rows = [state.student.mask], []
    for x, _ in zip(batches((4, 8)), range(steps), strict=False):
        state, metrics = step(state, x)
        masks.append(state.student.mask)
        rows.append(metrics)
        assert jnp.isfinite(metrics.loss)
    return state, masks, rows


@pytest.mark.filterwarnings("ignore:prune. no path")  # a tiny network at a low density
def test_own_score():
    x = next(batches((4, 8)))
    refresh = ntt.ScoreRefresh(OwnScore(), every=2)
    state, masks, _ = ran(x=x, initial=OwnScore(), refresh=refresh)
    expected = ntt.make_mask(OwnScore()(MODEL, x), 0.3)
    assert same(masks[0], expected) and not same(masks[2], expected)
    assert same(masks[1], expected) and counts(masks[-1]) == counts(expected)
    pruned = ntt.prune(MODEL, OwnScore(), ntt.Sparsity(0.2, allocation="erk"), x, steps=3)
    assert int(sum(counts(pruned.mask))) == round(0.2 * 144)


def test_own_refresh_and_allocation():
    _, masks, _ = ran(refresh=OwnRefresh(), sparsity=ntt.Sparsity(0.3, allocation="erk"))
    assert not same(masks[0], masks[1]) and not same(masks[1], masks[2])
    assert same(masks[2], masks[3])
    assert {tuple(counts(m)) for m in masks} == {(24, 19)}


def test_own_schedule_and_the_l2_of_the_moment():
    loss = ntt.KernelMatching(l2_weight=0.5, kernel_weight=0.0)
    refresh = ntt.MagnitudeRefresh(every=1)
    _, masks, rows = ran(5, sparsity=ntt.Sparsity(own_schedule), refresh=refresh, loss=loss)
    assert [sum(counts(m)) for m in masks] == [144, 72, 36, 18, 15, 15]
    for done, row in enumerate(rows):
        penalty = 0.5 / max(0.5**done, 0.1) * float(row.weight_norm)
        assert float(row.loss) == pytest.approx(float(row.target_distance) + penalty, rel=1e-5)


def test_own_loss_and_its_terms():
    _, _, rows = ran(loss=OwnLoss())
    assert set(rows[0].terms) == {"cosine", "log_distance"}
    terms = rows[0].terms
    assert float(rows[0].loss) == pytest.approx(
        float(terms["cosine"] + 0.1 * terms["log_distance"]), rel=1e-5
    )
    assert rows[0].kernel_distance is None and rows[0].weight_norm > 0
    assert float(rows[-1].terms["cosine"]) < float(terms["cosine"])
    method = ntt.NeuralTangentTransfer(sparsity=0.3, optimizer=ADAM, loss=OwnLoss(), num_steps=2)
    _, history = ntt.transfer(ntt.ntt_init(MODEL, method), batches((4, 8)))
    assert "log_distance" in history[-1]["train"]


def test_own_pattern_holds_through_refreshes():
    sparsity = ntt.Sparsity(0.5, pattern=OwnPattern())
    _, masks, _ = ran(sparsity=sparsity, refresh=ntt.MagnitudeRefresh(1), optimizer=optax.sgd(1.0))
    assert not same(masks[0], masks[-1])
    for mask in masks:
        for m in map(np.asarray, jax.tree.leaves(mask)):
            assert (m == m[:1]).all() and (m[:, ::2] == m[:, 1::2]).all() and m.mean() == 0.5


def test_own_probe():
    loss = ntt.KernelMatching(probe=OwnProbe())
    state, _, rows = ran(1, loss=loss)
    first = ntt.ntt_init(MODEL, state.method)
    x = next(batches((4, 8)))
    theta = lambda m: np.asarray(ntt.ntk(m, x[:2], x[2:], implementation="jacobian"))
    difference = theta(first.student) - theta(MODEL)
    V = np.stack([np.ones(4), np.eye(4)[0]])
    expected = np.mean((V @ difference @ V.T) ** 2)
    assert float(rows[0].kernel_distance) == pytest.approx(expected, rel=1e-4)


def test_densities_by_layer_and_a_rate_that_follows_a_schedule():
    sparsity, refresh = ntt.Sparsity(PER_LAYER), ntt.MagnitudeRefresh(every=1)
    _, masks, rows = ran(sparsity=sparsity, refresh=refresh, optimizer=RATE)
    assert {tuple(counts(m)) for m in masks} == {(24, 24)} and not same(masks[0], masks[-1])
    assert [float(row.learning_rate) for row in rows] == pytest.approx([0.1, 0.09, 0.08, 0.07])
    plateau = optax.chain(optax.adam(1e-2), optax.contrib.reduce_on_plateau())
    ran(1, optimizer=plateau)


def test_a_method_and_its_settings_are_the_same():
    config = ntt.NTTConfig(density=0.3, num_steps=50, mask_every=10, outputs="trace")
    method = ntt.NeuralTangentTransfer(
        sparsity=ntt.Sparsity(0.3),
        loss=ntt.KernelMatching(probe=ntt.Trace()),
        refresh=ntt.MagnitudeRefresh(every=10, until=40),
        optimizer=ADAM,
        num_steps=50,
    )
    assert config.method(ADAM) == method
    with pytest.raises(ValueError, match="the method has an optimizer; leave `optimizer` out"):
        ntt.ntt_init(MODEL, method, ADAM)
    with pytest.raises(ValueError, match="ntt_init: give an optimizer"):
        ntt.ntt_init(MODEL, config)
