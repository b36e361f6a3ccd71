"""Schedules of the density: the last mask has the last density, or the settings are refused."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.comparison import counts
from helpers.refusals import refusals
from helpers.tiers import slow

import ntt_eqx as ntt

pytestmark = pytest.mark.filterwarnings("ignore:transfer. no path")  # six weights in two layers

MODEL = eqx.nn.MLP(4, 2, 10, 1, key=jax.random.key(0))  # 40 and 20 weights
X = jax.random.normal(jax.random.key(1), (4, 4))
SGD = optax.sgd(1e-3)
TENTH = [4, 2]


def run(config):
    state = ntt.ntt_init(MODEL, config, *([] if isinstance(config, eqx.Module) else [SGD]))
    return ntt.transfer(state, [X], log_every=None)[0].student


def cheap(density, num_steps, **options):
    return ntt.NTTConfig(density, num_steps, kernel="ambient", outputs="trace", **options)


@pytest.mark.parametrize(
    "steps, every, density",
    [
        slow(100, 100, ntt.GradualDensity(0.1, end=100)),
        (120, 100, ntt.GradualDensity(0.1, end=120)),
        (30, 7, ntt.GradualDensity(0.1, end=11, begin=3)),
        (9, 100, ntt.GradualDensity(0.1, end=9)),
        (13, 5, lambda step: jnp.where(step < 12, 0.5, 0.1)),
        slow(12, 5, optax.linear_schedule(1.0, 0.1, 12)),
        slow(12, 5, lambda step: 0.1 ** (step / 12)),
        (12, 5, optax.constant_schedule(0.1)),
    ],
)
def test_the_last_mask_has_the_last_density(steps, every, density):
    assert counts(run(cheap(density, steps, mask_every=every)).mask) == TENTH


class Once(ntt.AbstractRefresh):
    """A refresh that ends early."""

    def due(self, step):
        return step == 2

    def scores(self, view):
        return jax.tree.map(jnp.abs, view.weights())


@pytest.mark.parametrize(
    "refresh",
    [
        Once(),
        ntt.MagnitudeRefresh(4, until=5),
        ntt.ScoreRefresh(ntt.scores.Random(jax.random.key(0)), every=100),
        ntt.RigLRefresh(every=100),
    ],
)
def test_whatever_the_refresh(refresh):
    sparsity = ntt.Sparsity(ntt.GradualDensity(0.1, end=8))
    method = ntt.NeuralTangentTransfer(
        sparsity=sparsity, optimizer=SGD, refresh=refresh, num_steps=10
    )
    assert counts(run(method).mask) == TENTH


def test_a_schedule_that_names_its_end_needs_no_number_of_steps():
    state = ntt.ntt_init(MODEL, cheap(ntt.GradualDensity(0.1, end=5), None, mask_every=3), SGD)
    seen = []
    for _ in range(6):
        state, _ = eqx.filter_jit(ntt.ntt_step)(state, X)
        seen.append(sum(counts(state.student.mask)))
    assert seen[4] == sum(TENTH) == seen[5]


def test_one_density_is_left_alone_at_the_end_as_published():
    method = ntt.NTTConfig(0.1, num_steps=300, mask_every=100).method(SGD)
    due = [step for step in range(1, 301) if bool(method.due(jnp.int32(step)))]
    assert due == [100]
    assert ntt.NTTConfig(0.1, num_steps=300, mask_every=None).method(SGD).due(jnp.int32(1)) is False


@pytest.mark.parametrize(("end", "expected"), [(150, [100, 150]), (250, [100, 200, 250, 300])])
def test_a_density_that_ends_early_is_left_alone_at_the_end_too(end, expected):
    schedule = ntt.GradualDensity(0.1, end)
    method = ntt.NTTConfig(schedule, num_steps=300, mask_every=100).method(SGD)
    assert [t for t in range(1, 301) if bool(method.due(jnp.int32(t)))] == expected


@pytest.mark.parametrize("value", [0.0, np.nan])
@pytest.mark.parametrize("kind", ["own", "rigl"])
def test_a_refresh_that_cannot_rank_ends_the_run_and_says_so(value, kind):
    class Flat(ntt.AbstractPeriodicRefresh):
        every: int = 2
        until: int | None = None

        def scores(self, view):
            return jax.tree.map(lambda w: jnp.full_like(w, value), view.weights())

    class NoLoss(ntt.AbstractTransferLoss):
        def __call__(self, student, teacher, x, info):
            zero = sum(
                jnp.sum(w)
                for w in jax.tree.leaves(eqx.filter(student, eqx.is_array))
                if w.dtype != bool
            )
            return 0.0 * zero, {}

    own = kind == "own"
    method = ntt.NeuralTangentTransfer(
        sparsity=ntt.Sparsity(0.5),
        optimizer=SGD,
        refresh=Flat() if own else ntt.RigLRefresh(every=2),
        loss=None if own else NoLoss(),
        num_steps=4,
    )
    state = ntt.ntt_init(MODEL, method)
    name = "Flat" if own else "RigLRefresh"
    with pytest.raises(ValueError, match=f"transfer: the scores of {name} cannot rank .* step 2"):
        ntt.transfer(state, [X])
    for _ in range(2):
        state, metrics = eqx.filter_jit(ntt.ntt_step)(state, X)
    assert np.isnan(metrics.loss) and counts(state.student.mask) == [0, 0]


GRADUAL = ntt.GradualDensity(0.1, end=50)
test_refusals = refusals(
    {
        "no refresh": (
            lambda: ntt.NTTConfig(GRADUAL, 50, mask_every=None),
            "NTTConfig: density is a schedule, but the mask is never taken again: give mask_every",
        ),
        "no refresh in a method": (
            lambda: ntt.NeuralTangentTransfer(
                sparsity=GRADUAL, optimizer=SGD, refresh=ntt.NoRefresh(), num_steps=50
            ),
            "NeuralTangentTransfer: density is a schedule, but the mask is never taken again",
        ),
        "an end after the last step": (
            lambda: ntt.NTTConfig(GRADUAL, 49),
            "NTTConfig: .* ends at step 50, after the last step, 49: make its end at most 49, or "
            "num_steps at least 50",
        ),
        "rest after the last step": (
            lambda: ntt.NTTConfig(optax.linear_schedule(1.0, 0.1, 60), 50),
            "NTTConfig: .* comes to rest at 0.1, but is at 0.25 after the last step, 50",
        ),
        "no end": (
            lambda: ntt.NeuralTangentTransfer(
                sparsity=optax.linear_schedule(1.0, 0.1, 60), optimizer=SGD, refresh=Once()
            ),
            "NeuralTangentTransfer: density is a schedule: give num_steps",
        ),
        "a run between two refreshes": (
            lambda: ntt.transfer(
                ntt.ntt_init(MODEL, cheap(optax.linear_schedule(1.0, 0.1, 60), None), SGD),
                [X],
                num_steps=60,
            ),
            "transfer: .* is at 0.1 after the last step, 60, .* after step 0, at 1",
        ),
    }
)
